"""Rules of the operations that have parameters: they make channels (rows), read channels (columns) or scale them
(vectors)."""

from __future__ import annotations

import numpy as np

from efficientdnns.surgery.atoms import Ids, Value
from efficientdnns.surgery.rules import UNREMOVABLE, Call, Result, rule, unknown


def _computed(call: Call, *weights: Value | None) -> bool:
    """Whether a weight is not a parameter itself but the result of a computation, whose rows have no place to be
    removed from."""
    return any(w is not None and w.origin is None for w in weights)


def _vector(call: Call, ids: Ids | None, *vectors: Value | None) -> Ids | None:
    """Per-channel parameters (bias, scale, statistics) belong to the channels they act on."""
    return call.atoms.meet([ids, *[v.dims[0] for v in vectors if v is not None]], call.why(UNREMOVABLE))


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(call: Call) -> Result:
    """Rows make channels, columns read them; the groups of a grouped convolution lose the same positions.

    Weights are (out, in / groups, ...), transposed convolutions (in, out / groups, ...). Where a group has a single
    input channel (depthwise) whole groups go, with all their output channels.
    """
    x: Value = call["input"]
    weight: Value = call["weight"]
    bias: Value | None = call["bias"]
    if _computed(call, weight, bias):
        return unknown(call)
    channel = len(x.shape) - len(weight.shape) + 1
    groups = call["groups"]
    for ids in x.dims[channel + 1 :]:
        call.keep(ids, "positions along this dimension are mixed")
    if "transpose" in call.operation:
        out, read = _transposed_channels(call, x.dims[channel], weight, groups)
    elif groups == 1:
        out, read = _rows(call, weight), weight.dims[1]
        call.atoms.mark(weight, 1, "in")
    elif weight.shape[1] == 1:
        out, read = _depthwise(call, x.dims[channel], weight.dims[0], groups), x.dims[channel]
    else:
        out, read = _grouped(call, weight, groups)
    call.atoms.meet([x.dims[channel], read], call.why(UNREMOVABLE))
    out = _vector(call, out, bias)
    return call.output([*x.dims[:channel], out, *[None] * (len(weight.shape) - 2)])


def _rows(call: Call, weight: Value, dim: int = 0) -> Ids | None:
    call.atoms.mark(weight, dim, "out")
    return weight.dims[dim]


def _depthwise(call: Call, channels: Ids | None, out: Ids | None, groups: int) -> Ids | None:
    assert out is not None
    if channels is None:
        call.atoms.pin(out, call.why(UNREMOVABLE))
    else:
        call.atoms.same(out.reshape(groups, -1), channels[:, None])
    return out


def _grouped(call: Call, weight: Value, groups: int) -> tuple[Ids | None, Ids | None]:
    rows, columns = _rows(call, weight), weight.dims[1]
    assert rows is not None
    assert columns is not None
    call.atoms.mark(weight, 1, "in")
    table = rows.reshape(groups, -1)
    call.atoms.same(table, table[:1])
    return rows, np.tile(columns, groups)


def _transposed_channels(call: Call, channels: Ids | None, weight: Value, groups: int) -> tuple[Ids | None, Ids | None]:
    rows, columns = weight.dims[0], weight.dims[1]
    assert rows is not None
    assert columns is not None
    if groups == 1:
        call.atoms.mark(weight, 0, "in")
        return _rows(call, weight, 1), rows
    if len(rows) == groups:  # depthwise: group i makes the output channels i * len(columns) and following
        call.atoms.pin(columns)
        return np.repeat(rows, len(columns)), rows
    call.atoms.mark(weight, 0, "in")
    table = rows.reshape(groups, -1)
    call.atoms.same(table, table[:1])
    return np.tile(_rows(call, weight, 1), groups), rows  # type: ignore[arg-type]


@rule("linear")
def linear(call: Call) -> Result:
    x: Value = call["input"]
    weight: Value = call["weight"]
    bias: Value | None = call["bias"]
    if _computed(call, weight):
        return unknown(call)
    call.atoms.mark(weight, 1, "in")
    call.atoms.meet([x.dims[-1], weight.dims[1]], call.why(UNREMOVABLE))
    return call.output([*x.dims[:-1], _vector(call, _rows(call, weight), bias)])


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "native_batch_norm")
def batch_norm(call: Call) -> Result:
    """Every channel is normalised by itself."""
    x: Value = call["input"]
    vectors = [call.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    dims = list(x.dims)
    dims[1] = _vector(call, x.dims[1], *vectors)
    results = (call.output(dims), *[Value.untracked(s) for s in call.shapes[1:]])
    return results if call.several else results[0]


@rule("prelu")
def prelu(call: Call) -> Result:
    x: Value = call["self"]
    slope: Value = call["weight"]
    dims = list(x.dims)
    if slope.shape != (1,) and len(dims) > 1:
        dims[1] = _vector(call, dims[1], slope)
    else:
        call.atoms.pin_value(slope)
    return call.output(dims)


@rule("embedding")
def embedding(call: Call) -> Result:
    """Columns of the table are channels; its rows are the vocabulary, which is the input's."""
    table: Value = call["weight"]
    indices: Value = call["indices"]
    if _computed(call, table):
        return unknown(call)
    call.atoms.pin(table.dims[0])
    return call.output([*indices.dims, _rows(call, table, 1)])


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> Result:
    """Hidden unit i owns row i of every gate and column i of what reads it: the recurrence, the next layer, the
    consumer.

    PyTorch's modules have one hidden size for all layers and directions, so unit i is the i-th of each of them.
    """
    gates = {"lstm": 4, "gru": 3}.get(call.operation, 1)
    if "data" in call.arguments:  # a packed sequence
        return unknown(call)
    x: Value = call["input"]
    params: list[Value] = list(call["params"])
    directions = 2 if call["bidirectional"] else 1
    per_cell = len(params) // (call["num_layers"] * directions)
    biases = 2 if call["has_biases"] else 0
    if per_cell != 2 + biases or len(x.shape) != 3 or _computed(call, *params):  # a projection has one weight more
        return unknown(call)
    hidden = params[1].dims[1]
    assert hidden is not None
    read = x.dims[2]
    for start in range(0, len(params), per_cell):
        layer = start // (per_cell * directions)
        source = read if layer == 0 else np.tile(hidden, directions)
        _cell(call, params[start : start + per_cell], hidden, source, gates)
    for state in call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]:
        if state.created_in != call.module:  # the module's own zeros have the module's own hidden size
            call.atoms.meet([hidden, state.dims[-1]], call.why(UNREMOVABLE))
    first, *states = call.shapes
    outputs = Value(first, (*x.dims[:2], np.tile(hidden, directions)))
    return (outputs, *[Value(s, (None, None, hidden)) for s in states])


def _cell(call: Call, params: list[Value], hidden: Ids, source: Ids | None, gates: int) -> None:
    input_weight, hidden_weight = params[:2]
    call.atoms.meet([source, input_weight.dims[1]], call.why(UNREMOVABLE))
    call.atoms.mark(input_weight, 1, "in")
    call.atoms.meet([hidden, hidden_weight.dims[1]])
    call.atoms.mark(hidden_weight, 1, "in")
    for value in params:
        rows = value.dims[0]
        assert rows is not None
        call.atoms.same(rows.reshape(gates, -1), hidden[None, :])
        if len(value.shape) == 2:
            call.atoms.mark(value, 0, "out")
