"""Tensors as arrays of bit patterns: what the codecs work on, so that ``-0.0`` and ``NaN`` come back exactly."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigurationError, FileFormatError

Shape: TypeAlias = tuple[int, ...]
_FREE_ELEMENTS = 1 << 27
_ELEMENTS_PER_BYTE = 1 << 16


def element_bits(tensor: Tensor) -> NDArray[Any]:
    """Return the bit patterns of the elements as unsigned integers of shape [n]; ConfigurationError for tensors without
    plain storage.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ConfigurationError(
            f"cannot store a {tensor.layout} tensor of {tensor.dtype}; convert it with to_dense() or int_repr() first"
        )
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    flat = flat.as_strided(
        (flat.numel(),), (1,)
    )  # a vector of one or no element can have any stride, which view refuses
    width = tensor.element_size()
    return flat.view(torch.uint8).numpy().view(np.dtype(f"u{width}") if width <= 8 else np.uint8)


def tensor_of_bits(bits: NDArray[Any], shape: Shape, dtype: torch.dtype) -> Tensor:
    """Undo :func:`element_bits`."""
    if dtype == torch.bool and bits.size and bits.max() > 1:
        raise FileFormatError("coded data is corrupt: a boolean is neither 0 nor 1")
    raw = np.array(bits, copy=True).view(np.uint8)
    if raw.size != math.prod(shape) * dtype.itemsize:
        raise FileFormatError(
            f"coded data is corrupt: {raw.size} bytes for a tensor of shape {list(shape)} and {dtype}"
        )
    return torch.from_numpy(raw).view(dtype).reshape(shape) if raw.size else torch.empty(shape, dtype=dtype)


def pattern_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the unsigned integer dtype as wide as ``dtype``."""
    return np.dtype(f"u{dtype.itemsize}")


def plausible_size(data: bytes, shape: Shape) -> bool:
    """Say whether a tensor of this shape may come from so few bytes; if not, a corrupt shape could take all memory."""
    return math.prod(shape) <= _FREE_ELEMENTS + _ELEMENTS_PER_BYTE * len(data)


def checked_size(data: bytes, shape: Shape) -> int:
    """Return the number of elements; FileFormatError for a shape that is not plausible."""
    if not plausible_size(data, shape):
        raise FileFormatError(f"coded data is corrupt: {len(data)} bytes cannot hold a tensor of shape {list(shape)}")
    return math.prod(shape)


def codable(tensor: Tensor) -> bool:
    """Say whether the tensor has elements, of at most 64 bits."""
    return tensor.element_size() <= 8 and tensor.numel() > 0


def codebook_indices(bits: NDArray[Any], patterns: NDArray[Any]) -> NDArray[np.int64]:
    """Return for every pattern its place in the codebook plus 1, and 0 for zero."""
    order = np.argsort(patterns)
    if not patterns.size:
        return np.zeros(bits.size, dtype=np.int64)
    found = order[np.minimum(np.searchsorted(patterns, bits, sorter=order), patterns.size - 1)]
    return np.where(bits == 0, 0, found + 1)


def look_up(patterns: NDArray[Any], indices: NDArray[np.int64]) -> NDArray[Any]:
    """Undo :func:`codebook_indices`: index 0 is zero, index i the i-th pattern."""
    if indices.size and (indices.min() < 0 or indices.max() > patterns.size):
        raise FileFormatError(f"coded data is corrupt: index {indices.max()} into a codebook of {patterns.size} values")
    table = np.concatenate([np.zeros(1, dtype=patterns.dtype), patterns])
    return table[indices]
