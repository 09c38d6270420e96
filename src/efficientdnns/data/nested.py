"""Inputs and targets may be tensors, or tuples, lists and dictionaries of them: the few things done to all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def each(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """``value`` with ``function`` applied to every tensor in it; anything else stays."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(each(part, function) for part in value)
    if isinstance(value, Mapping):
        return {key: each(part, function) for key, part in value.items()}
    return value


def leaves(value: Any) -> Iterator[Tensor]:
    """Every tensor in ``value``."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, Mapping):
        yield from leaves(tuple(value.values()))


def select(value: Any, rows: Tensor) -> Any:
    """The samples ``rows`` (int64, on the tensors' device) of every tensor."""
    return each(value, lambda tensor: tensor.index_select(0, rows))


def first(value: Any, count: int) -> Any:
    """The first ``count`` samples."""
    return each(value, lambda tensor: tensor[:count])


def to_device(value: Any, device: torch.device | str) -> Any:
    """Every tensor on ``device``."""
    return each(value, lambda tensor: tensor.to(device))


def length(value: Any) -> int:
    """Number of samples: the length of the first tensor."""
    return len(next(leaves(value)))
