"""Canonical Huffman codes for integers.

The mean code length L of an alphabet with entropy H satisfies ``H <= L < H + 1`` bits. Only the code lengths are
stored: the codes follow from them (shorter codes first, then smaller symbols), so the table is small. An alphabet of
one symbol needs no code bits at all.
"""

from __future__ import annotations

import heapq
import itertools

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigurationError, FileFormatError
from .bits import ByteReader, pack_bits, packed_size, unpack_bits, write_varint

MAX_LENGTH = 32
_WINDOW_BITS = 1 << 20  # bit positions examined at a time while decoding


def huffman_lengths(counts: ArrayLike) -> NDArray[np.int64]:
    """Return the Huffman code length, in bits, of every symbol from its count.

    ``counts``: positive integers of shape [k]. The lengths satisfy Kraft's equality (``sum 2**-length = 1``) for k > 1;
    a single symbol gets length 0. No length exceeds 32 (the counts are halved until that holds, which needs millions of
    symbols to happen).
    """
    weights = [int(c) for c in np.asarray(counts).reshape(-1)]
    if any(w < 1 for w in weights):
        raise ConfigurationError("Huffman counts must be positive; leave out symbols that do not occur")
    while True:
        lengths = _tree_depths(weights)
        if not lengths.size or lengths.max() <= MAX_LENGTH:
            return lengths
        weights = [(w + 1) // 2 for w in weights]


def _tree_depths(weights: list[int]) -> NDArray[np.int64]:
    number = len(weights)
    heap = [(weight, node) for node, weight in enumerate(weights)]
    heapq.heapify(heap)
    parent = [0] * max(2 * number - 1, 0)
    for node in range(number, 2 * number - 1):
        first, left = heapq.heappop(heap)
        second, right = heapq.heappop(heap)
        parent[left] = parent[right] = node
        heapq.heappush(heap, (first + second, node))
    depth = [0] * len(parent)
    for node in range(2 * number - 3, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return np.array(depth[:number], dtype=np.int64)


def canonical_codes(lengths: ArrayLike) -> NDArray[np.uint64]:
    """Return the canonical code words of symbols with these code lengths (shape [k]): no word is the beginning of
    another.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    codes = np.zeros(lengths.size, dtype=np.uint64)
    code = previous = 0
    for index in np.lexsort((np.arange(lengths.size), lengths)):
        code <<= int(lengths[index]) - previous
        previous = int(lengths[index])
        codes[index] = code
        code += 1
    return codes


def huffman_encode(values: ArrayLike) -> bytes:
    """Encode integers (any shape, row-major; int64 range) with their own Huffman code; the table and the count are
    included.
    """
    flat = np.asarray(values).reshape(-1)
    if flat.size and not np.issubdtype(flat.dtype, np.integer):
        raise ConfigurationError(f"Huffman coding takes integers, not {flat.dtype}")
    symbols, indices, counts = np.unique(flat.astype(np.int64), return_inverse=True, return_counts=True)
    lengths = huffman_lengths(counts)
    head = write_varint(flat.size) + _write_table(symbols, lengths)
    if symbols.size < 2:
        return head
    codes = canonical_codes(lengths)
    item_lengths = lengths[indices]
    ends = np.cumsum(item_lengths)
    stream = np.zeros(int(ends[-1]), dtype=np.uint8)
    item_codes = codes[indices]
    for back in range(int(lengths.max())):  # the bit that lies `back` places before the end of each code word
        long_enough = item_lengths > back
        stream[ends[long_enough] - 1 - back] = item_codes[long_enough] >> np.uint64(back) & np.uint64(1)
    return head + np.packbits(stream).tobytes()


def huffman_decode(data: bytes, limit: int | None = None) -> NDArray[np.int64]:
    """Undo :func:`huffman_encode`: the integers as int64 of shape [n].

    ``limit``: largest n to accept. Raises FileFormatError for data that is truncated, corrupt or longer than ``limit``.
    """
    reader = ByteReader(data)
    count = reader.varint(2**48 if limit is None else limit)
    symbols, lengths = _read_table(reader)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    if symbols.size == 0:
        raise FileFormatError(f"Huffman data announces {count} symbols but holds an empty table")
    if symbols.size == 1:
        return np.full(count, symbols[0], dtype=np.int64)
    if count > 8 * (len(data) - reader.position):
        raise FileFormatError(f"Huffman data is too short for {count} symbols")
    return symbols[_decode_stream(reader.rest(), lengths, count)]


def _decode_stream(data: bytes, lengths: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return ``count`` symbol indices: look up the code that would start at every bit, then walk from code to code."""
    order = np.lexsort((np.arange(lengths.size), lengths))
    ordered = lengths[order]
    starts = canonical_codes(lengths)[order] << (MAX_LENGTH - ordered).astype(np.uint64)
    total = 8 * len(data)
    raw = np.frombuffer(data + bytes(8), dtype=np.uint8).astype(np.uint64)
    result = np.empty(count, dtype=np.int64)
    done, position = 0, 0
    while done < count:
        if position >= total:
            raise FileFormatError(f"Huffman data ends after {done} of {count} symbols")
        bit = np.arange(position, min(position + _WINDOW_BITS, total), dtype=np.int64)
        byte = bit >> 3
        window = np.zeros(bit.size, dtype=np.uint64)
        for offset in range(5):
            window = window << np.uint64(8) | raw[byte + offset]
        window = window >> (8 - (bit & 7)).astype(np.uint64) & np.uint64(0xFFFFFFFF)
        found = np.searchsorted(starts, window, side="right") - 1
        steps = ordered[found].tolist()
        visited: list[int] = []
        here, last = 0, bit.size
        while here < last and done + len(visited) < count:
            visited.append(here)
            here += steps[here]
        result[done : done + len(visited)] = order[found[visited]]
        done += len(visited)
        position += here
    if position > total:
        raise FileFormatError("Huffman data ends inside its last symbol")
    return result


def _write_table(symbols: NDArray[np.int64], lengths: NDArray[np.int64]) -> bytes:
    """Store the alphabet as its first symbol and the gaps to the following ones, then the code lengths, packed."""
    head = write_varint(symbols.size)
    if symbols.size == 0:
        return head
    first = int(symbols[0])
    head += write_varint(2 * first if first >= 0 else -2 * first - 1)
    if symbols.size == 1:
        return head
    gaps = [int(after) - int(before) - 1 for before, after in itertools.pairwise(symbols)]
    gap_bits = max(gaps).bit_length()
    length_bits = int(lengths.max()).bit_length()
    head += bytes([gap_bits, length_bits])
    if 0 < gap_bits <= 16:
        head += pack_bits(gaps, gap_bits)
    elif gap_bits > 16:
        head += b"".join(write_varint(gap) for gap in gaps)
    return head + pack_bits(lengths, length_bits)


def _read_table(reader: ByteReader) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    number = reader.varint(8 * len(reader.data))
    if number == 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    folded = reader.varint(2**64 - 1)
    first = folded >> 1 if folded & 1 == 0 else -(folded >> 1) - 1
    if number == 1:
        return np.array([first], dtype=np.int64), np.zeros(1, dtype=np.int64)
    gap_bits, length_bits = reader.take(2)
    if not 1 <= length_bits <= 6:
        raise FileFormatError("Huffman table is corrupt: code lengths out of range")
    if gap_bits == 0:
        gaps = [0] * (number - 1)
    elif gap_bits <= 16:
        gaps = unpack_bits(reader.take(packed_size(number - 1, gap_bits)), gap_bits, number - 1).tolist()
    else:
        gaps = [reader.varint(2**64 - 1) for _ in range(number - 1)]
    lengths = unpack_bits(reader.take(packed_size(number, length_bits)), length_bits, number).astype(np.int64)
    if lengths.min() < 1 or lengths.max() > MAX_LENGTH or int((1 << (MAX_LENGTH - lengths)).sum()) != 1 << MAX_LENGTH:
        raise FileFormatError("Huffman table is corrupt: its code lengths do not form a prefix code")
    symbols = [first]
    for gap in gaps:
        symbols.append(symbols[-1] + gap + 1)
    if symbols[-1] >= 2**63:
        raise FileFormatError("Huffman table is corrupt: symbols out of range")
    return np.array(symbols, dtype=np.int64), lengths
