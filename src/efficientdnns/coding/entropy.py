"""Entropy coding of symbols with asymmetric numeral systems (https://arxiv.org/abs/1311.2540; ``constriction``).

A :class:`SymbolWriter` collects symbols with their models and writes them as one stream, so that parts (a count, a
table, the symbols) share its two or three bytes of overhead; a :class:`SymbolReader` reads them in the same order. The
``put_...`` functions write one kind of content each and choose the smallest of several models; ``get_...`` reads it
back.

Probabilities are computed from integers with ``+ - * /`` alone, which IEEE arithmetic makes equal on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import FileFormatError

Integers = NDArray[Any]
_PRIORS = (0.02, 0.1, 0.5, 2.0)  # pseudo-count of every symbol of the adaptive model
_LEVELS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)  # 2**(i/4): the steps of stored frequencies

_CODERS = constriction.stream
BERNOULLI = _CODERS.model.Bernoulli(perfect=False)


@functools.cache
def _uniform(size: int) -> Any:
    return _CODERS.model.Uniform(size)


def categorical(weights: NDArray[np.float64]) -> Any:
    """Return the model of symbols with these (not normalised) probabilities; none is ever taken as zero."""
    return _CODERS.model.Categorical(weights, perfect=False)


class SymbolWriter:
    """Symbols and their models, in reading order."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.int32], Any, tuple[Any, ...]]] = []

    def put(self, symbols: ArrayLike, model: Any, *parameters: Any) -> None:
        """Append int32 ``symbols`` of shape [n], coded with a constriction model (and its parameters, one entry per
        symbol).
        """
        array = np.asarray(symbols, dtype=np.int32)
        if array.size:
            self._parts.append((array, model, parameters))

    def extend(self, other: SymbolWriter) -> None:
        """Append everything that ``other`` holds."""
        self._parts.extend(other._parts)

    def _coder(self) -> Any:
        coder = _CODERS.stack.AnsCoder()
        for symbols, model, parameters in reversed(self._parts):
            coder.encode_reverse(symbols, model, *parameters)
        return coder

    def bits(self) -> int:
        """Return the length of the stream in bits."""
        return int(self._coder().num_valid_bits())

    def to_bytes(self) -> bytes:
        """Return the stream: 32-bit little-endian words without the zero bytes at the end."""
        return bytes(self._coder().get_compressed().astype("<u4").tobytes().rstrip(b"\0"))


class SymbolReader:
    """Read a stream of :class:`SymbolWriter`. Any bytes decode to some symbols, hence counts must be checked before
    memory is taken.
    """

    def __init__(self, data: bytes) -> None:
        if data and data[-1] == 0:
            raise FileFormatError("coded data is corrupt: an entropy-coded stream never ends in a zero byte")
        self._coder = _CODERS.stack.AnsCoder(np.frombuffer(data + bytes(-len(data) % 4), dtype="<u4").astype(np.uint32))

    def get(self, model: Any, count_or_parameters: Any) -> NDArray[np.int32]:
        """Return the next symbols: a number of them, or as many as the model's parameter array has entries."""
        if isinstance(count_or_parameters, int) and count_or_parameters == 0:
            return np.empty(0, dtype=np.int32)
        result: NDArray[np.int32] = self._coder.decode(model, count_or_parameters)
        return result


def put_best(writer: SymbolWriter, candidates: Sequence[SymbolWriter]) -> None:
    """Append the shortest of ``candidates``, after its number (1 to 16 candidates)."""
    best = min(range(len(candidates)), key=lambda index: candidates[index].bits()) if len(candidates) > 1 else 0
    put_choice(writer, best, len(candidates))
    writer.extend(candidates[best])


def put_choice(writer: SymbolWriter, choice: int, number: int) -> None:
    """Append one of ``number`` equally likely choices."""
    if number > 1:
        writer.put([choice], _uniform(number))


def get_choice(reader: SymbolReader, number: int) -> int:
    """Read what :func:`put_choice` wrote."""
    return int(reader.get(_uniform(number), 1)[0]) if number > 1 else 0


def put_raw(writer: SymbolWriter, values: Integers, bits: int) -> None:
    """Append non-negative integers below ``2**bits`` (bits 0..64) without modelling them."""
    values = values.astype(np.uint64)
    for low in range(0, bits, 16):
        width = min(16, bits - low)
        writer.put((values >> np.uint64(low) & np.uint64((1 << width) - 1)).astype(np.int32), _uniform(1 << width))


def get_raw(reader: SymbolReader, count: int, bits: int) -> NDArray[np.uint64]:
    """Read what :func:`put_raw` wrote."""
    values = np.zeros(count, dtype=np.uint64)
    for low in range(0, bits, 16):
        values |= reader.get(_uniform(1 << min(16, bits - low)), count).astype(np.uint64) << np.uint64(low)
    return values


def put_number(writer: SymbolWriter, value: int) -> None:
    """Append one integer in 0..2**65-1: its bit length, then the bits below the leading one (6 bits + log2)."""
    length = value.bit_length()
    writer.put([length], _uniform(66))
    if length > 1:
        put_raw(writer, np.array([value - (1 << (length - 1))], dtype=np.uint64), length - 1)


def get_number(reader: SymbolReader, limit: int) -> int:
    """Read what :func:`put_number` wrote; raise FileFormatError if it exceeds ``limit``."""
    length = get_choice(reader, 66)
    value = length if length < 2 else (1 << (length - 1)) + int(get_raw(reader, 1, length - 1)[0])
    if value > limit:
        raise FileFormatError(f"coded data is corrupt: it holds {value} where at most {limit} can be")
    return value


def put_signed(writer: SymbolWriter, value: int) -> None:
    """Append one integer in -2**63..2**64-1 like :func:`put_number`, in the order 0, -1, 1, -2, ..."""
    put_number(writer, 2 * value if value >= 0 else -2 * value - 1)


def get_signed(reader: SymbolReader) -> int:
    """Read what :func:`put_signed` wrote."""
    folded = get_number(reader, 2**65)
    return folded >> 1 if folded & 1 == 0 else -(folded >> 1) - 1


def growing_blocks(count: int, fraction: int = 16) -> Iterator[tuple[int, int]]:
    """Cut ``range(count)`` into blocks that grow by 1/``fraction`` of what came before: an adaptive model is updated
    after each.
    """
    start = 0
    while start < count:
        stop = min(count, start + max(1, start // fraction))
        yield start, stop
        start = stop


def put_symbols(writer: SymbolWriter, symbols: Integers, alphabet: int) -> None:
    """Append integers in 0..alphabet-1 with the best of: a table of frequencies, adaptive frequencies, equal
    frequencies.
    """
    if alphabet < 2 or symbols.size == 0:
        return
    symbols = symbols.astype(np.int32)
    put_best(
        writer,
        [
            _uniform_symbols(symbols, alphabet),
            _static_symbols(symbols, alphabet),
            *(_adaptive_symbols(symbols, alphabet, prior) for prior in _PRIORS),
        ],
    )


def get_symbols(reader: SymbolReader, count: int, alphabet: int) -> NDArray[np.int32]:
    """Read what :func:`put_symbols` wrote."""
    if alphabet < 2 or count == 0:
        return np.zeros(count, dtype=np.int32)
    choice = get_choice(reader, 2 + len(_PRIORS))
    if choice == 0:
        return reader.get(_uniform(alphabet), count)
    if choice == 1:
        levels = _read_adaptive(reader, alphabet, _level_alphabet(count), 0.1)
        return reader.get(categorical(_level_weights(levels)), count)
    return _read_adaptive(reader, count, alphabet, _PRIORS[choice - 2])


def _uniform_symbols(symbols: NDArray[np.int32], alphabet: int) -> SymbolWriter:
    writer = SymbolWriter()
    writer.put(symbols, _uniform(alphabet))
    return writer


def _level_alphabet(count: int) -> int:
    return 4 * count.bit_length() + 2


def _level_weights(levels: NDArray[np.int32]) -> NDArray[np.float64]:
    """Turn stored levels into weights: level 0 for a symbol that does not occur, else ``2**((level - 1) / 4)``."""
    steps = np.maximum(levels.astype(np.int64) - 1, 0)
    weights = np.ldexp(np.array(_LEVELS)[steps % 4], steps // 4)
    return np.where(levels > 0, weights, 1e-6)


def _static_symbols(symbols: NDArray[np.int32], alphabet: int) -> SymbolWriter:
    """Write a table of frequencies, rounded to quarters of a power of two (about 0.002 bit per symbol lost), then the
    symbols.
    """
    writer = SymbolWriter()
    counts = np.bincount(symbols, minlength=alphabet)
    levels = np.where(counts > 0, np.rint(4 * np.log2(np.maximum(counts, 1))) + 1, 0).astype(np.int32)
    writer.extend(_adaptive_symbols(levels, _level_alphabet(symbols.size), 0.1))
    writer.put(symbols, categorical(_level_weights(levels)))
    return writer


def _adaptive_symbols(symbols: NDArray[np.int32], alphabet: int, prior: float) -> SymbolWriter:
    """Write the symbols in growing blocks, each with the frequencies of the blocks before it; no table is needed."""
    writer = SymbolWriter()
    counts = np.full(alphabet, prior)
    for start, stop in growing_blocks(symbols.size):
        writer.put(symbols[start:stop], categorical(counts))
        counts = counts + np.bincount(symbols[start:stop], minlength=alphabet)
    return writer


def _read_adaptive(reader: SymbolReader, count: int, alphabet: int, prior: float) -> NDArray[np.int32]:
    symbols = np.empty(count, dtype=np.int32)
    counts = np.full(alphabet, prior)
    for start, stop in growing_blocks(count):
        symbols[start:stop] = reader.get(categorical(counts), stop - start)
        counts = counts + np.bincount(symbols[start:stop], minlength=alphabet)
    return symbols
