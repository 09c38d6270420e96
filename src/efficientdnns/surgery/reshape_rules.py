"""Rules of view, reshape and their relatives: dimensions are merged and split.

Merging repeats the atoms of the channel dimension (a channel becomes a block of features). Splitting a channel dimension
asks which piece carries the removable units: of ``view(n, heads, width)`` either the same position of every head can go,
or whole heads. The analysis tries the last piece first and, where something keeps that whole (a product that sums over
it), the one before it.
"""

from __future__ import annotations

from math import prod

import numpy as np

from efficientdnns.surgery.atoms import Ids, Shape, Value
from efficientdnns.surgery.rules import Call, Result, rule

Dimension = tuple[int, Ids | None]


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze", "view_as", "reshape_as")
def reshape(call: Call) -> Result:
    """Merge and split dimensions; each run of dimensions that holds the same elements before and after by itself."""
    value: Value = call.values()[0]
    if value.shape == call.shape:
        return value
    dims: list[Ids | None] = []
    for old, new in segments(value.shape, call.shape):
        dims += _regroup(call, [(value.shape[d], value.dims[d]) for d in old], [call.shape[d] for d in new])
    return call.output(dims)


def segments(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of the two shapes that hold the same number of elements."""
    if 0 in old:
        return [(list(range(len(old))), list(range(len(new))))]
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if j < len(new) and new[j] == 1 and not (i < len(old) and old[i] == 1):
            runs.append(([], [j]))
            j += 1
            continue
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        if left and old[i] == 1 and not (right and new[j] == 1):
            right = []
        i, j = i + len(left), j + len(right)
        while right and prod(old[d] for d in left) != prod(new[d] for d in right):
            if prod(old[d] for d in left) < prod(new[d] for d in right):
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        runs.append((left, right))
    return runs


def factors(old: list[int], new: list[int]) -> list[int] | None:
    """The coarsest sizes from which both lists arise by merging neighbours, or None where there are none."""
    cuts = sorted({int(n) for n in np.cumprod(old, dtype=np.int64)} | {int(n) for n in np.cumprod(new, dtype=np.int64)})
    sizes, before = [], 1
    for cut in cuts:
        if cut % before:
            return None
        sizes.append(cut // before)
        before = cut
    return sizes


def _regroup(call: Call, old: list[Dimension], new: list[int]) -> list[Ids | None]:
    if len(old) == 1 and len(new) == 1:
        return [old[0][1]]
    for size, ids in old:
        if size == 1:
            call.atoms.pin(ids)
    old, slots = [(n, ids) for n, ids in old if n > 1], [j for j, n in enumerate(new) if n > 1]
    result: list[Ids | None] = [None] * len(new)
    if not any(ids is not None for _, ids in old):
        return result
    pieces = factors([n for n, _ in old], [new[j] for j in slots])
    if pieces is None:
        for _, ids in old:
            call.keep(ids, "it merges and splits dimensions at once")
        return result
    fine: list[Dimension] = []
    for size, ids in old:
        own = _taken(pieces, len(fine), size)
        parts = [ids] if len(own) == 1 else [None] * len(own) if ids is None else _split(call, ids, own)
        fine += zip(own, parts, strict=True)
    at = 0
    for j in slots:
        own = _taken(pieces, at, new[j])
        result[j] = _merge(call, fine[at : at + len(own)])
        at += len(own)
    return result


def _taken(pieces: list[int], start: int, size: int) -> list[int]:
    """The pieces from ``start`` whose product is ``size``."""
    end = start + 1
    while prod(pieces[start:end]) < size:
        end += 1
    return pieces[start:end]


def _merge(call: Call, old: list[Dimension]) -> Ids | None:
    if len(old) == 1:
        return old[0][1]
    carriers = [d for d, (_, ids) in enumerate(old) if ids is not None]
    if not carriers:
        return None
    for d in carriers[:-1]:
        call.keep(old[d][1], "it merges two dimensions that both carry channels")
    ids = old[carriers[-1]][1]
    assert ids is not None
    before, after = prod(n for n, _ in old[: carriers[-1]]), prod(n for n, _ in old[carriers[-1] + 1 :])
    return np.tile(np.repeat(ids, after), before)


def _split(call: Call, ids: Ids, sizes: list[int]) -> list[Ids | None]:
    table = ids.reshape(sizes)
    result: list[Ids | None] = [None] * len(sizes)
    for d in range(len(sizes)):  # the way back from a merge: along the other dimensions all is one channel already
        rows = np.moveaxis(table, d, 0).reshape(sizes[d], -1)
        if (rows == rows[:, :1]).all():
            result[d] = rows[:, 0]
            return result
    where = (call.module, tuple(sizes))
    d = len(sizes) - 1 - call.atoms.carriers.get(where, 0)
    rows = np.moveaxis(table, d, 0).reshape(sizes[d], -1)
    call.atoms.same(rows, rows[:, :1])
    result[d] = rows[:, 0]
    call.atoms.splits.setdefault(where, []).append(rows[:, 0])
    return result
