"""Packing of small integers and booleans into bytes, and the byte reader that every decoder here uses.

Bits are packed least significant first: with 4 bits, two values share a byte and the first one is the low nibble (the
order of the Deep Compression demo files, https://arxiv.org/abs/1510.00149). ``n`` values of ``b`` bits take ``ceil(n b
/ 8)`` bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigurationError, FileFormatError

MAX_BITS = 16
_CHUNK = 1 << 20  # values expanded to single bits at a time; a multiple of 8, so that chunks end on bytes


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ConfigurationError(f"cannot pack integers of {bits} bits; use 1 to {MAX_BITS}")


def pack_bits(values: ArrayLike, bits: int) -> bytes:
    """Pack non-negative integers below ``2**bits`` (any shape, read in row-major order) into ``ceil(n * bits / 8)``
    bytes.

    Raises ConfigurationError for ``bits`` outside 1..16 or a value that does not fit.
    """
    _check_bits(bits)
    flat = np.asarray(values).reshape(-1)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= 1 << bits):
        raise ConfigurationError(
            f"values from {flat.min()} to {flat.max()} do not fit {bits} bits; use 0 to {(1 << bits) - 1}"
        )
    places = np.arange(bits, dtype=np.uint32)
    parts = []
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK].astype(np.uint32)
        parts.append(np.packbits((chunk[:, None] >> places & 1).astype(np.uint8), bitorder="little").tobytes())
    return b"".join(parts)


def unpack_bits(data: bytes, bits: int, count: int) -> NDArray[np.uint16]:
    """Undo :func:`pack_bits`: the first ``count`` integers of ``bits`` bits each, as uint16 of shape [count].

    Raises FileFormatError if ``data`` is too short.
    """
    _check_bits(bits)
    if count < 0 or len(data) < packed_size(count, bits):
        raise FileFormatError(
            f"{count} integers of {bits} bits need {packed_size(count, bits)} bytes, found {len(data)}"
        )
    places = np.arange(bits, dtype=np.uint16)
    result = np.empty(count, dtype=np.uint16)
    raw = np.frombuffer(data, dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        number = min(_CHUNK, count - start)
        first = start * bits // 8
        chunk = np.unpackbits(raw[first : first + packed_size(number, bits)], count=number * bits, bitorder="little")
        result[start : start + number] = (chunk.reshape(number, bits).astype(np.uint16) << places).sum(
            axis=1, dtype=np.uint16
        )
    return result


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that ``count`` integers of ``bits`` bits take: ``ceil(count * bits / 8)``."""
    return (count * bits + 7) // 8


def pack_bools(values: ArrayLike) -> bytes:
    """Pack booleans (any shape, row-major) eight to the byte."""
    return np.packbits(np.asarray(values, dtype=bool).reshape(-1), bitorder="little").tobytes()


def unpack_bools(data: bytes, count: int) -> NDArray[np.bool_]:
    """Undo :func:`pack_bools`: the first ``count`` booleans, shape [count]. Raises FileFormatError if ``data`` is too
    short.
    """
    if count < 0 or len(data) < packed_size(count, 1):
        raise FileFormatError(f"{count} booleans need {packed_size(count, 1)} bytes, found {len(data)}")
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count, bitorder="little").astype(bool)


def write_varint(value: int) -> bytes:
    """Write a non-negative integer, seven bits to the byte, lowest first; the top bit announces another byte."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


class ByteReader:
    """Read bytes and varints from the front of ``data``; raise FileFormatError instead of reading past the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        if count < 0 or self.position + count > len(self.data):
            raise FileFormatError(
                f"coded data ends early: wanted {count} more bytes, {len(self.data) - self.position} left"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def rest(self) -> bytes:
        """Return all remaining bytes."""
        return self.take(len(self.data) - self.position)

    def varint(self, limit: int = 2**63 - 1) -> int:
        """Return the next varint, which must not exceed ``limit``."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if value > limit or shift > 70:
                raise FileFormatError(f"coded data holds a number above its limit of {limit}")
            if byte < 0x80:
                return value
