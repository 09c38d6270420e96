"""Walk a network once and record what its operations say about its channels.

The graph comes from ``torch.export``. Where the whole network cannot be exported, its largest exportable submodules
are, one by one, and tensors are followed between them by identity; whatever the code in between touches stays whole.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from efficientdnns.errors import SurgeryError
from efficientdnns.surgery import layer_rules, shape_rules  # noqa: F401  (they register their rules)
from efficientdnns.surgery.atoms import Atoms, KeptWhole, Shape, Value
from efficientdnns.surgery.rules import RULES, Call, pointwise, unknown

Inputs = Tensor | Sequence[Any]


@dataclass(frozen=True)
class Node:
    """One operation of the traced network, in execution order.

    Attributes:
        name: Unique name.
        operation: ATen name without overload, e.g. ``"conv2d"``.
        module: Path of the module in which it is called ("" is the network's own ``forward``).
        inputs: Names of the nodes whose results it reads; network inputs are called ``input0``, ``input1``, ...
        parameters: Names of the parameters and buffers that it reads.
        shape: Shape of its (first) result in the traced run.
    """

    name: str
    operation: str
    module: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    shape: Shape


@dataclass
class Record:
    """What a trace leaves behind."""

    atoms: Atoms = field(default_factory=Atoms)
    nodes: list[Node] = field(default_factory=list)
    outputs: tuple[str, ...] = ()
    exported: ExportedProgram | None = None
    source: str = "export"


def as_arguments(example_inputs: Inputs) -> tuple[Any, ...]:
    """The positional arguments of one forward pass."""
    return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; every module's own flag comes back afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; a tied one appears under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def canonical_names(model: nn.Module) -> dict[str, str]:
    """For every name of a parameter or buffer the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors_of(model).items()}


def trace_network(model: nn.Module, example_inputs: Inputs) -> Record:
    """Run the analysis; raises SurgeryError where the network cannot even run on the example."""
    arguments = as_arguments(example_inputs)
    record = Record()
    with evaluating(model):
        try:
            model(*arguments)
        except Exception as error:
            raise SurgeryError(f"the network does not run on the example input: {first_line(error)}") from error
        walker = Walker(record, tensors_of(model), canonical_names(model))
        try:
            record.exported = export(model, arguments)
        except Exception as error:  # torch.export raises many kinds; the reason is listed
            record.source = "hooks"
            _trace_modules(model, arguments, walker, first_line(error))
            return record
        placeholders = [Value.untracked(x.shape) if isinstance(x, Tensor) else x for x in tree_leaves(arguments)]
        results = walker.walk(record.exported, "", placeholders, [f"input{n}" for n in range(len(placeholders))])
        record.outputs = tuple(name for _, name in results)
        for value, _ in results:
            if isinstance(value, Value):
                record.atoms.pin_value(value)
    return record


def export(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None) -> ExportedProgram:
    """torch.export without its warnings and logs."""
    disabled = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)  # a failing export dumps its whole graph
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()), torch.enable_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model, arguments, keywords, strict=False)
    finally:
        logging.disable(disabled)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class Walker:
    """Applies the rules to the nodes of exported graphs, all writing into one record."""

    def __init__(self, record: Record, tensors: dict[str, Tensor], canonical: dict[str, str]) -> None:
        self.record, self.tensors, self.canonical = record, tensors, canonical
        self.names = {id(tensor): canonical[name] for name, tensor in tensors.items()}

    def pin_parameter(self, tensor: Tensor, why: KeptWhole | None = None) -> None:
        """Keep a parameter or buffer as it is; does nothing for other tensors."""
        if id(tensor) in self.names:
            self.record.atoms.pin_value(self.record.atoms.parameter(self.names[id(tensor)], tuple(tensor.shape)), why)

    def walk(self, program: ExportedProgram, prefix: str, inputs: list[Any], names: list[str]) -> list[tuple[Any, str]]:
        """Walk one graph whose modules live under ``prefix``; return its outputs and the names of their nodes."""
        values: dict[torch.fx.Node, Any] = {}
        known: dict[torch.fx.Node, str] = {}
        lazy: dict[torch.fx.Node, str] = {}
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        given = iter(zip(inputs, names, strict=True))
        for node in program.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                name = self.canonical.get(join(prefix, spec.target or ""))
                if spec.kind is InputKind.USER_INPUT:
                    values[node], known[node] = next(given)
                elif name is not None and spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                    lazy[node] = name
                else:
                    values[node] = Value.untracked((_shapes(node) or ((),))[0])
            elif node.op == "call_function":
                for source in node.all_input_nodes:
                    if source in lazy and source not in values:
                        name = lazy[source]
                        values[source] = self.record.atoms.parameter(name, tuple(self.tensors[name].shape))
                values[node] = self._call(node, prefix, values)
                known[node] = self._note(node, prefix, known, lazy)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    if source in lazy:
                        values[source] = self.record.atoms.parameter(lazy[source], _shapes(source)[0])
                return [
                    (values.get(x), known.get(x, "")) if isinstance(x, torch.fx.Node) else (x, "")
                    for x in tree_leaves(node.args)
                ]
        return []

    def _call(self, node: torch.fx.Node, prefix: str, values: dict[torch.fx.Node, Any]) -> Any:
        positional: Any = torch.fx.node.map_arg(node.args, lambda n: values.get(n))
        keywords: Any = torch.fx.node.map_arg(node.kwargs, lambda n: values.get(n))
        if node.target is operator.getitem:
            return positional[0][positional[1]]
        call = self._prepare(node, prefix, positional, keywords)
        function: Callable[..., Any] = unknown
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
            one = not isinstance(node.meta.get("val"), (tuple, list))
            default = pointwise if one and torch.Tag.pointwise in node.target.tags else unknown
            function = RULES.get(call.operation, default)
        if not call.shapes:
            return None
        try:
            return function(call)
        except (AttributeError, AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
            return unknown(call, f"its rule does not fit this use ({first_line(error)})")

    def _prepare(self, node: torch.fx.Node, prefix: str, positional: Sequence[Any], keywords: dict[str, Any]) -> Call:
        named: dict[str, Any] = {str(n): value for n, value in enumerate(positional)}
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema.arguments
            named = {a.name: a.default_value for a in schema if a.has_default_value()}
            named |= {a.name: value for a, value in zip(schema, positional, strict=False)}
        several = isinstance(node.meta.get("val"), (tuple, list))
        module = module_path(node, prefix)
        return Call(operation(node), module, named | keywords, _shapes(node), self.record.atoms, self.tensors, several)

    def _note(
        self, node: torch.fx.Node, prefix: str, known: dict[torch.fx.Node, str], lazy: dict[torch.fx.Node, str]
    ) -> str:
        sources = node.all_input_nodes
        if node.target is operator.getitem:
            return known[sources[0]]
        name = join(prefix, node.name)
        inputs = tuple(known[n] for n in sources if n in known)
        parameters = tuple(lazy[n] for n in sources if n in lazy)
        shape = (_shapes(node) or ((),))[0]
        self.record.nodes.append(Node(name, operation(node), module_path(node, prefix), inputs, parameters, shape))
        return name


def operation(node: torch.fx.Node) -> str:
    """ATen name without namespace, overload and in-place mark."""
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.split("::")[-1]
        return name if name.startswith("__") else name.rstrip("_")
    return getattr(node.target, "__name__", str(node.target))


def module_path(node: torch.fx.Node, prefix: str) -> str:
    """Path of the module whose forward calls the node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return join(prefix, path.split("@")[0])


def join(prefix: str, name: str) -> str:
    """``prefix.name`` without stray dots."""
    return ".".join(part for part in (prefix, name) if part)


def _shapes(node: torch.fx.Node) -> tuple[Shape, ...]:
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(tuple(n if isinstance(n, int) else -1 for n in t.shape) for t in tensors if isinstance(t, Tensor))


@dataclass
class _Called:
    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any = None


def _trace_modules(model: nn.Module, arguments: tuple[Any, ...], walker: Walker, reason: str) -> None:
    """The fallback: export what can be exported, follow tensors in between by identity."""
    calls = _record_calls(model, arguments)
    programs: dict[nn.Module, ExportedProgram] = {}
    paths = {module: path for path, module in model.named_modules()}

    def choose(module: nn.Module) -> None:
        for child in module.children():
            own = [call for call in calls if call.module is child]
            if len(own) != 1 or not _exported(child, own[0], programs):
                choose(child)

    choose(model)
    atoms = walker.record.atoms
    values: dict[int, tuple[Value, str]] = {}
    alive: list[Any] = []  # identities are only good while the tensors live
    inputs = tree_leaves(arguments)
    for n, tensor in enumerate(inputs):
        values[id(tensor)] = (Value.untracked(getattr(tensor, "shape", ())), f"input{n}")

    def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = tree_leaves((args, kwargs))
        alive.append((given, output))
        known = [_lookup(values, x) for x in given]
        results = walker.walk(programs[module], paths[module], [v for v, _ in known], [name for _, name in known])
        for tensor, (value, name) in zip([x for x in tree_leaves(output)], results, strict=False):
            if isinstance(tensor, Tensor) and isinstance(value, Value):
                values[id(tensor)] = (value, name)

    watch = _Between(values, walker, KeptWhole("", "forward", f"the network cannot be exported as a whole ({reason})"))
    hooks = [m.register_forward_pre_hook(lambda *_: watch.enter()) for m in programs]
    hooks += [m.register_forward_hook(leave, with_kwargs=True) for m in programs]
    hooks += [m.register_forward_hook(lambda *_: watch.leave()) for m in programs]
    try:
        with watch:
            output = model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    _pin_uncovered(model, programs, walker)
    for tensor in tree_leaves(output):
        if id(tensor) in values:
            atoms.pin_value(values[id(tensor)][0])
    walker.record.outputs = tuple(values[id(t)][1] for t in tree_leaves(output) if id(t) in values)


def _record_calls(model: nn.Module, arguments: tuple[Any, ...]) -> list[_Called]:
    calls: list[_Called] = []
    hooks = [
        m.register_forward_hook(lambda m, a, k, o: calls.append(_Called(m, a, k, o)), with_kwargs=True)
        for m in model.modules()
        if m is not model
    ]
    try:
        model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _exported(module: nn.Module, call: _Called, programs: dict[nn.Module, ExportedProgram]) -> bool:
    try:
        programs[module] = export(module, call.arguments, call.keywords)
    except Exception:  # its children are tried next; what remains is kept whole and listed
        return False
    return True


def _lookup(values: dict[int, tuple[Value, str]], item: Any) -> tuple[Any, str]:
    if not isinstance(item, Tensor):
        return item, ""
    return values.get(id(item), (Value.untracked(item.shape), ""))


def _pin_uncovered(model: nn.Module, programs: dict[nn.Module, ExportedProgram], walker: Walker) -> None:
    """Parameters that also belong to a module that was not exported may be read by code we do not see: they stay
    whole."""
    inside = {module for program in programs for module in program.modules()}
    for module in set(model.modules()) - inside:
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            walker.pin_parameter(tensor)


class _Between(TorchFunctionMode):
    """Sees every tensor function that the network's code calls outside the exported modules."""

    HARMLESS = ("__get__", "size", "dim", "ndimension", "numel", "is_floating_point")

    def __init__(self, values: dict[int, tuple[Value, str]], walker: Walker, why: KeptWhole) -> None:
        super().__init__()
        self.values, self.walker, self.why, self.depth = values, walker, why, 0

    def enter(self) -> None:
        self.depth += 1

    def leave(self) -> None:
        self.depth -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.depth == 0 and getattr(func, "__name__", "") not in self.HARMLESS:
            for item in tree_leaves((args, kwargs or {})):
                if isinstance(item, Tensor):
                    why = replace(self.why, operation=getattr(func, "__name__", str(func)))
                    self.walker.pin_parameter(item, why)
                    if id(item) in self.values:
                        self.walker.record.atoms.pin_value(self.values[id(item)][0], why)
        return func(*args, **(kwargs or {}))
