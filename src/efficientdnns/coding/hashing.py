"""Hashes of integers that are the same on every machine and in every process: SplitMix64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_STEP, _FIRST, _SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix64(keys: ArrayLike, seed: int = 0) -> NDArray[np.uint64]:
    """A 64-bit hash of every non-negative integer in ``keys``; seeds give independent functions."""
    with np.errstate(over="ignore"):
        start = _finish(np.array([seed % 2**64], dtype=np.uint64) + _STEP)
        return _finish((np.asarray(keys).astype(np.uint64) + np.uint64(1)) * _STEP ^ start)


def _finish(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))
