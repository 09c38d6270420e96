"""Rules of the operations that only move channels around: permute, reshape, slice, concatenate, pad, gather."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from efficientdnns.surgery.atoms import Ids, Shape, Value
from efficientdnns.surgery.rules import UNREMOVABLE, Call, Result, axes, rule, unknown


@rule("permute")
def permute(call: Call) -> Result:
    return _permuted(call, axes(call["dims"], len(call["self"].shape)))


@rule("transpose", "swapaxes", "t", "numpy_T", "adjoint")
def transpose(call: Call) -> Result:
    rank = len(call["self"].shape)
    order = list(range(rank))
    first, second = call.get("dim0", call.get("axis0", -2)) % rank, call.get("dim1", call.get("axis1", -1)) % rank
    order[first], order[second] = order[second], order[first]
    return _permuted(call, order)


def _permuted(call: Call, order: list[int]) -> Value:
    value: Value = call["self"]
    origin = (value.origin[0], tuple(value.origin[1][d] for d in order)) if value.origin else None
    return Value(call.shape, tuple(value.dims[d] for d in order), origin)


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze", "view_as", "reshape_as")
def reshape(call: Call) -> Result:
    """Merge and split dimensions.

    Merging repeats the atoms of the channel dimension (a channel becomes a block of features). Splitting a channel
    dimension ties the positions that share the last index, so that the tensor stays a box: view(n, groups, channels //
    groups) removes the same channel of every group.
    """
    value: Value = call.values()[0]
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


def _regroup(call: Call, old: list[tuple[int, Ids | None]], new: list[int]) -> list[Ids | None]:
    if len(old) == 1 and len(new) == 1:
        return [old[0][1]]
    for size, ids in old:
        if size == 1:
            call.atoms.pin(ids)
    old, slots = [(n, ids) for n, ids in old if n > 1], [j for j, n in enumerate(new) if n > 1]
    result: list[Ids | None] = [None] * len(new)
    if not any(ids is not None for _, ids in old):
        return result
    if len(old) > 1 and len(slots) > 1:
        for _, ids in old:
            call.keep(ids, "it merges and splits dimensions at once")
    elif len(slots) == 1:
        result[slots[0]] = _merge(call, old)
    else:
        for j, ids in zip(slots, _split(call, old[0][1], [new[j] for j in slots]), strict=True):
            result[j] = ids
    return result


def _merge(call: Call, old: list[tuple[int, Ids | None]]) -> Ids | None:
    carriers = [d for d, (_, ids) in enumerate(old) if ids is not None]
    for d in carriers[:-1]:
        call.keep(old[d][1], "it merges two dimensions that both carry channels")
    ids = old[carriers[-1]][1]
    assert ids is not None
    before, after = prod(n for n, _ in old[: carriers[-1]]), prod(n for n, _ in old[carriers[-1] + 1 :])
    return np.tile(np.repeat(ids, after), before)


def _split(call: Call, ids: Ids | None, sizes: list[int]) -> list[Ids | None]:
    assert ids is not None
    table = ids.reshape(sizes)
    result: list[Ids | None] = [None] * len(sizes)
    for d in range(
        len(sizes)
    ):  # the way back from a merge: all positions along the other dimensions are one channel already
        rows = np.moveaxis(table, d, 0).reshape(sizes[d], -1)
        if (rows == rows[:, :1]).all():
            result[d] = rows[:, 0]
            return result
    rows = table.reshape(-1, sizes[-1])
    call.atoms.same(rows, rows[:1])
    result[-1] = rows[0]
    return result


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Result:
    """A dimension that is repeated gets free atoms: they follow whatever it is combined with."""
    value: Value = call["self"]
    new = len(call.shape) - len(value.shape)
    dims: list[Ids | None] = []
    for d, size in enumerate(call.shape):
        if d >= new and value.shape[d - new] == size:
            dims.append(value.dims[d - new])
        else:
            if d >= new:
                call.atoms.pin(value.dims[d - new])
            dims.append(call.atoms.fresh(size))
    return call.output(dims)


@rule("repeat", "tile")
def repeat(call: Call) -> Result:
    value: Value = call["self"]
    missing = len(call.shape) - len(value.shape)
    dims = [None] * missing + [
        None if ids is None else np.resize(ids, call.shape[missing + d]) for d, ids in enumerate(value.dims)
    ]
    return call.output(dims)


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Result:
    """Concatenation: removable channels stay removable beside constant ones."""
    values = [v for v in call["tensors"] if v.shape != (0,)]
    at = call["dim"] % len(call.shape)
    dims = [
        None if d == at else call.atoms.meet([v.dims[d] for v in values], call.why(UNREMOVABLE))
        for d in range(len(call.shape))
    ]
    dims[at] = _concatenated(call, [(v.shape[at], v.dims[at]) for v in values])
    return call.output(dims)


def _concatenated(call: Call, pieces: list[tuple[int, Ids | None]]) -> Ids | None:
    if all(ids is None for _, ids in pieces):
        return None
    return np.concatenate([call.atoms.constant(size) if ids is None else ids for size, ids in pieces])


@rule("stack")
def stack(call: Call) -> Result:
    values, at = call["tensors"], call["dim"] % len(call.shape)
    dims = [call.atoms.meet([v.dims[d] for v in values], call.why(UNREMOVABLE)) for d in range(len(call.shape) - 1)]
    return call.output([*dims[:at], None, *dims[at:]])


@rule(
    "pad",
    "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad1d",
    "replication_pad2d",
    "zero_pad2d",
)
def pad(call: Call) -> Result:
    """Constant padding along channels adds positions that stay; the channels between them remain removable."""
    value: Value = call.values()[0]
    widths: Sequence[int] = call.get("pad", call.get("padding"))
    constant = (
        "reflection" not in call.operation
        and "replication" not in call.operation
        and call.get("mode", "constant") == "constant"
    )
    dims = list(value.dims)
    for n in range(len(widths) // 2):
        d, before, after = len(dims) - 1 - n, widths[2 * n], widths[2 * n + 1]
        if before == after == 0:
            continue
        if constant and before >= 0 and after >= 0:
            dims[d] = _concatenated(call, [(before, None), (value.shape[d], value.dims[d]), (after, None)])
        else:
            call.keep(value.dims[d], "it crops or mirrors the channels")
            dims[d] = None
    return call.output(dims)


@rule("slice", "narrow")
def slices(call: Call) -> Result:
    """A slice of equal pieces ties the pieces (as chunk does); any other slice has channel numbers written in the
    code."""
    value: Value = call["self"]
    d = (call.get("dim") or 0) % len(value.shape)
    total, length = value.shape[d], call.shape[d]
    start = call.get("start") or 0
    start = max(start + total, 0) if start < 0 else start
    dims, ids = list(value.dims), value.dims[d]
    if ids is not None and length != total:
        equal_pieces = length > 1 and total % length == 0 and start % length == 0 and call.get("step", 1) == 1
        dims[d] = _pieces(call, ids, [length] * (total // length))[start // length] if equal_pieces else None
        if not equal_pieces:
            call.keep(ids, "the numbers of its channels are written in the code")
    return call.output(dims)


def _pieces(call: Call, ids: Ids, sizes: list[int]) -> list[Ids | None]:
    """Cut a channel dimension; equal pieces lose the same positions so that they stay equal."""
    if len(set(sizes)) > 1:
        call.keep(ids, "it cuts the channels into unequal pieces whose sizes are written in the code")
        return [None] * len(sizes)
    table = ids.reshape(len(sizes), -1)
    call.atoms.same(table, table[:1])
    return list(table)


@rule("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split")
def chunk(call: Call) -> Result:
    value: Value = call["self"]
    d = call.get("dim", 0) % len(value.shape)
    ids = value.dims[d]
    sizes = [shape[d] for shape in call.shapes]
    pieces: list[Ids | None] = [None] * len(sizes) if ids is None else _pieces(call, ids, sizes)
    others = list(value.dims)
    return tuple(Value(s, (*others[:d], p, *others[d + 1 :])) for s, p in zip(call.shapes, pieces, strict=True))


@rule("select", "unbind")
def select(call: Call) -> Result:
    value: Value = call["self"]
    d = call.get("dim", 0) % len(value.shape)
    call.keep(value.dims[d], "the number of its channel is written in the code")
    dims = (*value.dims[:d], *value.dims[d + 1 :])
    results = tuple(Value(shape, dims) for shape in call.shapes)
    return results if call.several else results[0]


@rule("index_select")
def index_select(call: Call) -> Result:
    return _gather(call, call["self"], call["dim"], call["index"])


@rule("index")
def index(call: Call) -> Result:
    """``x[:, buffer]`` along one dimension is index_select; other indexing keeps its channels."""
    given = [(d, i) for d, i in enumerate(call["indices"]) if i is not None]
    if len(given) == 1 and len(given[0][1].shape) == 1:
        return _gather(call, call["self"], *given[0])
    return unknown(call)


def _gather(call: Call, value: Value, dim: int, index: Value) -> Result:
    """Pick channels by a constant integer buffer: entries that point to a removed channel go, the others are
    renumbered.

    An entry that points to a channel which always stays (padding, a network input) can be dropped by itself.
    """
    d = dim % len(value.shape)
    ids, rest = value.dims[d], (value.dims[:d], value.dims[d + 1 :])
    entries = index.dims[0]
    numbers = call.tensors[index.origin[0]] if index.origin else None
    if entries is None or index.origin is None or numbers is None or numbers.dtype not in (torch.int64, torch.int32):
        call.keep(ids, "the numbers of its channels are not an integer buffer of the model")
        return call.output([*rest[0], None, *rest[1]])
    ids = call.atoms.constant(value.shape[d]) if ids is None else ids
    known = call.atoms.gathers.setdefault(index.origin[0], ids)
    if known is not ids and not np.array_equal(known, ids):
        for whole in (known, ids, entries):
            call.keep(whole, "one index buffer reads from two different places")
    source = ids[numbers.cpu().numpy() % len(ids)]
    tied = np.array([atom not in call.atoms.constants for atom in source.tolist()], dtype=bool)
    call.atoms.same(entries[tied], source[tied])
    return call.output([*rest[0], entries, *rest[1]])


@rule("glu")
def glu(call: Call) -> Result:
    """One half gates the other: both lose the same positions."""
    value: Value = call["self"]
    d = call["dim"] % len(value.shape)
    ids, dims = value.dims[d], list(value.dims)
    if ids is not None:
        dims[d] = _pieces(call, ids, [len(ids) // 2] * 2)[0]
    return call.output(dims)


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Result:
    """Each block of r*r channels becomes one channel."""
    value: Value = call["self"]
    *batch, channels, height, width = value.dims
    for ids in (height, width):
        call.keep(ids, "positions along this dimension are mixed")
    if channels is not None:
        table = channels.reshape(call.shape[-3], -1)
        call.atoms.same(table, table[:, :1])
        channels = table[:, 0]
    return call.output([*batch, channels, None, None])
