"""Entropy coding of integer arrays, never larger than zstandard's highest level."""

from __future__ import annotations

from typing import Any

import numpy as np
import zstandard
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigurationError, FileFormatError
from .entropy import (
    Integers,
    SymbolReader,
    SymbolWriter,
    get_choice,
    get_number,
    get_raw,
    get_signed,
    get_symbols,
    put_best,
    put_number,
    put_raw,
    put_signed,
    put_symbols,
)

MAX_ALPHABET = 4096  # larger ranges are split into classes and low bits
_MANTISSA = 3  # bits after the leading one of a large integer that are modelled; the ones below are stored as they are
_ZSTD_LEVEL = 22
QUICK = 1 << 17
LARGE = 1 << 22
_FAST_LEVEL = 9
_CLOSE = 1.03
_DTYPES: tuple[str, ...] = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "bool")


def put_integers(writer: SymbolWriter, values: Integers) -> None:
    """Append integers of any integer dtype and range; the reader must know their number and dtype.

    They are counted from their minimum, or folded around their median (0, -1, 1, -2, ...); a range above 4096 is cut
    into classes (the leading bits, modelled) and low bits (stored as they are).
    """
    if values.size == 0:
        return
    low, high = int(values.min()), int(values.max())
    put_signed(writer, low)
    put_number(writer, high - low)
    shifted = (values.astype(np.uint64) - np.uint64(low % 2**64)).reshape(-1)
    if high - low < MAX_ALPHABET:
        put_symbols(writer, shifted, high - low + 1)
        return
    plain, folded = SymbolWriter(), SymbolWriter()
    _put_classes(plain, shifted)
    middle = int(np.partition(shifted, shifted.size // 2)[shifted.size // 2])
    put_number(folded, middle)
    _put_classes(folded, _fold(shifted, middle))
    put_best(writer, [plain, folded])


def get_integers(reader: SymbolReader, count: int, dtype: np.dtype[Any]) -> Integers:
    """Read what :func:`put_integers` wrote, as an array of shape [count] and this integer dtype."""
    if count == 0:
        return np.empty(0, dtype=dtype)
    info = np.iinfo(dtype)
    low = get_signed(reader)
    span = get_number(reader, 2**64 - 1)
    if not (info.min <= low and low + span <= info.max):
        raise FileFormatError(f"coded data is corrupt: integers from {low} to {low + span} do not fit {dtype}")
    if span < MAX_ALPHABET:
        shifted = get_symbols(reader, count, span + 1).astype(np.uint64)
    elif get_choice(reader, 2) == 0:
        shifted = _get_classes(reader, count)
    else:
        middle = get_number(reader, 2**64 - 1)
        shifted = _unfold(_get_classes(reader, count), middle)
    if int(shifted.max()) > span:
        raise FileFormatError("coded data is corrupt: an integer lies outside its range")
    return (shifted + np.uint64(low % 2**64)).astype(dtype)


def _fold(shifted: NDArray[np.uint64], middle: int) -> NDArray[np.uint64]:
    """Order values by their distance from ``middle``: 0 above, then alternately below and above, modulo 2**64."""
    offset = (shifted - np.uint64(middle)).view(np.int64)
    return ((offset << 1) ^ (offset >> 63)).view(np.uint64)


def _unfold(folded: NDArray[np.uint64], middle: int) -> NDArray[np.uint64]:
    offset = (folded >> np.uint64(1)) ^ (np.uint64(0) - (folded & np.uint64(1)))
    return offset + np.uint64(middle)


def _put_classes(writer: SymbolWriter, values: NDArray[np.uint64]) -> None:
    """A value below 16 is its own class; above, a class is the bit length and the three bits after the leading one."""
    lengths = _bit_lengths(values)
    low_bits = np.maximum(lengths - _MANTISSA - 1, 0)
    classes = (low_bits << _MANTISSA) + (values >> low_bits.astype(np.uint64)).astype(np.int64)
    number = int(classes.max()) + 1
    put_number(writer, number)
    put_symbols(writer, classes, number)
    for bits in range(1, int(low_bits.max()) + 1):
        chosen = low_bits == bits
        put_raw(writer, values[chosen] & np.uint64((1 << bits) - 1), bits)


def _get_classes(reader: SymbolReader, count: int) -> NDArray[np.uint64]:
    classes = get_symbols(reader, count, get_number(reader, 62 << _MANTISSA)).astype(np.int64)
    low_bits = np.maximum((classes >> _MANTISSA) - 1, 0)
    values = (classes - (low_bits << _MANTISSA)).astype(np.uint64) << low_bits.astype(np.uint64)
    for bits in range(1, int(low_bits.max()) + 1):
        chosen = low_bits == bits
        values[chosen] |= get_raw(reader, int(chosen.sum()), bits)
    return values


def _bit_lengths(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    lengths = np.zeros(values.size, dtype=np.int64)
    rest = values.copy()
    for step in (32, 16, 8, 4, 2, 1):
        large = rest >= np.uint64(1 << step)
        lengths[large] += step
        rest[large] >>= np.uint64(step)
    return lengths + (rest > 0)


def encode_integers(values: ArrayLike) -> bytes:
    """Encode an integer or boolean array (flattened in row-major order) so that :func:`decode_integers` returns it
    exactly.

    Takes the smaller of an entropy-coded stream and zstandard level 22 (of the array as it is, and of the narrowest
    dtype that holds its values), plus one byte that names the dtype and the choice; an empty array takes that byte
    alone. Above `QUICK` values zstandard level 9 is tried first, and taken if its Huffman codes come within 3 % of the
    entropy of the values: it takes a thousandth of the time and no memory beside the array. Above `LARGE` it is taken
    in any case.
    """
    array = np.asarray(values).reshape(-1)
    if array.dtype.name not in _DTYPES:
        raise ConfigurationError(f"encode_integers takes integers or booleans, not {array.dtype}")
    number = _DTYPES.index(array.dtype.name)
    if array.size == 0:
        return bytes([number])
    plain = array.astype(np.uint8) if array.dtype == np.bool_ else array
    narrow = _narrowest(plain)
    if plain.size > QUICK:
        head = bytes([number + 16]) if narrow == plain.dtype else bytes([number + 32, _DTYPES.index(narrow.name)])
        little = plain.astype(narrow.newbyteorder("<"), copy=False)
        quick = head + zstandard.ZstdCompressor(level=_FAST_LEVEL).compress(little.data)
        if plain.size > LARGE or len(quick) <= _CLOSE * _entropy(little):
            return quick
    writer = SymbolWriter()
    put_number(writer, plain.size)
    put_integers(writer, plain)
    coded = [bytes([number]) + writer.to_bytes()]
    for choice, candidate in enumerate([plain] if narrow == plain.dtype else [plain, plain.astype(narrow)], start=1):
        dtype_byte = b"" if choice == 1 else bytes([_DTYPES.index(narrow.name)])
        coded.append(bytes([number + 16 * choice]) + dtype_byte + zstd_compress(candidate, len(coded[0])))
    return min(coded, key=len)


def _entropy(values: Integers) -> float:
    """Bytes that the values would take if each cost its information, whatever stands beside it; 0 for wide ones."""
    if values.itemsize > 1:
        return 0.0
    counts = np.bincount(values.view(np.uint8), minlength=1)
    shares = counts[counts > 0] / values.size
    return float(-(shares * np.log2(shares)).sum() * values.size / 8)


def decode_integers(data: bytes, limit: int = 2**40) -> Integers:
    """Undo :func:`encode_integers`: an array of shape [n] and the dtype that was encoded.

    ``limit``: the largest n to accept. Raises FileFormatError for data that is truncated or corrupt.
    """
    if not data or data[0] % 16 >= len(_DTYPES) or data[0] // 16 > 2:
        raise FileFormatError("coded integers are corrupt: unknown first byte")
    name, choice = _DTYPES[data[0] % 16], data[0] // 16
    dtype = np.dtype(np.uint8 if name == "bool" else name)
    if len(data) == 1:
        return np.empty(0, dtype=name)
    if choice == 0:
        reader = SymbolReader(data[1:])
        return get_integers(reader, get_number(reader, limit), dtype).astype(name)
    stored, body = dtype, data[1:]
    if choice == 2:
        if data[1] >= len(_DTYPES) - 1:
            raise FileFormatError("coded integers are corrupt: unknown second byte")
        stored, body = np.dtype(_DTYPES[data[1]]), data[2:]
    return zstd_decompress(body, stored, limit).astype(name)


def _narrowest(values: Integers) -> np.dtype[Any]:
    low, high = int(values.min()), int(values.max())
    for name in _DTYPES[:-1]:
        if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
            return np.dtype(name)
    return values.dtype


def zstd_compress(values: Integers, rival: int) -> bytes:
    """Return the little-endian bytes of ``values``, compressed with zstandard level 22.

    Above 4 MiB, where level 22 takes minutes, level 3 is tried first, and kept if it takes more than 1.5 times as many
    bytes as the ``rival`` coder: level 22 then has no chance (unless the array repeats over megabytes).
    """
    little = values.astype(values.dtype.newbyteorder("<")).tobytes()
    if len(little) > LARGE:
        probe = zstandard.ZstdCompressor(level=3).compress(little)
        if len(probe) > 1.5 * rival:
            return probe
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(little)


def zstd_decompress(data: bytes, dtype: np.dtype[Any], limit: int) -> Integers:
    """Undo :func:`zstd_compress`; raise FileFormatError for corrupt data or more than ``limit`` elements."""
    try:
        size = zstandard.frame_content_size(data)
        if size < 0 or size > limit * dtype.itemsize or size % dtype.itemsize:
            raise FileFormatError(
                f"compressed integers are corrupt: {size} bytes for at most {limit} values of {dtype}"
            )
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise FileFormatError(f"compressed integers are corrupt: {error}") from error
    if len(raw) != size:
        raise FileFormatError(f"compressed integers are corrupt: {len(raw)} bytes where {size} were announced")
    return np.frombuffer(raw, dtype=dtype.newbyteorder("<")).astype(dtype)
