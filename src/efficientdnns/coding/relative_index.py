"""Relative indices of sparse tensors, as in Deep Compression (https://arxiv.org/abs/1510.00149).

The positions of the non-zeros, in row-major order, are stored as the number ``s`` of zeros in between: ``position =
cumsum(s + 1) - 1``. A field of ``b`` bits holds ``s`` up to ``2**b - 1``. A longer gap is bridged by fillers: a filler
stores ``2**b - 1`` and stands for a weight that is zero, so it covers ``2**b`` positions. Zeros after the last non-zero
are not stored; the shape of the tensor restores them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigurationError, FileFormatError
from .bits import MAX_BITS


def _check_index_bits(index_bits: int) -> None:
    if not 1 <= index_bits <= MAX_BITS:
        raise ConfigurationError(f"index_bits is {index_bits}; use 1 to {MAX_BITS}")


def relative_encode(positions: ArrayLike, index_bits: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Turn ascending flat positions into gaps of at most ``2**index_bits - 1``.

    Returns ``(gaps, is_filler)``, both of shape [non-zeros + fillers]; an entry that is a filler stands for a zero
    weight.
    """
    _check_index_bits(index_bits)
    flat = np.asarray(positions, dtype=np.int64).reshape(-1)
    zeros = np.diff(flat, prepend=-1) - 1
    if zeros.size and zeros.min() < 0:
        raise ConfigurationError("relative_encode takes ascending positions >= 0 without repetitions; sort them first")
    span = 1 << index_bits
    fillers = zeros // span
    ends = np.cumsum(fillers + 1) - 1
    gaps = np.full(int(ends[-1]) + 1 if ends.size else 0, span - 1, dtype=np.int64)
    gaps[ends] = zeros % span
    is_filler = np.ones(gaps.size, dtype=bool)
    is_filler[ends] = False
    return gaps, is_filler


def relative_decode(gaps: ArrayLike, is_filler: ArrayLike) -> NDArray[np.int64]:
    """Undo :func:`relative_encode`: the ascending flat positions of the entries that are not fillers."""
    gaps = np.asarray(gaps, dtype=np.int64).reshape(-1)
    is_filler = np.asarray(is_filler, dtype=bool).reshape(-1)
    if gaps.shape != is_filler.shape or (gaps.size and gaps.min() < 0):
        raise FileFormatError(
            f"{gaps.size} relative indices and {is_filler.size} filler marks do not form a sparse tensor"
        )
    return (np.cumsum(gaps + 1) - 1)[~is_filler]


def shared_weight_bits(entries: int, value_bits: int, index_bits: int, clusters: int, float_bits: int = 32) -> int:
    """Return the bits of a pruned layer with shared weights before Huffman coding: ``E (b_w + b_i) + 32 k``.

    ``entries``: E, non-zeros plus fillers; ``value_bits``: b_w, bits of a cluster id; ``index_bits``: b_i, 0 for a
    layer that is not pruned; ``clusters``: k, entries of the codebook, of ``float_bits`` bits each. Biases are not
    counted.
    """
    return entries * (value_bits + index_bits) + float_bits * clusters
