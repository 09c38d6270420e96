"""Coding of the positions of non-zeros.

Four ways, the shortest one wins: independent bits of one probability; bits whose probability follows the columns above
(and, if that pays, the number of non-zeros in the row), for layers whose rows or columns differ, such as the border
pixels of an image; bytes of the bitmap, for patterns such as 2:4; and the gaps between non-zeros.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import FileFormatError
from .bits import pack_bools, packed_size, unpack_bools
from .entropy import (
    BERNOULLI,
    SymbolReader,
    SymbolWriter,
    get_choice,
    get_number,
    get_symbols,
    growing_blocks,
    put_best,
    put_choice,
    put_number,
    put_symbols,
)
from .integers import get_integers, put_integers

Mask = NDArray[np.bool_]
_STRENGTHS = (0.5, 2.0, 8.0, 32.0)  # number of average rows that are mixed into the columns seen so far
_SMALLEST = 2.0**-20
_SAMPLE = 1 << 19  # positions on which the settings are chosen
_GAPS_BELOW = 0.25  # density above which gaps cannot be the shortest


def as_table(mask: Mask) -> Mask:
    """Return the view [first dimension, all others]; a vector becomes one row."""
    return mask.reshape(mask.shape[0], -1) if mask.ndim > 1 and mask.size else mask.reshape(1, -1)


def put_mask(writer: SymbolWriter, mask: Mask) -> None:
    """Append a boolean array of any shape, which the reader must know. Rows and columns are those of the view [first,
    rest].
    """
    table = as_table(mask)
    total = int(table.sum())
    put_number(writer, total)
    if total in (0, table.size):
        return
    candidates = [_write_independent(table, total), _write_columns(table, total), _write_bytes(table)]
    if total < _GAPS_BELOW * table.size:
        candidates.append(_write_gaps(table))
    put_best(writer, candidates)


def get_mask(reader: SymbolReader, shape: tuple[int, ...]) -> Mask:
    """Read what :func:`put_mask` wrote, for the same shape."""
    size = int(np.prod(shape, dtype=np.int64))
    rows = shape[0] if len(shape) > 1 and size else 1
    columns = size // rows
    total = get_number(reader, size)
    if total in (0, size):
        return np.full(shape, total > 0)
    choice = get_choice(reader, 4 if total < _GAPS_BELOW * size else 3)
    if choice == 0:
        mask = reader.get(BERNOULLI, np.full(size, total / size)).astype(bool)
    elif choice == 1:
        mask = _read_columns(reader, rows, columns, total)
    elif choice == 2:
        mask = unpack_bools(get_symbols(reader, packed_size(size, 1), 256).astype(np.uint8).tobytes(), size)
    else:
        mask = _read_gaps(reader, total, size)
    return mask.reshape(shape)


def _write_independent(table: Mask, total: int) -> SymbolWriter:
    writer = SymbolWriter()
    writer.put(table.reshape(-1), BERNOULLI, np.full(table.size, total / table.size))
    return writer


def _write_bytes(table: Mask) -> SymbolWriter:
    writer = SymbolWriter()
    put_symbols(writer, np.frombuffer(pack_bools(table), dtype=np.uint8), 256)
    return writer


def _write_gaps(table: Mask) -> SymbolWriter:
    writer = SymbolWriter()
    put_integers(writer, np.diff(np.flatnonzero(table), prepend=-1) - 1)
    return writer


def _read_gaps(reader: SymbolReader, total: int, size: int) -> Mask:
    gaps = get_integers(reader, total, np.dtype(np.int64))
    if gaps.min() < 0 or gaps.max() >= size or int(gaps.sum()) + total > size:
        raise FileFormatError(f"coded positions are corrupt: they reach beyond the {size} weights")
    mask = np.zeros(size, dtype=bool)
    mask[np.cumsum(gaps + 1) - 1] = True
    return mask


@dataclass(frozen=True)
class _Settings:
    transposed: bool
    by_row: bool  # the number of non-zeros of every row is stored and scales the probabilities of the row
    strength: int  # index into _STRENGTHS

    def put(self, writer: SymbolWriter) -> None:
        put_choice(writer, int(self.transposed) + 2 * int(self.by_row) + 4 * self.strength, 4 * len(_STRENGTHS))

    @classmethod
    def get(cls, reader: SymbolReader) -> _Settings:
        number = get_choice(reader, 4 * len(_STRENGTHS))
        return cls(bool(number & 1), bool(number & 2), number >> 2)


class _ColumnModel:
    """Probability of a non-zero at every place of the next rows, from the rows before: ``(seen_j + s q) / (rows + s)``.

    q is the density of the table and s the strength. With the number r of non-zeros of a row, the odds of the row are
    multiplied by the odds of r over the odds of the expected number.
    """

    def __init__(self, columns: int, density: float, strength: float) -> None:
        self.columns, self.strength, self.prior = columns, strength, strength * density
        self.seen = np.zeros(columns, dtype=np.int64)
        self.rows = 0

    def probabilities(self, number: int, row_counts: NDArray[np.int64] | None) -> NDArray[np.float64]:
        column = np.clip((self.seen + self.prior) / (self.rows + self.strength), _SMALLEST, 1 - _SMALLEST)
        if row_counts is None:
            return np.tile(column, number)
        expected = (int(self.seen.sum()) + self.prior * self.columns) / (self.rows + self.strength)
        factors = row_counts / (self.columns - row_counts) * ((self.columns - expected) / expected)
        odds = factors[:, None] * (column / (1 - column))
        return np.clip(odds / (1 + odds), _SMALLEST, 1 - _SMALLEST).reshape(-1)

    def update(self, block: Mask) -> None:
        self.seen += block.sum(axis=0)
        self.rows += block.shape[0]


def _write_columns(table: Mask, total: int) -> SymbolWriter:
    """Write with the best settings, found one after the other on (a sample of) the rows."""
    sample = table[: max(1, _SAMPLE // table.shape[1])]

    def length(settings: _Settings) -> int:
        return _write_columns_with(sample, settings, total / table.size).bits()

    best = min((_Settings(t, r, 2) for t, r in itertools.product((False, True), repeat=2)), key=length)
    best = min((_Settings(best.transposed, best.by_row, strength) for strength in range(len(_STRENGTHS))), key=length)
    return _write_columns_with(table, best, total / table.size)


def _write_columns_with(table: Mask, settings: _Settings, density: float) -> SymbolWriter:
    writer = SymbolWriter()
    settings.put(writer)
    if settings.transposed:
        table = table.T
    rows, columns = table.shape
    counts = table.sum(axis=1) if settings.by_row else None
    if counts is not None:
        put_integers(writer, counts)
    model = _ColumnModel(columns, density, _STRENGTHS[settings.strength])
    for start, stop in growing_blocks(rows):
        block = table[start:stop]
        if counts is None:
            writer.put(block.reshape(-1), BERNOULLI, model.probabilities(stop - start, None))
        else:
            open_rows = _open_rows(counts[start:stop], columns)
            writer.put(block[open_rows].reshape(-1), BERNOULLI, model.probabilities(0, counts[start:stop][open_rows]))
        model.update(block)
    return writer


def _read_columns(reader: SymbolReader, rows: int, columns: int, total: int) -> Mask:
    settings = _Settings.get(reader)
    density = total / (rows * columns)
    if settings.transposed:
        rows, columns = columns, rows
    counts = get_integers(reader, rows, np.dtype(np.int64)) if settings.by_row else None
    if counts is not None and (counts.min() < 0 or counts.max() > columns):
        raise FileFormatError(
            f"coded positions are corrupt: a row of {columns} weights cannot hold {counts.max()} non-zeros"
        )
    model = _ColumnModel(columns, density, _STRENGTHS[settings.strength])
    table = np.empty((rows, columns), dtype=bool)
    for start, stop in growing_blocks(rows):
        if counts is None:
            table[start:stop] = reader.get(BERNOULLI, model.probabilities(stop - start, None)).reshape(-1, columns)
        else:
            block_counts = counts[start:stop]
            open_rows = _open_rows(block_counts, columns)
            table[start:stop] = (block_counts == columns)[:, None]
            bits = reader.get(BERNOULLI, model.probabilities(0, block_counts[open_rows]))
            table[start:stop][open_rows] = bits.reshape(-1, columns)
        model.update(table[start:stop])
    return table.T.reshape(-1) if settings.transposed else table.reshape(-1)


def _open_rows(counts: NDArray[np.int64], columns: int) -> Mask:
    """Return which rows are neither empty nor full: the others need no bits."""
    return (counts > 0) & (counts < columns)
