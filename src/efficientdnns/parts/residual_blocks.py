"""Residual branches: finding what is added to a shortcut, and taking it away so that the shortcut alone is left."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from efficientdnns.errors import SurgeryError
from efficientdnns.surgery import ChannelGraph, Node, replace_module
from efficientdnns.surgery.recorded import RecordedForward, play
from efficientdnns.surgery.recorder import Unrecordable, record, signatures
from efficientdnns.surgery.resize import Sizes


@dataclass(frozen=True)
class Branch:
    """A branch that is added to a shortcut.

    Attributes:
        name: the module whose code adds, with ``#2``, ``#3`` where it does so again (a transformer layer).
        block: path of that module.
        last: the layer or batch norm that makes the branch's output; scaling its weight and bias scales the branch.
        layers: everything with parameters that only the branch uses.
        add: the addition.
        output: what the branch adds.
        shortcut: what it is added to.
    """

    name: str
    block: str
    last: str
    layers: tuple[str, ...]
    add: str
    output: str
    shortcut: str


def residual_branches(model: nn.Module, graph: ChannelGraph) -> list[Branch]:
    """The branches of all residual blocks whose last layer is a convolution, a linear layer or a batch norm.

    Where two paths leave one tensor and are added again, the branch is the one with more layers. Only branches whose
    last layer is called once and feeds nothing but the sum are found.
    """
    nodes = {node.name: node for node in graph.nodes}
    readers: dict[str, int] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    ancestors = {"": frozenset[str]()}
    for node in graph.nodes:
        ancestors[node.name] = frozenset(node.inputs).union(*(ancestors.get(name, frozenset()) for name in node.inputs))
    found: list[Branch] = []
    times: dict[str, int] = {}
    for node in graph.nodes:
        if node.operation not in ("add", "add_") or len(node.inputs) != 2:
            continue
        paths = [ancestors.get(name, frozenset()) | {name} for name in node.inputs]
        own = [[nodes[n] for n in path - other if n in nodes] for path, other in (paths, paths[::-1])]
        layers = [sorted({n.module for n in side if n.parameters}) for side in own]
        deep = 0 if len(layers[0]) > len(layers[1]) else 1
        output = nodes.get(node.inputs[deep])
        if output is None or not paths[0] & paths[1] or not _scalable(model, graph, output, readers):
            continue
        times[node.module] = times.get(node.module, 0) + 1
        name = node.module if times[node.module] == 1 else f"{node.module}#{times[node.module]}"
        found.append(
            Branch(name, node.module, output.module, tuple(layers[deep]), node.name, output.name, node.inputs[1 - deep])
        )
    return found


def _scalable(model: nn.Module, graph: ChannelGraph, node: Node, readers: Mapping[str, int]) -> bool:
    module = model.get_submodule(node.module)
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    return (
        isinstance(module, kinds)
        and module.weight is not None
        and readers.get(node.name) == 1
        and sum(n.module == node.module for n in graph.nodes) == 1
    )


@torch.no_grad()
def scale_branch(model: nn.Module, branch: Branch, scale: float) -> None:
    """Fold a factor on the branch's output into its last layer."""
    layer: Any = model.get_submodule(branch.last)
    layer.weight.mul_(scale)
    if layer.bias is not None:
        layer.bias.mul_(scale)


def without_branches(model: nn.Module, graph: ChannelGraph, branches: Sequence[Branch]) -> nn.Module:
    """A copy in which the branches contribute nothing and are gone: their blocks hand on what their shortcuts give.

    A block keeps its class and children and carries out what was recorded of it, without the branch (see
    `efficientdnns.surgery.recorded`); layers of the branch are replaced by the identity, and nothing calls them.

    Raises:
        SurgeryError: a block's code cannot be recorded.
    """
    smaller = copy.deepcopy(model)
    calls = signatures(model, graph) if branches else {}
    for block in dict.fromkeys(branch.block for branch in branches):
        gone = [branch for branch in branches if branch.block == block]
        try:
            record(model, smaller, block, Sizes(graph, {}), set(), calls)
        except Unrecordable as error:
            raise SurgeryError(f"the branch of block '{block}' cannot be taken out: {error}; skip it") from error
        module = smaller.get_submodule(block)
        assert isinstance(module, RecordedForward)
        program = copy.deepcopy(module.program)
        for branch in gone:
            value = next(
                (a for step in program["steps"] if step[0] == branch.add for a in step[3] if not _is(a, branch.output)),
                None,
            )
            if value is None:
                raise SurgeryError(
                    f"the branch of block '{block}' cannot be taken out: its sum was not recorded; skip it"
                )
            program = _substituted(program, branch.add, value)
        program["steps"] = _needed(program)
        bare = smaller.get_submodule(block)
        bare.__class__ = type(model.get_submodule(block))
        play(bare, program)
        _drop_unused(smaller, block, program)
    return smaller


def _is(argument: Any, name: str) -> bool:
    return isinstance(argument, dict) and argument.get("ref") == name


def _substituted(program: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    def swap(item: Any) -> Any:
        if _is(item, name) and "times" not in item:
            return value
        if isinstance(item, dict):
            return {key: swap(x) for key, x in item.items()}
        return [swap(x) for x in item] if isinstance(item, list) else item

    steps = [[*step[:3], swap(step[3]), swap(step[4])] for step in program["steps"] if step[0] != name]
    return {**program, "steps": steps, "output": swap(program["output"])}


def _needed(program: dict[str, Any]) -> list[list[Any]]:
    """The steps that the output depends on."""
    wanted, kept = set(_references(program["output"])), []
    for step in reversed(program["steps"]):
        if step[0] in wanted:
            kept.append(step)
            wanted.update(_references([step[3], step[4]]))
    return kept[::-1]


def _references(item: Any, key: str = "ref") -> Iterator[str]:
    if isinstance(item, dict):
        if isinstance(item.get(key), str):
            yield item[key]
        for value in item.values():
            yield from _references(value, key)
    elif isinstance(item, list):
        for value in item:
            yield from _references(value, key)


def _drop_unused(model: nn.Module, block: str, program: dict[str, Any]) -> None:
    used = {step[2] for step in program["steps"] if step[1] == "module"}
    tensors = set(_references(program["steps"], "tensor"))
    module = model.get_submodule(block)
    for path, layer in list(module.named_modules()):
        own = [name for name, _ in layer.named_parameters(recurse=False)]
        called = any(path == name or path.startswith(f"{name}.") for name in used)
        if own and path and not called and not any(f"{path}.{name}" in tensors for name in own):
            replace_module(module, path, nn.Identity())
