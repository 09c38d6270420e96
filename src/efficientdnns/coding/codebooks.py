"""Coding of the values themselves: byte planes of arbitrary elements, and codebooks of a few distinct ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import FileFormatError
from .entropy import (
    SymbolReader,
    SymbolWriter,
    get_choice,
    get_raw,
    get_symbols,
    put_choice,
    put_raw,
    put_symbols,
)
from .integers import get_integers, put_integers

_MAX_LEVEL = 1 << 20
_MAX_DIVISOR = 8


def put_planes(writer: SymbolWriter, bits: NDArray[Any], is_float: bool) -> None:
    """Append bit patterns (unsigned, shape [n]) as one entropy-coded stream per byte of the element.

    The sign bit of a float moves to the low end first, so that the exponent of float32 and bfloat16 fills the highest
    byte.
    """
    width = 8 * bits.dtype.itemsize
    if is_float:
        bits = bits << bits.dtype.type(1) | bits >> bits.dtype.type(width - 1)
    for low in range(0, width, 8):
        put_symbols(writer, (bits >> bits.dtype.type(low) & bits.dtype.type(0xFF)).astype(np.int32), 256)


def get_planes(reader: SymbolReader, count: int, dtype: np.dtype[Any], is_float: bool) -> NDArray[Any]:
    """Read what :func:`put_planes` wrote, as ``count`` patterns of the unsigned ``dtype``."""
    width = 8 * dtype.itemsize
    bits = np.zeros(count, dtype=dtype)
    for low in range(0, width, 8):
        bits |= get_symbols(reader, count, 256).astype(dtype) << dtype.type(low)
    return bits >> dtype.type(1) | bits << dtype.type(width - 1) if is_float else bits


def sorted_patterns(bits: NDArray[Any], dtype: torch.dtype) -> NDArray[Any]:
    """Return the distinct patterns in ascending order of the numbers that they stand for in ``dtype``."""
    patterns = np.unique(bits)
    if patterns.size == 0 or dtype.is_complex:
        return patterns
    values = torch.from_numpy(patterns.view(np.uint8)).view(dtype)
    values = values.to(torch.float64) if dtype.is_floating_point else values.to(torch.int64)
    order: NDArray[np.int64] = np.argsort(values.numpy(), kind="stable")
    return patterns[order]


def put_codebook(writer: SymbolWriter, patterns: NDArray[Any], dtype: torch.dtype) -> None:
    """Append the patterns of a codebook: a step and integers if they are exact multiples of it, else byte planes."""
    grid = _grid(patterns.view(np.float32)) if dtype == torch.float32 and patterns.size > 1 else None
    if dtype == torch.float32:
        put_choice(writer, int(grid is not None), 2)
    if grid is None:
        put_planes(writer, patterns, dtype.is_floating_point)
        return
    step, levels = grid
    put_raw(writer, np.array([step]).view(np.uint32), 32)
    put_integers(writer, levels[:1])
    put_integers(writer, np.diff(levels) - 1)


def get_codebook(reader: SymbolReader, count: int, dtype: torch.dtype) -> NDArray[Any]:
    """Read what :func:`put_codebook` wrote, as ``count`` patterns."""
    if dtype != torch.float32 or get_choice(reader, 2) == 0:
        return get_planes(reader, count, np.dtype(f"u{dtype.itemsize}"), dtype.is_floating_point)
    step = get_raw(reader, 1, 32).astype(np.uint32).view(np.float32)
    first = get_integers(reader, 1, np.dtype(np.int64))
    gaps = get_integers(reader, count - 1, np.dtype(np.int64))
    levels = np.cumsum(np.concatenate([first, gaps + 1]))
    if gaps.min(initial=0) < 0 or np.abs(levels).max() > _MAX_LEVEL:
        raise FileFormatError("coded codebook is corrupt: its levels are out of range")
    return (step * levels.astype(np.float32)).view(np.uint32)


def _grid(values: NDArray[np.float32]) -> tuple[np.float32, NDArray[np.int64]] | None:
    """Return (step, levels) with ``float32(step * level)`` equal to every value bit for bit, or None if no such step is
    found.
    """
    if not np.isfinite(values).all():
        return None
    exact = values.astype(np.float64)
    sizes = np.abs(exact)
    smallest, largest = sizes[sizes > 0].min(initial=np.inf), sizes.max()
    if largest == 0 or largest / smallest > _MAX_LEVEL:
        return None
    for divisor in range(1, _MAX_DIVISOR + 1):
        top = np.rint(largest * divisor / smallest)
        around = np.float32(largest / top)
        for step in (around, np.nextafter(around, np.float32(0)), np.nextafter(around, np.float32(np.inf))):
            if step == 0:
                continue
            levels = np.rint(exact / float(step)).astype(
                np.int64
            )  # integers, so that a level of -0.0 shows as a difference
            multiples = step * levels.astype(np.float32)
            if np.abs(levels).max() <= _MAX_LEVEL and np.array_equal(multiples.view(np.uint32), values.view(np.uint32)):
                return step, levels
    return None
