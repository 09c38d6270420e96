"""The Bloomier filter: a table that gives every stored key its value, and any other key, almost always, nothing.

Its size depends on the number of stored keys alone. What it answers for other keys is fixed once it is built, so the
decoder of a file repeats it bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import ConfigurationError, FileFormatError
from .bits import MAX_BITS, ByteReader, pack_bits, packed_size, unpack_bits, write_varint
from .hashing import splitmix64
from .patterns import Shape, checked_size, element_bits, tensor_of_bits
from .registry import Parameters, register_codec

SPARE = 30
"""Cells beyond c n, without which few keys can hardly ever be placed."""
_BLOCK = 1 << 20

Cells = NDArray[np.int64]


def false_positive_rate(clusters: int, bits: int) -> float:
    r"""How likely a key that was not stored gets a value: :math:`k / 2^t`."""
    return clusters / 2**bits


def table_size(keys: int, c: float) -> int:
    """m = c n + 30 cells, rounded up to a multiple of 3."""
    return 3 * math.ceil((c * keys + SPARE) / 3)


@dataclass(frozen=True)
class BloomierFilter:
    r"""A table X of m cells of t bits, three hashes of a key into its thirds, and a t-bit mask hash.

    :math:`v = H_M(key) \oplus X[h_0] \oplus X[h_1] \oplus X[h_2]` is the value of every stored key; of another key it is
    uniform on :math:`[0, 2^t)`, which is no value if it is at least the number of values k.

    Attributes:
        table: (m,) uint16.
        bits: t, 1 to 16.
        seed: of all hashes.
    """

    table: NDArray[np.uint16]
    bits: int
    seed: int

    @classmethod
    def build(
        cls, keys: ArrayLike, values: ArrayLike, bits: int, c: float = 1.25, seed: int = 0, retries: int = 50
    ) -> BloomierFilter:
        """Store ``values`` below 2^bits under different non-negative ``keys``.

        Every key needs a cell that no key after it uses; where a draw of hashes gives none, the next seed is tried, and
        from 20 failures on with a larger table.

        Raises:
            ConfigurationError: bits or values out of range, or no success in ``retries`` draws.
        """
        keys, values = np.asarray(keys, dtype=np.int64).reshape(-1), np.asarray(values, dtype=np.int64).reshape(-1)
        if not 1 <= bits <= MAX_BITS or (values.size and not 0 <= int(values.min()) <= int(values.max()) < 1 << bits):
            raise ConfigurationError(
                f"values from 0 to {values.max(initial=0)} do not fit {bits} bits; use 1 to {MAX_BITS}"
            )
        for attempt in range(retries):
            size = table_size(keys.size, c * 1.02 ** max(0, attempt - 19))
            cells = _cells(keys, size, seed + attempt)
            rounds = _peel(cells, size)
            if rounds is not None:
                mask = _mask(keys, bits, seed + attempt)
                return cls(_fill(cells, values ^ mask, rounds, size), bits, seed + attempt)
        raise ConfigurationError(f"{keys.size} keys found no place in {retries} draws; use c of 1.23 or more, not {c}")

    def query(self, keys: ArrayLike) -> NDArray[np.int64]:
        """What the table says of every key: below the number of values a value, else nothing."""
        keys = np.asarray(keys, dtype=np.int64).reshape(-1)
        found = np.empty(keys.size, dtype=np.int64)
        for start in range(0, keys.size, _BLOCK):
            part = keys[start : start + _BLOCK]
            cells = self.table[_cells(part, self.table.size, self.seed)].astype(np.int64)
            found[start : start + _BLOCK] = _mask(part, self.bits, self.seed) ^ cells[0] ^ cells[1] ^ cells[2]
        return found

    def to_bytes(self) -> bytes:
        """t, the seed, m, and ceil(m t / 8) bytes."""
        return (
            bytes([self.bits])
            + write_varint(self.seed)
            + write_varint(self.table.size)
            + pack_bits(self.table, self.bits)
        )

    @classmethod
    def read(cls, reader: ByteReader) -> BloomierFilter:
        """Read what `to_bytes` wrote."""
        bits, seed = reader.take(1)[0], reader.varint()
        size = reader.varint()
        if not 1 <= bits <= MAX_BITS or size % 3 or size == 0:
            raise FileFormatError(f"filter is corrupt: {size} cells of {bits} bits")
        return cls(unpack_bits(reader.take(packed_size(size, bits)), bits, size), bits, seed)

    @classmethod
    def from_bytes(cls, data: bytes) -> BloomierFilter:
        """Undo `to_bytes`."""
        return cls.read(ByteReader(data))


def _cells(keys: NDArray[np.int64], size: int, seed: int) -> Cells:
    """The three cells of every key, (3, n), one in each third of the table."""
    third = size // 3
    return np.stack(
        [(splitmix64(keys, 4 * seed + i) % np.uint64(third)).astype(np.int64) + i * third for i in range(3)]
    )


def _mask(keys: NDArray[np.int64], bits: int, seed: int) -> NDArray[np.int64]:
    return (splitmix64(keys, 4 * seed + 3) >> np.uint64(64 - bits)).astype(np.int64)


def _peel(cells: Cells, size: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]] | None:
    """Rounds of (keys, their own cell) such that no key of the same or a later round uses that cell; None if stuck."""
    left = np.arange(cells.shape[1])
    rounds = []
    while left.size:
        used = np.bincount(cells[:, left].reshape(-1), minlength=size)
        alone = used[cells[:, left]] == 1
        free = alone.any(0)
        if not free.any():
            return None
        keys = left[free]
        rounds.append((keys, cells[alone[:, free].argmax(0), keys]))
        left = left[~free]
    return rounds


def _fill(
    cells: Cells, wanted: NDArray[np.int64], rounds: list[tuple[NDArray[np.int64], NDArray[np.int64]]], size: int
) -> NDArray[np.uint16]:
    """Cells whose sum (exclusive or) over the three of a key is ``wanted``; the last keys peeled are set first."""
    table = np.zeros(size, dtype=np.int64)
    for keys, own in reversed(rounds):
        # The own cell is still zero, and nobody else in this round touches it.
        others = table[cells[0, keys]] ^ table[cells[1, keys]] ^ table[cells[2, keys]]
        table[own] = wanted[keys] ^ others
    return table.astype(np.uint16)


@dataclass(frozen=True)
class WeightlessCodec:
    """A tensor as what a Bloomier filter answers: codebook and filter, decoded by asking for every index.

    Encoding is lossy, so it is done beforehand (`lossy`): as a choice for ``save_weights`` the codec holds bytes, and
    suits exactly the tensor that they decode to.
    """

    data: bytes = b""
    name: ClassVar[str] = "weightless"

    @classmethod
    def lossy(cls, tensor: Tensor, bits: int, c: float = 1.25, seed: int = 0) -> WeightlessCodec:
        """Store the non-zeros of a tensor of few values; `decoded` tells what it has become.

        Raises:
            ConfigurationError: more distinct values than fit.
        """
        patterns = element_bits(tensor)
        keys = np.flatnonzero(patterns)
        book, ids = np.unique(patterns[keys], return_inverse=True)
        if book.size >= 1 << bits:
            raise ConfigurationError(f"{book.size} clusters need cells of more than {bits} bits; use fewer clusters")
        table = BloomierFilter.build(keys, ids, bits, c, seed)
        return cls(write_varint(book.size) + book.tobytes() + table.to_bytes())

    def decoded(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor that the bytes stand for."""
        return self.decode(self.data, {}, shape, dtype)

    def suits(self, tensor: Tensor) -> bool:
        if not self.data:
            return False
        return np.array_equal(element_bits(self.decoded(tuple(tensor.shape), tensor.dtype)), element_bits(tensor))

    def encode(self, tensor: Tensor) -> tuple[bytes, Parameters]:
        if not self.suits(tensor):
            raise ConfigurationError("'weightless' stores only what it decoded itself; use 'codebook' or 'sparse'")
        return self.data, {}

    def decode(self, data: bytes, parameters: Parameters, shape: Shape, dtype: torch.dtype) -> Tensor:
        size = checked_size(data, shape)
        reader = ByteReader(data)
        number = reader.varint(1 << MAX_BITS)
        book = np.frombuffer(reader.take(number * dtype.itemsize), dtype=np.dtype(f"u{dtype.itemsize}"))
        found = BloomierFilter.read(reader).query(np.arange(size))
        # Null is 'no cluster', not 'beyond r bits': k need not be a power of two.
        table = np.concatenate([book, np.zeros(1, dtype=book.dtype)])
        return tensor_of_bits(table[np.minimum(found, number)], shape, dtype)


register_codec(WeightlessCodec())
