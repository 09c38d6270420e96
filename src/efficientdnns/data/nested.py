"""Inputs and targets may be tensors, or tuples, lists and dictionaries of them: the few things done to all.

A tensor has its samples along the first dimension. A list is a batch of samples that differ in size, one entry each
(images of a detector). A tuple holds several arguments, a mapping arguments by name; each of them holds all samples.
"""

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


def cut(value: Any, part: slice) -> Any:
    """The samples of a slice."""
    if isinstance(value, Tensor | list):
        return value[part]
    if isinstance(value, tuple):
        return tuple(cut(argument, part) for argument in value)
    if isinstance(value, Mapping):
        return {key: cut(argument, part) for key, argument in value.items()}
    return value


def first(value: Any, count: int) -> Any:
    """The first ``count`` samples."""
    return cut(value, slice(count))


def to_device(value: Any, device: torch.device | str) -> Any:
    """Every tensor on ``device``."""
    return each(value, lambda tensor: tensor.to(device))


def length(value: Any) -> int:
    """Number of samples: the length of the first tensor or list."""
    if isinstance(value, Tensor | list):
        return len(value)
    arguments = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    held = next((part for part in arguments if isinstance(part, Tensor | list | tuple | Mapping)), None)
    if held is None:
        raise TypeError(f"a {type(value).__name__} without tensors has no length")
    return length(held)
