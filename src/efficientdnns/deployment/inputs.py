"""What a network's inputs look like, as plain data; and inputs of that look, made of noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from efficientdnns.deployment.opened import resized


def describe(inputs: Any) -> Any:
    """Nested data with ``{"shape", "dtype", "low", "high"}`` for every tensor: its form and range."""
    if isinstance(inputs, Tensor):
        real = inputs.double() if inputs.numel() else inputs.new_zeros(1).double()
        low, high = float(real.min()), float(real.max())
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).split(".")[-1], "low": low, "high": high}
    if isinstance(inputs, Mapping):
        return {"mapping": {str(name): describe(part) for name, part in inputs.items()}}
    if isinstance(inputs, tuple | list):
        return {type(inputs).__name__: [describe(part) for part in inputs]}
    return {"value": inputs}


def noise(description: Any, samples: int | None = None, seed: int = 0) -> Any:
    """Inputs as `describe` described them, uniform within the range that was seen.

    ``samples`` of them, by default as many as there were.
    """
    made = _noise(description, torch.Generator().manual_seed(seed), samples)
    return made if samples is None else resized(made, samples)


def _noise(part: Any, generator: torch.Generator, samples: int | None) -> Any:
    if "shape" in part:
        dtype, low, high = getattr(torch, part["dtype"]), part["low"], part["high"]
        shape = part["shape"] if samples is None or not part["shape"] else [samples, *part["shape"][1:]]
        if not dtype.is_floating_point:
            return torch.randint(int(low), int(high) + 1, shape, generator=generator).to(dtype)
        return (torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)
    if "mapping" in part:
        return {name: _noise(inner, generator, samples) for name, inner in part["mapping"].items()}
    if "tuple" in part:
        return tuple(_noise(inner, generator, samples) for inner in part["tuple"])
    if "list" in part:  # its entries are samples, whose first dimension is something else
        return [_noise(inner, generator, None) for inner in part["list"]]
    return part["value"]
