r"""Filter coresets: the filters of a layer as combinations of a few basis filters, in the layer's place.

The filters of a layer with their biases are the rows of X (n, d + 1), :math:`\hat X = C D` of rank r has basis filters D
(r, d + 1), whose last column is a bias, and coefficients C (n, r).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from efficientdnns.parts.low_rank import Layer, empty_conv

Rule = Literal["gavish-donoho", "paper"]


def filter_matrix(layer: Layer) -> Tensor:
    """X (n, d + 1), or (n, d) for a layer without biases, in float64."""
    weight = layer.weight.detach().flatten(1).double()
    return weight if layer.bias is None else torch.cat([weight, layer.bias.detach().double()[:, None]], 1)


def threshold_factor(shape: tuple[int, int], rule: Rule = "gavish-donoho") -> float:
    r"""How many medians a singular value has to have to count.

    :math:`\omega(b) \approx 0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43` with b = short side / long side, the optimal hard
    threshold for noise of unknown size (`Gavish and Donoho, 2014 <https://arxiv.org/abs/1305.5870>`_), or the
    :math:`4 / \sqrt 3` of the paper's code, which is meant for known noise.
    """
    if rule == "paper":
        return 4 / math.sqrt(3)
    b = min(shape) / max(shape)
    return 0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43


def rank_by_rule(matrix: Tensor, rule: Rule = "gavish-donoho") -> int:
    """How many singular values reach the threshold; at least 1."""
    values = torch.linalg.svdvals(matrix.double())
    cut = threshold_factor((matrix.shape[0], matrix.shape[1]), rule) * values.quantile(0.5)
    return max(1, int((values >= cut).sum()))


def coreset(matrix: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Coefficients (n, m) and basis (m, d) of full rank m; the first r columns and rows are the best ones of rank r.

    With ``importance`` (n,) > 0 they are those of diag(w) X, and the coefficients are divided by w again: errors of
    important rows count for more (Coreset-A).
    """
    weights = matrix.new_ones(len(matrix)) if importance is None else importance.to(matrix)
    u, s, vh = torch.linalg.svd(weights[:, None] * matrix, full_matrices=False)
    return u * s / weights[:, None], vh


def sparse_coreset(matrix: Tensor, rank: int, alpha: float, steps: int = 50) -> tuple[Tensor, Tensor]:
    r"""Sparse coefficients C (n, r) and dense basis D (r, d) of least
    :math:`\frac12 \|X - C D\|_F^2 + \alpha \|C\|_1` with :math:`\|D_k\|_2 \le 1`.

    Alternating proximal gradient steps from the singular vectors; the objective never rises.
    """
    c, d = coreset(matrix)
    c, d = c[:, :rank], d[:rank]
    for _ in range(steps):
        curvature = float(torch.linalg.matrix_norm(d @ d.T, 2))
        if not curvature:
            break
        c = c - (c @ d - matrix) @ d.T / curvature
        c = c.sign() * (c.abs() - alpha / curvature).clamp_min(0.0)
        curvature = float(torch.linalg.matrix_norm(c.T @ c, 2))
        if not curvature:
            break
        d = d - c.T @ (c @ d - matrix) / curvature
        d = d / d.norm(dim=1, keepdim=True).clamp_min(1.0)
    return c, d


def coreset_layers(layer: Layer, coefficients: Tensor, basis: Tensor) -> nn.Sequential:
    """The basis filters with their biases, and a 1 x 1 convolution (linear layer) of the coefficients without any."""
    outputs, rank = coefficients.shape
    bias = layer.bias is not None
    first: Layer
    last: Layer
    if isinstance(layer, nn.Conv2d):
        first = empty_conv(layer, layer.in_channels, rank, spatial=True, bias=bias)
        last = empty_conv(layer, rank, outputs, spatial=False, bias=False)
    else:
        place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        first = nn.utils.skip_init(nn.Linear, layer.in_features, rank, bias=bias, **place)
        last = nn.utils.skip_init(nn.Linear, rank, outputs, bias=False, **place)
    with torch.no_grad():
        first.weight.copy_((basis[:, :-1] if bias else basis).view_as(first.weight))
        last.weight.copy_(coefficients.view_as(last.weight))
        if first.bias is not None:
            first.bias.copy_(basis[:, -1])
    return nn.Sequential(first, last).train(layer.training)


def coreset_limit(layer: Layer) -> int:
    """The largest rank whose two layers have fewer parameters than the layer; 0 where there is none."""
    outputs, inputs = filter_matrix(layer).shape
    return math.ceil(outputs * inputs / (outputs + inputs)) - 1
