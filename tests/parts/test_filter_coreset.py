"""Filter coresets: exactness at full rank, optimality, weights, sparsity, rank rules, sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from efficientdnns.parts.filter_coreset import (
    coreset,
    coreset_layers,
    coreset_limit,
    filter_matrix,
    rank_by_rule,
    sparse_coreset,
)

LAYERS = [
    (nn.Linear(7, 5), (3, 7)),
    (nn.Linear(7, 5, bias=False), (3, 4, 7)),
    (nn.Conv2d(3, 6, 3, stride=2, padding=1), (2, 3, 9, 9)),
    (nn.Conv2d(3, 6, 3, padding=2, dilation=2, bias=False), (2, 3, 9, 9)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_two_layers_are_the_layer_at_full_rank_and_the_dense_form_below(layer, shape) -> None:
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    matrix = filter_matrix(layer)
    coefficients, basis = coreset(matrix)
    torch.testing.assert_close(coreset_layers(layer, coefficients, basis)(x), layer(x), rtol=1e-9, atol=1e-9)
    low = coefficients[:, :2] @ basis[:2]
    two = coreset_layers(layer, coefficients[:, :2], basis[:2])(x)
    with torch.no_grad():
        rows = low[:, :-1] if layer.bias is not None else low
        layer.weight.copy_(rows.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(low[:, -1])
    torch.testing.assert_close(two, layer(x), rtol=1e-9, atol=1e-9)


def test_no_projection_is_better() -> None:
    matrix = torch.randn(20, 30, dtype=torch.float64)
    coefficients, basis = coreset(matrix)
    error = (coefficients[:, :6] @ basis[:6] - matrix).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(matrix)[6:].square().sum().sqrt())
    for _ in range(20):
        q = torch.linalg.qr(torch.randn(30, 6, dtype=torch.float64)).Q
        assert (matrix @ q @ q.T - matrix).norm() > error


def low_rank(n: int, d: int) -> torch.Tensor:
    signal = torch.randn(n, 5, dtype=torch.float64) @ torch.randn(5, d, dtype=torch.float64)
    return signal + 0.01 * signal.std() * torch.randn(n, d, dtype=torch.float64)


def test_rank_rules() -> None:
    assert rank_by_rule(low_rank(200, 200)) == rank_by_rule(low_rank(100, 200)) == 5
    assert rank_by_rule(low_rank(100, 200), "paper") == 5
    assert rank_by_rule(low_rank(200, 200), "paper") > 5  # pure noise passes on square matrices
    assert rank_by_rule(torch.zeros(4, 4)) >= 1


def test_weights_decide_whose_errors_count() -> None:
    matrix = torch.randn(12, 20, dtype=torch.float64)
    plain, same = coreset(matrix), coreset(matrix, torch.full((12,), 0.3))
    torch.testing.assert_close(plain[0][:, :4] @ plain[1][:4], same[0][:, :4] @ same[1][:4])
    for row in range(12):
        weights = torch.ones(12)
        weights[row] = 10
        heavy = coreset(matrix, weights)
        errors = [(c[:, :4] @ b[:4] - matrix)[row].norm() for c, b in (heavy, plain)]
        assert errors[0] < errors[1]


def test_sparsity_grows_with_alpha() -> None:
    matrix = torch.randn(20, 30, dtype=torch.float64)
    zeros, objective = [], []
    for alpha in (0.01, 1.0, 100.0):
        codes, basis = sparse_coreset(matrix, 8, alpha)
        zeros.append(float((codes == 0).double().mean()))
        objective.append(float((codes @ basis - matrix).square().sum() / 2 + alpha * codes.abs().sum()))
        assert basis.norm(dim=1).max() <= 1 + 1e-9
        start, rows = coreset(matrix)
        first = (start[:, :8] @ rows[:8] - matrix).square().sum() / 2 + alpha * start[:, :8].abs().sum()
        assert objective[-1] <= float(first) + 1e-9
    assert zeros[0] < zeros[1] < zeros[2] == 1.0


@pytest.mark.parametrize(
    ("layer", "limit"), [(nn.Conv2d(1, 20, 5), 11), (nn.Conv2d(20, 50, 5), 45), (nn.Linear(800, 500), 307)]
)
def test_limits_of_lenet(layer, limit) -> None:
    assert coreset_limit(layer) == limit
    parameters = [
        sum(p.numel() for p in coreset_layers(layer, *factors(layer, rank)).parameters()) for rank in (limit, limit + 1)
    ]
    assert parameters[0] < sum(p.numel() for p in layer.parameters()) <= parameters[1]


def factors(layer, rank):
    matrix = filter_matrix(layer)
    return matrix.new_zeros(len(matrix), rank), matrix.new_zeros(rank, matrix.shape[1])
