"""Rules of the operations that turn channels into blocks of channels and back, deal them out, or cut windows."""

from __future__ import annotations

import numpy as np

from efficientdnns.surgery.atoms import Value
from efficientdnns.surgery.rules import Call, Result, rule, unknown


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Result:
    """Every position along ``dim`` becomes ``repeats`` neighbours."""
    value: Value = call["self"]
    if call.get("dim") is None or not isinstance(call.get("repeats"), int):
        return unknown(call)
    d = call["dim"] % len(value.shape)
    dims = list(value.dims)
    if dims[d] is not None:
        dims[d] = np.repeat(dims[d], call["repeats"])
    return call.output(dims)


@rule("pixel_shuffle", "col2im")
def blocks_to_channels(call: Call) -> Result:
    """Each block of channels becomes one channel: r*r of them in pixel_shuffle, one per position of the kernel in
    fold."""
    value: Value = call["self"]
    at = -2 if call.operation == "col2im" else -3
    channels = value.dims[at]
    for ids in value.dims[len(value.dims) + at + 1 :]:
        call.keep(ids, "positions along this dimension are mixed")
    if channels is not None:
        table = channels.reshape(call.shape[-3], -1)
        call.atoms.same(table, table[:, :1])
        channels = table[:, 0]
    return call.output([*value.dims[: len(value.dims) + at], channels, None, None])


@rule("pixel_unshuffle", "im2col")
def channels_to_blocks(call: Call) -> Result:
    """Each channel becomes a block of channels: r*r of them in pixel_unshuffle, one per position of the kernel in
    unfold."""
    *batch, channels, height, width = call["self"].dims
    for ids in (height, width):
        call.keep(ids, "positions along this dimension are mixed")
    if channels is not None:
        at = -2 if call.operation == "im2col" else -3
        channels = np.repeat(channels, call.shape[at] // len(channels))
    rest = len(call.shape) - len(batch) - 1
    return call.output([*batch, channels, *[None] * rest])


@rule("unfold")
def windows(call: Call) -> Result:
    """Sliding windows along one dimension; their positions make a new last dimension."""
    value: Value = call["self"]
    dims, d = list(value.dims), call["dimension"] % len(value.shape)
    call.keep(dims[d], "positions along this dimension are mixed")
    dims[d] = None
    return call.output([*dims, None])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Result:
    """Groups of channels are dealt out one by one; every group loses the same positions."""
    value: Value = call["self"]
    dims, ids = list(value.dims), value.dims[1]
    if ids is not None:
        table = ids.reshape(call["groups"], -1)
        call.atoms.same(table, table[:1])
        dims[1] = table.T.ravel()
    return call.output(dims)


@rule("diagonal", "tril", "triu")
def triangles(call: Call) -> Result:
    """Two dimensions whose positions belong together by number stay whole."""
    value: Value = call["self"]
    pair = [call.get("dim1", -2) % len(value.shape), call.get("dim2", -1) % len(value.shape)]
    for d in pair:
        call.keep(value.dims[d], "the numbers of its channels are written in the code")
    rest = [ids for d, ids in enumerate(value.dims) if d not in pair]
    if call.operation == "diagonal":
        return call.output([*rest, None])
    return call.output([None if d in pair else ids for d, ids in enumerate(value.dims)])
