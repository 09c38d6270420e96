"""What a network computes without some of its channels, by the recorded graph: removal is measured against it.

The graph runs operation by operation at its full width, in float64. Nothing reads a removed channel: its columns in
every layer that reads it are zero, and it takes no part in statistics over channels (layer norm, means). One layer's
tensors at a time are widened, so little memory is needed beside the activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from efficientdnns.surgery.atoms import Value
from efficientdnns.surgery.graph import ChannelGraph
from efficientdnns.surgery.mixing_rules import STATISTICS
from efficientdnns.surgery.resize import RESIZERS, Sizes, named_arguments
from efficientdnns.surgery.trace import operation, tensors_of

Plan = Mapping[str, Tensor]


def reference_outputs(
    model: nn.Module,
    plan: Plan,
    graph: ChannelGraph,
    example: Sequence[Any] | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> list[Tensor]:
    """The outputs of ``model`` with the contributions of the units of ``plan`` zeroed.

    Args:
        model: The traced network; it is not changed.
        plan: Group name -> units.
        graph: Its channel graph, traced by export.
        example: Positional inputs; by default those of the traced run.
        dtype: Floating-point numbers are computed in it, also where operations name another type; None leaves them as
            they are.

    Returns:
        The output tensors, flattened.
    """
    assert graph.exported is not None
    run = _Run(model, plan, graph, dtype)
    with torch.no_grad():
        return run.outputs(graph.example if example is None else example)


class _Run:
    def __init__(self, model: nn.Module, plan: Plan, graph: ChannelGraph, dtype: torch.dtype | None) -> None:
        assert graph.exported is not None
        self.program, self.dtype = graph.exported, dtype
        self.sizes = Sizes(graph, plan)
        self.tensors = tensors_of(model)
        self.zeroed: dict[str, list[tuple[int, Tensor]]] = {}
        for name, units in plan.items():
            for member in graph.group(name).members:
                if member.role == "in":
                    self.zeroed.setdefault(member.tensor, []).append((member.dim, member.index[units].reshape(-1)))

    def outputs(self, example: Sequence[Any]) -> list[Tensor]:
        given = iter([self._wide(x) for x in tree_leaves(example)])
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        canonical = {id(t): n for n, t in reversed(list(self.tensors.items()))}
        values: dict[Node, Any] = {}
        last = {source: node for node in self.program.graph.nodes for source in node.all_input_nodes}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                if spec.kind is InputKind.USER_INPUT:
                    values[node] = next(given)
                elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                    values[node] = _Lazy(canonical[id(self.tensors[str(spec.target)])])
                else:
                    values[node] = self._wide(self.program.constants[str(spec.target)])
            elif node.op == "call_function":
                values[node] = self._call(node, values)
            elif node.op == "output":
                found = tree_leaves(torch.fx.node.map_arg(node.args, lambda n: self._read(values[n])))
                return [x for x in found if isinstance(x, Tensor)]
            for source in node.all_input_nodes:
                if last[source] is node and source.op != "placeholder":
                    values.pop(source, None)
        return []

    def _read(self, value: Any) -> Any:
        if not isinstance(value, _Lazy):
            return value
        tensor = self._wide(self.tensors[value.name])
        for dim, positions in self.zeroed.get(value.name, ()):
            tensor = tensor.index_fill(dim, positions.to(tensor.device), 0.0)
        return tensor

    def _wide(self, x: Any) -> Any:
        return x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() and self.dtype else x

    def _call(self, node: Node, values: dict[Node, Any]) -> Any:
        read = {source: self._read(values[source]) for source in node.all_input_nodes}
        floats = [x for x in read.values() if isinstance(x, Tensor) and x.is_floating_point()]
        if any(x.dtype == self.dtype for x in floats):  # the code would have brought the others to that type too
            read = {source: self._wide(x) for source, x in read.items()}
        if operation(node) in STATISTICS and any(
            self.sizes.changed(v) for source in node.all_input_nodes for v in self.sizes.values(source)
        ):
            return self._narrow(node, read)
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: read[n])
        return node.target(*self._dtypes(args), **self._dtypes(kwargs))  # type: ignore[operator]

    def _dtypes(self, arguments: Any) -> Any:
        """Casts written in the code are to the precision of this run."""
        wide = self.dtype
        return torch.fx.node.map_aggregate(
            arguments, lambda x: wide if wide and isinstance(x, torch.dtype) and x.is_floating_point else x
        )

    def _narrow(self, node: Node, read: dict[Node, Any]) -> Any:
        """Run a statistic on the channels that are left; its results get zeros in the places of the others."""
        for source in node.all_input_nodes:
            for value in self.sizes.values(source):
                for dim in self.sizes.changed(value):
                    kept = torch.from_numpy(self.sizes.kept(value.dims[dim])).nonzero().flatten()  # type: ignore[arg-type]
                    read[source] = read[source].index_select(dim, kept.to(read[source].device))
        arguments = named_arguments(node)
        arguments = {n: list(v) if isinstance(v, (list, tuple)) else v for n, v in arguments.items()}
        if operation(node) in RESIZERS:
            RESIZERS[operation(node)](self.sizes, node, arguments)
        arguments = torch.fx.node.map_arg(arguments, lambda n: read[n])
        result = node.target(**self._dtypes(arguments))  # type: ignore[operator]
        known = self.sizes.values(node)
        if isinstance(result, tuple):
            return tuple(self._widened(r, v) for r, v in zip(result, known, strict=True))
        return self._widened(result, known[0])

    def _widened(self, narrow: Tensor, value: Value) -> Tensor:
        for dim in self.sizes.changed(value):
            kept = torch.from_numpy(self.sizes.kept(value.dims[dim])).to(narrow.device)  # type: ignore[arg-type]
            shape = list(narrow.shape)
            shape[dim] = len(kept)
            narrow = narrow.new_zeros(shape).index_copy(dim, kept.nonzero().flatten(), narrow)
        return narrow


class _Lazy:
    """A parameter that is read when an operation needs it."""

    def __init__(self, name: str) -> None:
        self.name = name
