"""Columns: one input position of a layer in all its filters, a column of the matrix that a convolution multiplies with.

A convolution of N filters over C channels with kernels of K x K is a product of an (N, C K K) matrix with the unfolded input.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from efficientdnns.errors import ModelError
from efficientdnns.parts.dead import remove_dead_channels
from efficientdnns.parts.select import by_pattern, largest_mask, layer_weights, without
from efficientdnns.session import Session


def column_norms(weight: Tensor) -> Tensor:
    """(columns,) L1 norms; a column holds the entries of all rows (filters) at one position."""
    return weight.detach().abs().flatten(1).sum(0)


def column_weights(model: nn.Module, skip: Sequence[str], field: str) -> dict[str, nn.Parameter]:
    """The weights that have columns, by parameter name: all but those of grouped and transposed convolutions."""
    weights = without(layer_weights(model), skip, f"{field}: skip")
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}
    able = {
        name: weight
        for name, weight in weights.items()
        if getattr(modules[name], "groups", 1) == 1 and not getattr(modules[name], "transposed", False)
    }
    if not able:
        raise ModelError(f"{field}: {type(model).__name__} has no linear layer or convolution with columns to prune")
    return able


def columns_kept(
    weights: Mapping[str, Tensor], ratio: float, ratios: Mapping[str, float], field: str
) -> dict[str, int]:
    """How many columns of every weight stay when ceil(ratio n) go; at least one does.

    Args:
        weights: by parameter name.
        ratio: share that goes.
        ratios: other shares by name pattern.
        field: says where ``ratios`` were written.
    """
    own = by_pattern(ratios, weights, f"{field}: ratios")
    sizes = {name: weight[0].numel() for name, weight in weights.items()}
    return {n: max(1, size - math.ceil(own.get(n, ratio) * size - 1e-9)) for n, size in sizes.items()}


@torch.no_grad()
def without_columns(session: Session, names: Mapping[str, int]) -> nn.Module:
    """A copy of the session's network with so many columns of the named weights, those of largest L1 norm.

    The others are zero, and channels that nothing reads any more are removed.
    """
    model = copy.deepcopy(session.model)
    for name, kept in names.items():
        weight = model.get_parameter(name)
        mask = largest_mask(column_norms(weight), kept)
        weight.mul_(mask.view(1, *weight.shape[1:])).add_(0.0)  # no -0.0
    return remove_dead_channels(model, session.example_input)
