"""Proximal steps: thresholding, the accelerated form, and how far a run can pull."""

from __future__ import annotations

import pytest
import torch

from efficientdnns.parts.proximal import apg_step, ista_step, soft_threshold


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_soft_threshold_gives_exact_zeros() -> None:
    assert soft_threshold(tensor(0.3, -0.3, -0.05, 0.05, 0.1), 0.1).tolist() == pytest.approx([0.2, -0.2, 0, 0, 0])
    assert (soft_threshold(tensor(-0.05, 0.1, 0.0), 0.1) == 0.0).all()
    each = soft_threshold(tensor(0.3, 0.3), tensor(0.1, 0.5))
    assert each.tolist() == pytest.approx([0.2, 0.0])


def test_one_step_by_hand() -> None:
    values, velocity = apg_step(tensor(1.0), tensor(0.5), tensor(0.0), rate=0.1, strength=1.0, momentum=0.9)
    assert velocity.item() == pytest.approx(-0.15)
    assert values.item() == pytest.approx(0.715)


def test_without_momentum_it_is_ista() -> None:
    values, gradient = torch.randn(50).double(), torch.randn(50).double()
    moved, _ = apg_step(values, gradient, torch.randn(50).double() * 0, 0.1, 0.3, momentum=0.0, nonnegative=False)
    torch.testing.assert_close(moved, ista_step(values, gradient, 0.1, 0.3))


def test_without_gradient_a_factor_reaches_zero_and_stays() -> None:
    values, velocity = tensor(1.0), tensor(0.0)
    path = []
    for _ in range(300):
        values, velocity = apg_step(values, tensor(0.0), velocity, rate=0.1, strength=0.5)
        path.append(values.item())
    first = path.index(0.0)
    assert first < 100
    assert set(path[first:]) == {0.0}


def test_the_penalised_quadratic_is_solved_with_exact_zeros_where_a_subgradient_leaves_none() -> None:
    torch.manual_seed(0)
    target = torch.rand(40).double()
    values, velocity, plain = torch.ones(40).double(), torch.zeros(40).double(), torch.ones(40).double()
    for _ in range(400):
        values, velocity = apg_step(values, values - target, velocity, rate=0.05, strength=0.4)
        plain = plain - 0.05 * (plain - target + 0.4 * plain.sign())
    torch.testing.assert_close(values, (target - 0.4).clamp_min(0), atol=1e-6, rtol=0)
    assert (values == 0.0).sum() == (target <= 0.4).sum() > 5
    assert (plain == 0.0).sum() == 0
