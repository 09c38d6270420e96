"""Sizes that are written into operations (``view(n, 12, 64)``), as they must be when channels are gone.

:class:`Sizes` says how large every dimension of every tensor of the traced graph is after a removal; :func:`resized`
gives an operation's arguments for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from efficientdnns.surgery.atoms import Ids, Value
from efficientdnns.surgery.graph import ChannelGraph
from efficientdnns.surgery.trace import operation


@dataclass(frozen=True)
class Ratio:
    """A size that is computed in the graph, times ``new / old`` (exactly)."""

    node: Node
    new: int
    old: int


class Sizes:
    """The traced graph after a removal.

    Args:
        graph: The channel graph.
        plan: Group name -> units that are removed.
    """

    def __init__(self, graph: ChannelGraph, plan: Mapping[str, torch.Tensor]) -> None:
        self.graph = graph
        removed = [graph.group(name).units[units.numpy()] for name, units in plan.items()]
        self.gone = np.zeros(int(graph.unit_of.max(initial=-1)) + 1, dtype=bool)
        self.gone[np.concatenate(removed or [np.empty(0, np.int64)])] = True

    def kept(self, ids: Ids) -> NDArray[np.bool_]:
        """Which positions of a dimension stay."""
        return ~self.gone[self.graph.unit_of[ids]]

    def values(self, node: Any) -> tuple[Value, ...]:
        """What is known of a node's results; empty for numbers."""
        known = self.graph.values.get(node) if isinstance(node, Node) else None
        return known if isinstance(known, tuple) else (known,) if isinstance(known, Value) else ()

    def size(self, value: Value, dim: int) -> int:
        """New size of a dimension."""
        ids = value.dims[dim]
        return value.shape[dim] if ids is None else int(self.kept(ids).sum())

    def shape(self, value: Value) -> tuple[int, ...]:
        """New shape."""
        return tuple(self.size(value, d) for d in range(len(value.shape)))

    def changed(self, value: Value) -> list[int]:
        """Dimensions that get smaller."""
        return [d for d in range(len(value.shape)) if self.size(value, d) != value.shape[d]]


Arguments = dict[str, Any]
Resizer = Callable[[Sizes, Node, Arguments], None]
RESIZERS: dict[str, Resizer] = {}


def resizer(*operations: str) -> Callable[[Resizer], Resizer]:
    """Register the function that adapts the arguments of these operations in place."""

    def register(function: Resizer) -> Resizer:
        RESIZERS.update(dict.fromkeys(operations, function))
        return function

    return register


def named_arguments(node: Node) -> Arguments:
    """Arguments of an operator call by schema name, without defaults."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    schema = target._schema.arguments
    return {a.name: value for a, value in zip(schema, node.args, strict=False)} | dict(node.kwargs)


def resized(sizes: Sizes, node: Node) -> Arguments | None:
    """New arguments of a node in whose arguments a size is written that changes; None where nothing changes."""
    function = RESIZERS.get(operation(node)) if isinstance(node.target, torch._ops.OpOverload) else None
    if function is None:
        return None
    involved = [v for n in (node, *node.all_input_nodes) for v in sizes.values(n)]
    if not any(sizes.changed(value) for value in involved):
        return None
    before = named_arguments(node)
    after = {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in before.items()}
    function(sizes, node, after)
    same = {n: list(v) if isinstance(v, (list, tuple)) else v for n, v in before.items()} == after
    return None if same else after


def _new_sizes(sizes: Sizes, written: list[Any], value: Value, first: int = 0) -> list[Any]:
    """A size list whose entries stand for the dimensions of ``value`` from ``first`` on."""
    new = list(written)
    for n, entry in enumerate(written):
        old, size = value.shape[first + n], sizes.size(value, first + n)
        if size == old or (isinstance(entry, int) and entry == -1):
            continue
        new[n] = Ratio(entry, size, old) if isinstance(entry, Node) else size
    return new


@resizer("view", "reshape", "_unsafe_view", "expand", "broadcast_to")
def _written(sizes: Sizes, node: Node, arguments: Arguments) -> None:
    name = "size" if "size" in arguments else "shape"
    arguments[name] = _new_sizes(sizes, arguments[name], sizes.values(node)[0])


@resizer("unflatten")
def _unflatten(sizes: Sizes, node: Node, arguments: Arguments) -> None:
    source = sizes.values(arguments["self"])[0]
    dim = arguments["dim"] % len(source.shape)
    arguments["sizes"] = _new_sizes(sizes, arguments["sizes"], sizes.values(node)[0], dim)


@resizer("split_with_sizes", "unsafe_split_with_sizes")
def _split_with_sizes(sizes: Sizes, node: Node, arguments: Arguments) -> None:
    pieces = sizes.values(node)
    dim = arguments.get("dim", 0) % len(pieces[0].shape)
    arguments["split_sizes"] = [sizes.size(piece, dim) for piece in pieces]


@resizer("split", "unsafe_split")
def _split(sizes: Sizes, node: Node, arguments: Arguments) -> None:
    pieces = sizes.values(node)
    dim = arguments.get("dim", 0) % len(pieces[0].shape)
    if isinstance(arguments["split_size"], list):
        arguments["split_size"] = [sizes.size(piece, dim) for piece in pieces]
    else:
        arguments["split_size"] = sizes.size(pieces[0], dim)


def _position(sizes: Sizes, value: Value, dim: int, position: Any) -> Any:
    """Where a position written in the code lies after the removal."""
    ids = value.dims[dim]
    if ids is None or not isinstance(position, int):
        return position
    total = len(ids)
    position = max(position + total, 0) if position < 0 else min(position, total)
    return int(sizes.kept(ids[:position]).sum())


@resizer("slice", "narrow", "select")
def _slice(sizes: Sizes, node: Node, arguments: Arguments) -> None:
    value = sizes.values(arguments["self"])[0]
    dim = (arguments.get("dim") or 0) % len(value.shape)
    if not sizes.size(value, dim) < value.shape[dim]:
        return
    if "length" in arguments:
        arguments["length"] = sizes.size(sizes.values(node)[0], dim)
    for name in ("start", "end", "index"):
        if arguments.get(name) is not None and not (name == "end" and arguments[name] > value.shape[dim]):
            arguments[name] = _position(sizes, value, dim, arguments[name])


@resizer("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(sizes: Sizes, node: Node, arguments: Arguments) -> None:
    shape = sizes.shape(sizes.values(arguments["input"])[0])
    arguments["normalized_shape"] = list(shape[len(shape) - len(arguments["normalized_shape"]) :])


@resizer("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _depthwise(sizes: Sizes, node: Node, arguments: Arguments) -> None:
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    value = sizes.values(arguments["input"])[0]
    channel = len(value.shape) - len(sizes.values(arguments["weight"])[0].shape) + 1
    if groups == value.shape[channel] and groups != 1:
        arguments["groups"] = sizes.size(value, channel)
