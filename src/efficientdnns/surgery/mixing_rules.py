"""Rules of operations in which channels meet: norms and other statistics over them, products, attention.

A channel that is removed takes no part in a statistic: mean, variance and norm are those of the channels that are left.
That is what the narrower layer computes, and what removal is measured against
(:mod:`~efficientdnns.surgery.reference`).
"""

from __future__ import annotations

import numpy as np

from efficientdnns.surgery.atoms import Ids, Value
from efficientdnns.surgery.rules import UNREMOVABLE, Call, Result, axes, overlay, pointwise, rule, unknown


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Result:
    """The normalised dimensions pass; weight and bias belong to their channels."""
    x: Value = call["input"]
    kept = len(x.shape) - len(call["normalized_shape"])
    vectors = [v for v in (call.get("weight"), call.get("bias")) if v is not None]
    dims = list(x.dims)
    for d in range(kept, len(dims)):
        dims[d] = call.atoms.meet([dims[d], *[v.dims[d - kept] for v in vectors]], call.why(UNREMOVABLE))
        _counted(call, dims[d])
    results = tuple(
        Value(s, tuple(dims) if s == x.shape else (*x.dims[:kept], *[None] * (len(s) - kept))) for s in call.shapes
    )
    return results if call.several else results[0]


@rule("group_norm")
def group_norm(call: Call) -> Result:
    """The groups lose the same positions, so that they stay of equal size."""
    x: Value = call["input"]
    vectors = [v for v in (call["weight"], call["bias"]) if v is not None]
    channels = call.atoms.meet([x.dims[1], *[v.dims[0] for v in vectors]], call.why(UNREMOVABLE))
    if channels is not None:
        rows = channels.reshape(call["num_groups"], -1)
        call.atoms.same(rows, rows[:1])
        _counted(call, channels)
    for ids in x.dims[2:]:
        call.keep(ids, "it normalises over this dimension")
    return call.output([x.dims[0], channels, *[None] * (len(x.dims) - 2)])


@rule(
    *("mean", "sum", "amax", "amin", "prod", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "any", "all"),
    *("var_mean", "std_mean", "aminmax", "count_nonzero", "nansum", "nanmean"),
    *("argmax", "argmin", "max", "min", "median", "mode", "kthvalue"),
)
def reduction(call: Call) -> Result:
    """Over the reduced dimensions a statistic of the channels that are there; the others pass."""
    value: Value = call.values()[0]
    if isinstance(call.get("other"), Value):  # the larger of two tensors
        return pointwise(call)
    gone = axes(call.get("dim"), len(value.shape))
    for d in gone:
        if call.operation in STATISTICS:
            _counted(call, value.dims[d])
        else:
            call.keep(value.dims[d], "it gives the numbers of channels")
    dims = [None if d in gone else ids for d, ids in enumerate(value.dims)]
    if not call.get("keepdim", False):
        dims = [ids for d, ids in enumerate(dims) if d not in gone]
    results = tuple(Value(shape, tuple(dims)) for shape in call.shapes)
    return results if call.several else results[0]


STATISTICS = frozenset(
    (
        *("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm"),
        *("mean", "sum", "amax", "amin", "prod", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "any", "all"),
        *("var_mean", "std_mean", "aminmax", "count_nonzero", "nansum", "nanmean"),
    )
)
"""Operations that are carried out on the channels that are left."""


def _counted(call: Call, ids: Ids | None) -> None:
    if ids is not None:
        call.atoms.statistics.append(np.asarray(ids).ravel())


@rule("matmul", "mm", "bmm", "addmm", "mv", "baddbmm")
def matmul(call: Call) -> Result:
    """A product with a parameter is a linear layer; between two activations the summed channels stay whole."""
    first, second = _factors(call)
    if min(len(first.shape), len(second.shape)) < 2:
        return unknown(call)
    if first.origin or second.origin:
        call.atoms.mark(first, -1, "in")
        call.atoms.mark(second, -2, "in")
        call.atoms.meet([first.dims[-1], second.dims[-2]], call.why(UNREMOVABLE))
        call.atoms.mark(second, -1, "out")
        call.atoms.mark(first, -2, "out")
    else:
        for ids in (first.dims[-1], second.dims[-2]):
            call.keep(ids, "it sums over the channels of two activations")
    batch = overlay(call, [(v.shape[:-2], v.dims[:-2]) for v in (first, second)], call.shape[:-2])
    last = second.dims[-1]
    bias = call["self"] if call.operation == "addmm" else None
    if bias is not None and bias.shape[-1] == call.shape[-1]:
        last = call.atoms.meet([last, bias.dims[-1]], call.why(UNREMOVABLE))
    return call.output([*batch, first.dims[-2], last])


def _factors(call: Call) -> tuple[Value, Value]:
    for names in (("mat1", "mat2"), ("batch1", "batch2")):
        if names[0] in call.arguments:
            return call[names[0]], call[names[1]]
    first, second = call.values()[:2]
    return first, second


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Result:
    r""":math:`\mathrm{softmax}(q k^T / \sqrt{d}) v` over (..., heads, positions, width): whole heads can go.

    The width of a head stays: scores are sums over it, scaled by its size.
    """
    query, key, value = call["query"], call["key"], call["value"]
    for part in (query, key, value):
        call.keep(part.dims[-1], "it is the width of an attention head")
        call.keep(part.dims[-2], "attention mixes positions")
    batch = [v.dims[:-2] for v in (query, key, value)]
    mask = call.get("attn_mask")
    operands = [(v.shape[:-2], d) for v, d in zip((query, key, value), batch, strict=True)]
    if mask is not None:
        for ids in mask.dims[-2:]:
            call.keep(ids, "attention mixes positions")
        operands.append((mask.shape[:-2], mask.dims[:-2]))
    if call.get("enable_gqa", False):
        operands = _grouped_queries(call, operands)
    return call.output([*overlay(call, operands, call.shape[:-2]), query.dims[-2], value.dims[-1]])


def _grouped_queries(call: Call, operands: list[tuple[tuple[int, ...], tuple[Ids | None, ...]]]) -> list:
    """Key and value heads serve several query heads each: they go together."""
    heads = operands[0][0][-1]
    wide = []
    for shape, dims in operands:
        times = heads // shape[-1]
        ids = dims[-1]
        wide.append(((*shape[:-1], heads), (*dims[:-1], None if ids is None else np.repeat(ids, times))))
    return wide
