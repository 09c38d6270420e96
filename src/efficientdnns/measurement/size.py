"""How many weights a network has.

A layer whose weights are not floating-point parameters says so, in one of two ways:

- ``weight_buffers``: a class or instance attribute naming the buffers that hold weights, for instance
  ``weight_buffers = ("weight",)`` on a layer that keeps its weights as integers. Their elements count like parameters.
- ``count_parameters()``: a method that returns ``(total, nonzero)`` for the module and everything below it, for weights
  whose number is not the number of stored elements: bit-packed binary codes, indices into a codebook, coded streams.

Everything else is counted by its parameters. Other buffers (running statistics, masks, position tables) are no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from efficientdnns.errors import ModelError


@runtime_checkable
class CountsParameters(Protocol):
    """A module, or anything else that a method makes, that knows its number of weights."""

    def count_parameters(self) -> tuple[int, int]:
        """Return the logical weights of the module and all below it, and how many of them are not zero."""
        ...


def parameter_count(model: nn.Module) -> int:
    """Return the number of weights; tensors that share memory count once, and so do modules that are used twice.

    Raises:
        ModelError: a module names a weight buffer that it does not have.
    """
    return sum(part.numel() if isinstance(part, Tensor) else part.count_parameters()[0] for _, part in parts(model))


def nonzero_parameters(model: nn.Module) -> int:
    """Return the number of weights that are not zero, of those that :func:`parameter_count` counts."""
    return sum(
        int(torch.count_nonzero(part.detach())) if isinstance(part, Tensor) else part.count_parameters()[1]
        for _, part in parts(model)
    )


def parts(module: nn.Module, seen: set[object] | None = None) -> Iterator[tuple[nn.Module, Tensor | CountsParameters]]:
    """Every weight tensor and every module that counts itself, each once, with the module that holds it."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, CountsParameters):
        yield module, module
        return
    tensors: list[Tensor] = [tensor for tensor in module._parameters.values() if tensor is not None]
    for name in getattr(module, "weight_buffers", ()):
        if name not in module._buffers:
            raise ModelError(
                f"{type(module).__name__} has no buffer {name!r}, though its weight_buffers name it; register it"
            )
        buffer = module._buffers[name]
        if buffer is not None:
            tensors.append(buffer)
    for tensor in tensors:
        key = _identity(tensor)
        if key not in seen:
            seen.add(key)
            yield module, tensor
    for child in module.children():
        yield from parts(child, seen)


def _identity(tensor: Tensor) -> object:
    """The memory a tensor occupies, so that tied weights in two Parameter objects are one; itself where it has none."""
    address = tensor.data_ptr() if tensor.layout is torch.strided else 0
    return (str(tensor.device), address, tensor.numel(), tensor.dtype) if address else ("tensor", id(tensor))
