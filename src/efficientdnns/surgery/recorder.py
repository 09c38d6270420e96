"""Record what a traced module does as data that `efficientdnns.surgery.recorded` carries out, at other sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from efficientdnns.errors import FileFormatError
from efficientdnns.surgery.graph import ChannelGraph
from efficientdnns.surgery.recorded import Program, function_of, play
from efficientdnns.surgery.resize import Ratio, Sizes, resized
from efficientdnns.surgery.trace import evaluating, hint, plain_attention, tensors_of


class Signature:
    """One call of a module: its arguments and what it returned, tensors without data."""

    def __init__(self, args: Any, kwargs: Any, output: Any) -> None:
        self.args, self.kwargs, self.output = args, kwargs, output


Calls = dict[str, list[Signature]]
"""Module path -> its calls in one run."""


class Unrecordable(Exception):
    """A module whose recording cannot be cut out of the network's; its caller can be tried."""


def record(model: nn.Module, smaller: nn.Module, path: str, sizes: Sizes, inline: set[str], calls: Calls) -> None:
    """Make the module at ``path`` of ``smaller`` run what it did in the traced ``model``, at the new sizes.

    Args:
        model: The traced network.
        smaller: Its sliced copy, changed in place.
        path: The module.
        sizes: The plan.
        inline: Paths of modules inside it that are not to be called, but whose operations are to be taken over.
        calls: What :func:`signatures` returned.

    Raises:
        Unrecordable: The module is called several times, or its inputs cannot be told apart.
    """
    play(smaller.get_submodule(path), _Recorder(model, sizes, inline, calls).program(path))


def calls_of(graph: ChannelGraph, node: Node) -> list[str]:
    """Paths (with ``@n`` for later calls) of the modules that are being executed at a node, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return [] if any(p.startswith("_empty_nn_module_stack") for p in paths) else paths


def written_in(graph: ChannelGraph, sizes: Sizes) -> dict[str, dict[int, int]]:
    """Paths of the modules in whose code sizes are written that change, each with its sizes, old -> new."""
    assert graph.exported is not None
    paths: dict[str, dict[int, int]] = {}
    for node in graph.exported.graph.nodes:
        if node.op == "call_function" and resized(sizes, node) is not None:
            calls = calls_of(graph, node)
            found = paths.setdefault(calls[-1].split("@")[0] if calls else "", {})
            for value in (v for n in (node, *node.all_input_nodes) for v in sizes.values(n)):
                found.update({value.shape[d]: sizes.size(value, d) for d in sizes.changed(value)})
    return paths


class _Recorder:
    def __init__(self, model: nn.Module, sizes: Sizes, inline: set[str], calls: Calls) -> None:
        assert sizes.graph.exported is not None
        self.model, self.sizes, self.graph, self.inline = model, sizes, sizes.graph, inline
        self.exported = sizes.graph.exported
        self.specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        self.signatures = calls

    def program(self, path: str) -> Program:
        nodes = self._nodes(path)
        call = self._signature(path)
        outer = list(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in set(nodes)))
        self.known: dict[Node, Any] = {}
        self.steps: list[list[Any]] = []
        leaves = tree_leaves((call.args, call.kwargs))
        inputs = self._match_inputs(path, outer, leaves)
        for n, node in enumerate(inputs.values()):
            self.known[node] = {"ref": f"input{n}"}
        self._numbers(outer, list(inputs.values()))
        self._steps(path, nodes)
        return {"inputs": list(inputs), "steps": self.steps, "output": self._output(path, nodes, call.output)}

    def _nodes(self, path: str) -> list[Node]:
        """The operations of the one call of a module."""
        found: dict[str, list[Node]] = {}
        for node in self.exported.graph.nodes:
            if node.op != "call_function":
                continue
            calls = calls_of(self.graph, node)
            if path == "":
                found.setdefault("", []).append(node)
            else:
                for call in calls:
                    if call.split("@")[0] == path:
                        found.setdefault(call, []).append(node)
        if len(found) != 1:
            raise Unrecordable(f"{path!r} is called {len(found)} times")
        return next(iter(found.values()))

    def _signature(self, path: str) -> Signature:
        calls = self.signatures.get(path, [])
        if len(calls) != 1:
            raise Unrecordable(f"{path!r} is called {len(calls)} times")
        return calls[0]

    def _match_inputs(self, path: str, outer: list[Node], leaves: list[Any]) -> dict[int, Node]:
        """Position among the call's leaves -> the node that it is."""
        wanted = [n for n in outer if isinstance(n.meta.get("val"), Tensor) and not self._own(path, n)]
        if path == "":
            users = [n for n in self.exported.graph.nodes if n.op == "placeholder" and self._is_user(n)]
            return {at: node for at, node in enumerate(users) if isinstance(node.meta.get("val"), Tensor)}
        matched: dict[int, Node] = {}
        for node in wanted:
            if node.op == "placeholder" and not self._is_user(node):
                continue  # a tensor of another module: reached by its name where possible
            at = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.shape == _shape(node)]
            ids = {id(leaves[k]) for k in at}
            if len(ids) != 1 or at[0] in matched:
                raise Unrecordable(f"the inputs of {path!r} cannot be told apart")
            matched[at[0]] = node
        return matched

    def _is_user(self, node: Node) -> bool:
        return self.specs[node.name].kind is InputKind.USER_INPUT

    def _own(self, path: str, node: Node) -> str | None:
        """The name of a parameter or buffer, relative to the module at ``path``."""
        if node.op != "placeholder" or self.specs[node.name].kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            return None
        tensor = tensors_of(self.model)[str(self.specs[node.name].target)]
        inside = self.model.get_submodule(path)
        return next((name for name, own in tensors_of(inside).items() if own is tensor), None)

    def _numbers(self, outer: list[Node], inputs: list[Node]) -> None:
        """Sizes computed outside are read off the inputs."""
        for node in outer:
            number = node.meta.get("val")
            if isinstance(number, Tensor) or node in self.known or isinstance(number, (tuple, list)):
                continue
            for at, source in enumerate(inputs):
                found = _as_multiple(number, source.meta["val"].shape)
                if found is not None:
                    self._size_of(node, f"input{at}", *found)
                    break
            else:
                if isinstance(number, (torch.SymInt, torch.SymFloat)):
                    raise Unrecordable(f"a size {number} comes from outside")
                self.known[node] = number

    def _size_of(self, node: Node, source: str, dim: int, times: int, over: int) -> None:
        self.steps.append([f"{node.name}_of", "operator", "aten::sym_size.int", [{"ref": source}, dim], {}])
        size = {"ref": f"{node.name}_of", "times": times, "over": over}
        self.steps.append([node.name, "number", "add", [size, 0], {}])
        self.known[node] = {"ref": node.name}

    def _steps(self, path: str, nodes: list[Node]) -> None:
        inside = set(nodes)
        children: dict[str, list[Node]] = {}
        for node in nodes:
            child = self._child(path, node)
            if child is not None:
                children.setdefault(child, []).append(node)
        first = {own[0]: child for child, own in children.items()}
        done: set[Node] = set()
        for node in nodes:
            if node in done:
                continue
            if node in first and self._call_child(path, first[node], children[first[node]], inside):
                done.update(children[first[node]])
            else:
                self._operation(path, node)

    def _child(self, path: str, node: Node) -> str | None:
        """The outermost module inside ``path`` that is being executed at a node and may be called."""
        for call in calls_of(self.graph, node):
            name = call.split("@")[0]
            if name != path and (path == "" or name.startswith(path + ".")) and name not in self.inline:
                module = self.model.get_submodule(name)
                if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                    return call
        return None

    def _call_child(self, path: str, call: str, own: list[Node], inside: set[Node]) -> bool:
        """Call a module where that is one tensor in, one out; otherwise its operations are taken over."""
        name = call.split("@")[0]
        signature = self.signatures.get(name, [])
        at = int(call.split("@")[1]) if "@" in call else 0
        if at >= len(signature):
            return False
        args, kwargs, output = signature[at].args, signature[at].kwargs, signature[at].output
        members = set(own)
        outer = [
            n
            for n in dict.fromkeys(s for node in own for s in node.all_input_nodes if s not in members)
            if isinstance(n.meta.get("val"), Tensor) and self._own(name, n) is None
        ]
        made = [n for n in own if any(u not in members for u in n.users)]
        if len(outer) != 1 or len(made) != 1 or not isinstance(output, Tensor) or kwargs or len(args) != 1:
            return False
        if not isinstance(args[0], Tensor) or args[0].shape != _shape(outer[0]) or output.shape != _shape(made[0]):
            return False
        relative = name[len(path) + 1 :] if path else name
        self.steps.append([made[0].name, "module", relative, [self._argument(path, outer[0])], {}])
        self.known[made[0]] = {"ref": made[0].name}
        return True

    def _operation(self, path: str, node: Node) -> None:
        writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        if (not node.users and not writes) or "assert" in str(node.target) or "constrain_range" in str(node.target):
            return
        new = resized(self.sizes, node)
        args, kwargs = (node.args, dict(node.kwargs)) if new is None else ((), new)
        encoded = [self._argument(path, a) for a in args], {k: self._argument(path, a) for k, a in kwargs.items()}
        if isinstance(node.target, torch._ops.OpOverload):
            name, overload = node.target._schema.name, node.target._overloadname
            kind, target = "operator", f"{name}.{overload}"
        else:
            kind, target = "number", getattr(node.target, "__name__", "?")
        try:
            function_of(kind, target)
        except FileFormatError:
            raise Unrecordable(f"{target} cannot be recorded") from None
        self.steps.append([node.name, kind, target, *encoded])
        self.known[node] = {"ref": node.name}

    def _argument(self, path: str, item: Any) -> Any:
        if isinstance(item, Node):
            return self._node(path, item)
        if isinstance(item, Ratio):
            return self._node(path, item.node) | {"times": item.new, "over": item.old}
        if isinstance(item, (list, tuple)):
            return [self._argument(path, x) for x in item]
        if isinstance(item, dict):
            return {"dict": {k: self._argument(path, x) for k, x in item.items()}}
        if isinstance(item, torch.dtype):
            return {"dtype": str(item).removeprefix("torch.")}
        if isinstance(item, (torch.memory_format, torch.layout)):
            return {"torch": str(item).removeprefix("torch.")}
        if isinstance(item, torch.device):
            return {"device": True}
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        raise Unrecordable(f"an argument {item!r} cannot be written as data")

    def _node(self, path: str, node: Node) -> dict[str, Any]:
        if node in self.known:
            return self.known[node]
        own = self._own(path, node)
        if own is not None:
            return {"tensor": own}
        spec = self.specs.get(node.name)
        if spec is not None and spec.kind is InputKind.CONSTANT_TENSOR:
            value = self.exported.constants[str(spec.target)]
            if value.numel() <= 1024:
                return {"constant": value.tolist(), "of": str(value.dtype).removeprefix("torch.")}
        raise Unrecordable(f"{node.name} comes from outside")

    def _output(self, path: str, nodes: list[Node], output: Any) -> Any:
        inside = set(nodes)
        made = [n for n in nodes if n in self.known and isinstance(n.meta.get("val"), Tensor)]
        used = [n for n in made if any(u not in inside for u in n.users)]
        if path == "":
            return self._root_output(output)

        def template(item: Any) -> Any:
            if isinstance(item, Tensor):
                fitting = [n for n in used if _shape(n) == item.shape]
                if len(fitting) > 1:
                    raise Unrecordable(f"the outputs of {path!r} cannot be told apart")
                return self.known[fitting[0]] if fitting else None
            return _container(item, template, path)

        return template(output)

    def _root_output(self, output: Any) -> Any:
        node = next(n for n in self.exported.graph.nodes if n.op == "output")
        leaves = iter(tree_leaves(node.args))

        def template(item: Any) -> Any:
            if item is None or isinstance(item, (Tensor, bool, int, float, str)):
                leaf = next(leaves) if item is not None else None
                return self._argument("", leaf)
            return _container(item, template, "")

        return template(output)


def _container(item: Any, template: Callable[[Any], Any], path: str) -> Any:
    if item is None or isinstance(item, (bool, int, float, str)):
        return item
    if type(item) is tuple:
        return {"tuple": [template(x) for x in item]}
    if type(item) is list:
        return [template(x) for x in item]
    if isinstance(item, Mapping) and type(item).__name__ in ("dict", "OrderedDict"):
        return {"dict": {name: template(x) for name, x in item.items()}}
    raise Unrecordable(f"{path!r} returns a {type(item).__name__}")


def _shape(node: Node) -> torch.Size:
    return torch.Size([int(hint(n)) for n in node.meta["val"].shape])


def _as_multiple(number: Any, shape: torch.Size) -> tuple[int, int, int] | None:
    """A symbolic size as ``shape[dim] * times / over``."""
    if not isinstance(number, torch.SymInt):
        return None
    for dim, size in enumerate(shape):
        if isinstance(size, torch.SymInt):
            ratio = number.node.expr / size.node.expr
            if ratio.is_Rational:
                return dim, int(ratio.p), int(ratio.q)
    return None


def signatures(model: nn.Module, graph: ChannelGraph) -> Calls:
    """Every call of every module in one run on the traced example, without computing anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    calls: Calls = {}
    paths = {module: path for path, module in model.named_modules()}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.setdefault(paths[module], []).append(Signature(args, kwargs, output))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in paths]
    try:
        with evaluating(model), plain_attention(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, graph.example)
            model(*fake)
    finally:
        for handle in handles:
            handle.remove()
    return calls
