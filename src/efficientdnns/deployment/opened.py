"""An opened file: called like the network, whatever runs it and whatever batch it was made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from efficientdnns.data.detection import is_detections, paired
from efficientdnns.data.nested import cut, length
from efficientdnns.deployment.graph import flatten, plain, unflatten
from efficientdnns.errors import ModelError

Network = Callable[[Any], Any]
"""Inputs to outputs, both nested tensors."""


def in_batches(network: Network, batch: int) -> Network:
    """``network``, made for ``batch`` samples a call, for any number: the last batch is filled up with repeated samples."""

    def of_all(inputs: Any) -> Any:
        samples = length(inputs)
        starts = range(0, samples, batch)
        parts = [plain(network(resized(cut(inputs, slice(start, start + batch)), batch))) for start in starts]
        if isinstance(inputs, list):
            return [output for part in parts for output in part][:samples]
        places = [place for place, _ in flatten(parts[0])]
        columns = zip(*([tensor for _, tensor in flatten(part)] for part in parts))
        return unflatten(
            places, [_joined(column, batch)[:samples] if column[0].dim() else column[0] for column in columns]
        )

    return of_all


def _joined(tensors: tuple[Tensor, ...], batch: int) -> Tensor:
    return torch.cat(tensors) if tensors[0].size(0) == batch else tensors[0]


def resized(inputs: Any, samples: int) -> Any:
    """``inputs`` cut to, or repeated until there are, ``samples`` samples."""
    if isinstance(inputs, Tensor):
        return inputs[torch.arange(samples) % len(inputs)]
    if isinstance(inputs, list):
        return [inputs[i % len(inputs)] for i in range(samples)]
    if isinstance(inputs, tuple):
        return tuple(resized(part, samples) for part in inputs)
    if isinstance(inputs, Mapping):
        return {name: resized(part, samples) for name, part in inputs.items()}
    return inputs


def difference(expected: Any, got: Any) -> tuple[float, float, float]:
    """Largest and mean absolute difference of two nested outputs, and the largest absolute value expected.

    Detections (``boxes``, ``labels`` and ``scores``) are compared with the nearest one of the other outputs, but for a
    tenth that rounding may decide (`efficientdnns.data.detection.paired`); boxes are shares of the largest coordinate, and
    another label is a difference of 1.

    Raises:
        ModelError: there are more or fewer outputs, or they have other shapes.
    """
    left, right = (_flat(value) for value in _matched(plain(expected), plain(got)))
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (left, right)]
    if shapes[0] != shapes[1]:
        raise ModelError(f"the opened file gives outputs of shape {shapes[1]}, the network {shapes[0]}")
    if not left:
        return 0.0, 0.0, 0.0
    a, b = (torch.cat([_numbers(tensor) for tensor in tensors]) for tensors in (left, right))
    if not a.numel():
        return 0.0, 0.0, 0.0
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    return float(apart.max()), float(apart.mean()), float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())


def _flat(value: Any) -> list[Tensor]:
    return [tensor for _, tensor in flatten(value)]


def _matched(expected: Any, got: Any) -> tuple[Any, Any]:
    """Both outputs with the detections in them in pairs."""
    if isinstance(expected, list | tuple) and isinstance(got, list | tuple) and len(expected) == len(got):
        pairs = [_matched(a, b) for a, b in zip(expected, got)]
        return [a for a, _ in pairs], [b for _, b in pairs]
    if is_detections(expected) and is_detections(got):
        first, second, other = paired(expected, got)
        labels = other.double()
        return [first, torch.zeros_like(labels)], [second, labels]
    return expected, got


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double().flatten()
