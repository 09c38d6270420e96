"""Exact selection: masks with a given number of ones, layers by name pattern, budgets shared out over layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from efficientdnns.errors import ConfigurationError, suggest

T = TypeVar("T")


def largest_mask(scores: Tensor, keep: int) -> Tensor:
    """Boolean mask of exactly ``keep`` of the largest scores; among equal ones those with the lowest flat index.

    Args:
        scores: any shape, no NaN.
        keep: entries to keep; below 0 counts as 0, above ``scores.numel()`` as all.
    """
    flat = scores.flatten()
    if keep <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if keep >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - keep + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().flatten()
    mask[ties[: keep - int(mask.sum())]] = True
    return mask.view_as(scores)


def layer_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weight matrices and kernels (no biases) of linear, convolutional and recurrent layers, by parameter name."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and isinstance(model.get_submodule(name.rpartition(".")[0]), kinds)
    }


def by_pattern(values: Mapping[str, T], names: Iterable[str], field: str) -> dict[str, T]:
    """The value of the first pattern that fits each name; names that no pattern fits are left out.

    A shell-style pattern fits a layer (``fc1``, ``layer1.*``) or one of its weights (``rnn.weight_hh_l0``).

    Raises:
        ConfigurationError: a pattern fits nothing; ``field`` says where it was written.
    """
    names = list(names)
    layers = {name: {name, re.sub(r"\.weight[^.]*$", "", name)} for name in names}
    for pattern in values:
        if not any(fnmatchcase(alias, pattern) for name in names for alias in layers[name]):
            known = {min(aliases, key=len) for aliases in layers.values()}
            raise ConfigurationError(f"{field}: no layer is called '{pattern}'{suggest(pattern, known)}")
    return {
        name: next(values[pattern] for pattern in values if any(fnmatchcase(alias, pattern) for alias in layers[name]))
        for name in names
        if any(fnmatchcase(alias, pattern) for pattern in values for alias in layers[name])
    }


def without(values: Mapping[str, T], skip: Iterable[str], field: str) -> dict[str, T]:
    """``values`` without the layers that the user leaves alone; patterns and errors as in `by_pattern`."""
    left = by_pattern(dict.fromkeys(skip, True), values, field)
    return {name: value for name, value in values.items() if name not in left}


def share_out(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    r"""Share ``total`` kept weights out over layers in proportion to the square root of their size.

    :math:`l_i = \min(n_i, c\sqrt{n_i})` with c such that :math:`\sum_i l_i = total`: small layers stay dense for longer
    than large ones. The sum is exact.

    Args:
        sizes: number of weights n of each layer.
        total: from 0 to the sum of ``sizes``.
    """
    total = max(0, min(total, sum(sizes.values())))
    shares: dict[str, float] = {}
    # The smallest layers fill up first, so one pass in order of size settles which of them are full.
    left, roots = float(total), sum(math.sqrt(size) for size in sizes.values())
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        root = math.sqrt(size)
        shares[name] = min(float(size), left * root / roots) if roots else 0.0
        left, roots = left - shares[name], roots - root
    kept = {name: min(sizes[name], math.floor(shares[name] + 1e-9)) for name in sizes}
    by_remainder = sorted(sizes, key=lambda name: kept[name] - shares[name])
    while (missing := total - sum(kept.values())) > 0:
        for name in [name for name in by_remainder if kept[name] < sizes[name]][:missing]:
            kept[name] += 1
    return kept
