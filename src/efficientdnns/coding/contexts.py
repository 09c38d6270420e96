"""Coding of symbols that lie in a table, each given the one before it in its row.

Neighbouring weights of a layer are often alike (the pixels of an image, the taps of a kernel). The table is coded
column by column: all symbols of a column at once, each with adaptive frequencies that depend on the class of the last
symbol that was coded in its row. Empty places are skipped, hence the last symbol of a sparse row can lie several
columns back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FileFormatError
from .entropy import (
    SymbolReader,
    SymbolWriter,
    categorical,
    get_choice,
    get_raw,
    get_symbols,
    growing_blocks,
    put_best,
    put_choice,
    put_raw,
    put_symbols,
)
from .positions import Mask, as_table

_CLASSES = (2, 4, 8)
_PRIOR = 0.1  # pseudo-count of every symbol, whatever its context
_BACKOFF = 8.0  # pseudo-count of a context, spread like the symbols of all contexts
_FEWEST = 64  # symbols below which no context is tried


def put_placed_symbols(writer: SymbolWriter, symbols: NDArray[Any], mask: Mask, alphabet: int) -> None:
    """Append integers in 0..alphabet-1, one for every True of ``mask`` in row-major order, with or without contexts.

    The reader must know ``mask``, whose rows are those of the view [first, rest].
    """
    symbols = symbols.astype(np.int32)
    candidates = [SymbolWriter()]
    put_symbols(candidates[0], symbols, alphabet)
    if symbols.size >= _FEWEST and alphabet > 1:
        candidates.append(_write_best_context(symbols, as_table(mask), alphabet))
        put_best(writer, candidates)
    else:
        writer.extend(candidates[0])


def get_placed_symbols(reader: SymbolReader, mask: Mask, alphabet: int) -> NDArray[np.int32]:
    """Read what :func:`put_placed_symbols` wrote, for the same mask."""
    count = int(mask.sum())
    if count < _FEWEST or alphabet < 2 or get_choice(reader, 2) == 0:
        return get_symbols(reader, count, alphabet)
    return _read_with_context(reader, as_table(mask), alphabet)


def _write_best_context(symbols: NDArray[np.int32], table: Mask, alphabet: int) -> SymbolWriter:
    """Estimate the length for both orientations and all numbers of classes, and write with the best of them."""
    best: tuple[float, Any] | None = None
    for transposed in (False, True):
        rows, columns, order = _places(table, transposed)
        ordered = symbols[order]
        previous = _previous(ordered, rows, columns)
        for choice, classes in enumerate(_CLASSES):
            edges = _edges(symbols, alphabet, classes)
            length = _estimate(ordered, _classes_of(edges, alphabet)[previous], alphabet, classes + 1)
            if best is None or length < best[0]:
                best = length, (transposed, choice, edges, ordered, columns, previous)
    assert best is not None  # the loops run at least once
    transposed, choice, edges, ordered, columns, previous = best[1]
    writer = SymbolWriter()
    put_choice(writer, int(transposed) + 2 * choice, 2 * len(_CLASSES))
    put_raw(writer, edges, int(alphabet).bit_length())
    contexts = _classes_of(edges, alphabet)[previous]
    model = _ContextModel(alphabet, _CLASSES[choice] + 1)
    bounds = _column_bounds(columns)
    for first, last in growing_blocks(bounds.size - 1):
        for start, stop in zip(bounds[first:last], bounds[first + 1 : last + 1], strict=True):
            for context in np.unique(contexts[start:stop]):
                writer.put(ordered[start:stop][contexts[start:stop] == context], model.of(context))
        model.update(contexts[bounds[first] : bounds[last]], ordered[bounds[first] : bounds[last]])
    return writer


def _read_with_context(reader: SymbolReader, table: Mask, alphabet: int) -> NDArray[np.int32]:
    number = get_choice(reader, 2 * len(_CLASSES))
    classes = _CLASSES[number >> 1]
    edges = get_raw(reader, classes - 1, int(alphabet).bit_length()).astype(np.int64)
    if (np.diff(edges) < 0).any() or edges.max() > alphabet:
        raise FileFormatError("coded symbols are corrupt: their context classes are not in order")
    rows, columns, order = _places(table, bool(number & 1))
    class_of = _classes_of(edges, alphabet)
    last_symbol = np.zeros(int(rows.max()) + 1, dtype=np.int64)  # 0: none yet, else the symbol + 1
    ordered = np.empty(order.size, dtype=np.int32)
    contexts = np.empty(order.size, dtype=np.int64)
    model = _ContextModel(alphabet, classes + 1)
    bounds = _column_bounds(columns)
    for first, last in growing_blocks(bounds.size - 1):
        for start, stop in zip(bounds[first:last], bounds[first + 1 : last + 1], strict=True):
            contexts[start:stop] = class_of[last_symbol[rows[start:stop]]]
            for context in np.unique(contexts[start:stop]):
                chosen = start + np.flatnonzero(contexts[start:stop] == context)
                ordered[chosen] = reader.get(model.of(context), chosen.size)
            last_symbol[rows[start:stop]] = ordered[start:stop] + 1
        model.update(contexts[bounds[first] : bounds[last]], ordered[bounds[first] : bounds[last]])
    symbols = np.empty_like(ordered)
    symbols[order] = ordered
    return symbols


class _ContextModel:
    """Adaptive frequencies per context; those of all contexts together stand in for what a context has not seen yet."""

    def __init__(self, alphabet: int, contexts: int) -> None:
        self.counts = np.zeros((contexts, alphabet), dtype=np.int64)
        self.models: dict[int, Any] = {}

    def of(self, context: int) -> Any:
        if context not in self.models:
            together = self.counts.sum(axis=0)
            share = _BACKOFF / (int(together.sum()) + _PRIOR * together.size)
            self.models[context] = categorical(self.counts[context] + share * (together + _PRIOR))
        return self.models[context]

    def update(self, contexts: NDArray[np.int64], symbols: NDArray[np.int32]) -> None:
        cells = np.bincount(contexts * self.counts.shape[1] + symbols, minlength=self.counts.size)
        self.counts += cells.reshape(self.counts.shape)
        self.models.clear()


def _places(table: Mask, transposed: bool) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return row, column and row-major number of every True, ordered by columns (of the transposed table, if asked)."""
    rows, columns = np.nonzero(table)
    if transposed:
        return columns, rows, np.arange(rows.size)
    order = np.argsort(columns, kind="stable")
    return rows[order], columns[order], order


def _column_bounds(columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where every column that is not empty starts in the ascending ``columns``, and the end."""
    return np.concatenate([[0], np.flatnonzero(np.diff(columns)) + 1, [columns.size]])


def _previous(ordered: NDArray[np.int32], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for every symbol the one before it in its row, plus 1; 0 for the first of a row."""
    by_row = np.lexsort((columns, rows))
    follows = np.diff(rows[by_row]) == 0
    previous = np.zeros(ordered.size, dtype=np.int64)
    previous[by_row[1:]] = np.where(follows, ordered[by_row[:-1]].astype(np.int64) + 1, 0)
    return previous


def _edges(symbols: NDArray[np.int32], alphabet: int, classes: int) -> NDArray[np.int64]:
    """Return the classes - 1 symbols at which new classes start, so that classes are about equally frequent."""
    cumulative = np.cumsum(np.bincount(symbols, minlength=alphabet))
    return np.searchsorted(cumulative, np.arange(1, classes) * symbols.size / classes) + 1


def _classes_of(edges: NDArray[np.int64], alphabet: int) -> NDArray[np.int64]:
    """Return the class of every symbol plus 1, after class 0 for no symbol: shape [alphabet + 1]."""
    return np.concatenate([[0], np.searchsorted(edges, np.arange(alphabet), side="right") + 1])


def _estimate(symbols: NDArray[np.int32], contexts: NDArray[np.int64], alphabet: int, number: int) -> float:
    """Return the conditional entropy in bits plus half a logarithm for every frequency to learn."""
    cells = np.bincount(contexts * alphabet + symbols, minlength=number * alphabet).reshape(number, alphabet)
    totals = np.broadcast_to(cells.sum(axis=1, keepdims=True), cells.shape)
    used = cells > 0
    entropy = -float((cells[used] * np.log2(cells[used] / totals[used])).sum())
    return entropy + float(np.log2(totals[used] + 1).sum()) / 2
