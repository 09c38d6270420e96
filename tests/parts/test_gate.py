"""Hard concrete gates against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from efficientdnns.parts.gate import HardConcrete


def gate(*log_alpha: float) -> HardConcrete:
    made = HardConcrete(len(log_alpha))
    with torch.no_grad():
        made.log_alpha.copy_(torch.tensor(log_alpha))
    return made


@pytest.mark.parametrize(
    ("log_alpha", "probability"), [(0.0, 0.83178), (math.log(4), 0.9519), (math.log(7 / 3), 0.9203)]
)
def test_probability_of_being_open(log_alpha, probability) -> None:
    one = gate(log_alpha)
    assert one.probability_open().item() == pytest.approx(probability, abs=5e-5)
    samples = one.sample(1_000_000)
    assert (samples != 0).float().mean().item() == pytest.approx(probability, abs=2e-3)
    assert samples.min() == 0
    assert samples.max() == 1
    if log_alpha == 0:
        assert (samples == 1).float().mean().item() == pytest.approx(1 - probability, abs=2e-3)


def test_deterministic_values() -> None:
    values = gate(-2.40, -2.3978, 0.0, 2.3978, 2.40).deterministic().detach()
    assert values[0] == 0
    assert 0 < values[1] < 1e-3
    assert values[2] == pytest.approx(0.5)
    assert 1 - 1e-3 < values[3] < 1
    assert values[4] == 1


def test_eval_mode_is_deterministic_and_training_mode_draws() -> None:
    gates = HardConcrete(50)
    assert not torch.equal(gates(), gates())
    assert gates(7).shape == (7, 50)
    gates.eval()
    assert torch.equal(gates(), gates())


def test_initial_values_follow_the_drop_rate() -> None:
    log_alpha = HardConcrete(2000, drop_rate=0.2).log_alpha
    assert log_alpha.mean().item() == pytest.approx(math.log(4), abs=1e-3)
    assert log_alpha.std().item() == pytest.approx(0.01, rel=0.1)


def test_gradient_of_the_probability() -> None:
    gates = gate(-1.0, 0.3, 2.0)
    (3.0 * gates.probability_open()).sum().backward()
    p = gates.probability_open().detach()
    torch.testing.assert_close(gates.log_alpha.grad, 3.0 * p * (1 - p))


def test_gradient_of_a_sample_is_zero_exactly_where_it_was_clipped() -> None:
    gates = gate(*torch.linspace(-3, 3, 400).tolist())
    sample = gates.sample()
    sample.sum().backward()
    inside = (sample > 0) & (sample < 1)
    assert inside.any()
    assert (~inside).any()
    assert gates.log_alpha.grad[inside].abs().min() > 0
    assert gates.log_alpha.grad[~inside].abs().max() == 0


def test_clamp() -> None:
    gates = gate(-9.0, 9.0)
    gates.clamp()
    torch.testing.assert_close(gates.log_alpha.detach(), torch.tensor([math.log(1e-2), math.log(1e2)]))
