"""Rules of the operations that only move channels around: permute, reshape, slice, concatenate, pad, gather."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from efficientdnns.surgery import block_rules  # noqa: F401  (it registers its rules)
from efficientdnns.surgery.atoms import Ids, Value
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


@rule("movedim", "moveaxis")
def movedim(call: Call) -> Result:
    rank = len(call["self"].shape)
    moved, places = axes(call["source"], rank), axes(call["destination"], rank)
    rest = iter(d for d in range(rank) if d not in moved)
    return _permuted(call, [moved[places.index(d)] if d in places else next(rest) for d in range(rank)])


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
    """A slice of equal pieces ties the pieces (as chunk does); any other slice passes the channels that it picks."""
    value: Value = call["self"]
    d = (call.get("dim") or 0) % len(value.shape)
    total, length = value.shape[d], call.shape[d]
    start, step = call.get("start") or 0, call.get("step") or 1
    start = max(start + total, 0) if start < 0 else start
    dims, ids = list(value.dims), value.dims[d]
    if ids is not None and length != total:
        if length > 1 and total % length == 0 and start % length == 0 and step == 1:
            dims[d] = _pieces(call, ids, [length] * (total // length))[start // length]
        elif step == 1 and length > 0:
            dims[d] = ids[start : start + length]
        else:
            call.keep(ids, "the numbers of its channels are written in the code")
            dims[d] = None
    return Value(call.shape, tuple(dims), value.origin)


def _pieces(call: Call, ids: Ids, sizes: list[int]) -> list[Ids | None]:
    """Cut a channel dimension: equal pieces lose the same positions so that they stay equal, pieces whose sizes are
    listed in the code lose their own."""
    if len(set(sizes)) == 1:
        table = ids.reshape(len(sizes), -1)
        call.atoms.same(table, table[:1])
        return list(table)
    if call.operation != "split_with_sizes":
        call.keep(ids, "it cuts the channels into unequal pieces")
        return [None] * len(sizes)
    return list(np.split(ids, np.cumsum(sizes)[:-1]))


@rule("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split")
def chunk(call: Call) -> Result:
    value: Value = call["self"]
    d = call.get("dim", 0) % len(value.shape)
    ids = value.dims[d]
    sizes = [shape[d] for shape in call.shapes]
    pieces: list[Ids | None] = [None] * len(sizes) if ids is None else _pieces(call, ids, sizes)
    others = list(value.dims)
    return tuple(
        Value(s, (*others[:d], p, *others[d + 1 :]), value.origin) for s, p in zip(call.shapes, pieces, strict=True)
    )


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
    """``x[:, buffer]`` along one dimension is index_select; otherwise the dimensions that are not indexed pass."""
    value: Value = call["self"]
    given = [(d, i) for d, i in enumerate(call["indices"]) if i is not None]
    if len(given) == 1 and len(given[0][1].shape) == 1:
        return _gather(call, value, *given[0])
    places = [d for d, _ in given]
    shape = np.broadcast_shapes(*(i.shape for _, i in given))
    at = places[0] if places == list(range(places[0], places[-1] + 1)) else 0  # indices apart from each other go first
    rest: list[tuple[int, Ids | None]] = [(n, value.dims[d]) for d, n in enumerate(value.shape) if d not in places]
    result = [*rest[:at], *[(n, None) for n in shape], *rest[at:]]
    if tuple(n for n, _ in result) != call.shape:  # a mask
        return unknown(call)
    for d in places:
        call.keep(value.dims[d], "the numbers of its channels are not an integer buffer of the model")
    for _, indices in given:
        call.atoms.pin_value(indices)
    return call.output([ids for _, ids in result])


@rule("gather")
def gather(call: Call) -> Result:
    """Positions along ``dim`` are picked by number; the other dimensions lie on those of the index."""
    value: Value = call["self"]
    picked: Value = call["index"]
    d = call["dim"] % len(value.shape)
    call.keep(value.dims[d], "the numbers of its channels are not an integer buffer of the model")
    if any(n != value.shape[at] for at, n in enumerate(call.shape) if at != d):
        return unknown(call)
    pairs = zip(value.dims, picked.dims)
    return call.output(
        [one if at == d else call.atoms.meet([ids, one], call.why(UNREMOVABLE)) for at, (ids, one) in enumerate(pairs)]
    )


def _gather(call: Call, value: Value, dim: int, index: Value) -> Result:
    """Pick channels by a constant integer buffer: entries that point to a removed channel go, the others are
    renumbered.

    An entry that points to a channel which always stays (padding, a network input) can be dropped by itself.
    """
    d = dim % len(value.shape)
    ids, rest = value.dims[d], (value.dims[:d], value.dims[d + 1 :])
    entries = index.dims[0]
    numbers = call.tensors[index.origin[0]] if index.origin else None
    integers = numbers is not None and numbers.dtype in (torch.int64, torch.int32) and numbers.shape == index.shape
    if entries is None or index.origin is None or numbers is None or not integers:
        call.keep(ids, "the numbers of its channels are not an integer buffer of the model")
        return call.output([*rest[0], None, *rest[1]])
    ids = call.atoms.constant(value.shape[d]) if ids is None else ids
    known = call.atoms.gathers.setdefault(index.origin[0], ids)
    if known is not ids and not np.array_equal(known, ids):
        for kept in (known, ids, entries):
            call.keep(kept, "one index buffer reads from two different places")
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
