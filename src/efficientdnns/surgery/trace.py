"""Export a network and walk its graph once, recording what its operations say about its channels."""

from __future__ import annotations

import inspect
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_map

from efficientdnns.errors import SurgeryError
from efficientdnns.surgery import layer_rules, mixing_rules, reshape_rules, shape_rules  # noqa: F401  (they register)
from efficientdnns.surgery.atoms import Atoms, KeptWhole, Shape, Value
from efficientdnns.surgery.rules import RULES, Call, pointwise, unknown

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


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
    values: dict[torch.fx.Node, Any] = field(default_factory=dict)
    example: tuple[Any, ...] = ()


def as_arguments(example_inputs: Inputs, model: nn.Module | None = None) -> tuple[Any, ...]:
    """The positional arguments of one forward pass; inputs by name are put in the order of ``model.forward``."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if not isinstance(example_inputs, Mapping):
        return tuple(example_inputs)
    if model is None:
        raise SurgeryError("inputs by name need the network they are for; give a tuple of positional arguments")
    try:
        bound = inspect.signature(model.forward).bind(**example_inputs)
    except TypeError as error:
        raise SurgeryError(f"the network does not run on the example input: {error}") from error
    last = max(i for i, name in enumerate(bound.signature.parameters) if name in example_inputs)
    bound.apply_defaults()
    return tuple(bound.arguments[name] for name in list(bound.signature.parameters)[: last + 1])


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


def export_any_batch(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[ExportedProgram, tuple[Any, ...]]:
    """Export for any batch size where the network allows it, and the example that was used (a batch of two).

    Sizes that follow the batch are then computed in the graph and not written into it.
    """
    from efficientdnns.measurement.inference import with_batch

    leaves = tree_leaves(arguments)
    if leaves and all(isinstance(x, Tensor) and x.dim() > 0 for x in leaves):
        try:
            wider = arguments if all(x.shape[0] > 1 for x in leaves) else with_batch(arguments, 2)
            return export(model, wider, dynamic=True), wider
        except Exception:  # it pins its batch size (or cannot be exported at all: that is found next)
            pass
    return export(model, arguments), arguments


def export(
    model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None, dynamic: bool = False
) -> ExportedProgram:
    """torch.export without its warnings and logs; ``dynamic``: the first dimension of every tensor may vary."""
    shapes = tree_map(lambda _: {0: torch.export.Dim.AUTO}, arguments) if dynamic else None
    with quietly(), plain_attention():
        program = torch.export.export(model, arguments, keywords, dynamic_shapes=shapes, strict=False)
    _inline_regions(program.graph_module)
    return program


def _inline_regions(module: torch.fx.GraphModule) -> None:
    """Put what a network does under ``torch.autocast(enabled=False)`` or ``torch.no_grad()`` where it stands: export keeps
    it in graphs of its own."""
    graph = module.graph
    regions = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
    while found := [node for node in graph.nodes if getattr(node.target, "__name__", "") in regions]:
        node = found[0]
        at = next(i for i, x in enumerate(node.args) if isinstance(x, torch.fx.Node) and x.op == "get_attr")
        inside: torch.fx.Graph = getattr(module, node.args[at].target).graph
        given = dict(zip(inside.find_nodes(op="placeholder"), node.args[at + 1 :], strict=True))
        with graph.inserting_before(node):
            results: Any = graph.graph_copy(inside, given)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    module.recompile()


@contextmanager
def quietly() -> Iterator[None]:
    """Without the logs and warnings of torch's tracers: what fails there is tried another way or listed."""
    disabled = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention modules compute operation by operation, not in their fused kernel, which checks and shows nothing."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
                    values[node] = Value.untracked((shapes_of(node) or ((),))[0])
            elif node.op == "call_function":
                for source in node.all_input_nodes:
                    if source in lazy and source not in values:
                        name = lazy[source]
                        values[source] = self.record.atoms.parameter(name, tuple(self.tensors[name].shape))
                values[node] = self._call(node, prefix, values)
                if shapes_of(node):
                    known[node] = self._note(node, prefix, known, lazy)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    if source in lazy:
                        values[source] = self.record.atoms.parameter(lazy[source], shapes_of(source)[0])
                if self.record.exported is program:
                    self.record.values = values
                return [
                    (values.get(x), known.get(x, "")) if isinstance(x, torch.fx.Node) else (x, "")
                    for x in tree_leaves(node.args)
                ]
        return []

    def _call(self, node: torch.fx.Node, prefix: str, values: dict[torch.fx.Node, Any]) -> Any:
        number = node.meta.get("val")
        if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
            return hint(number)  # a size that is computed in the graph
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
        return Call(
            operation(node), module, named | keywords, shapes_of(node), self.record.atoms, self.tensors, several
        )

    def _note(
        self, node: torch.fx.Node, prefix: str, known: dict[torch.fx.Node, str], lazy: dict[torch.fx.Node, str]
    ) -> str:
        sources = node.all_input_nodes
        if node.target is operator.getitem and sources[0] in known:
            return known[sources[0]]
        name = join(prefix, node.name)
        inputs = tuple(known[n] for n in sources if n in known)
        parameters = tuple(lazy[n] for n in sources if n in lazy)
        shape = (shapes_of(node) or ((),))[0]
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


def hint(number: Any) -> Any:
    """What a symbolic number was in the traced run; SurgeryError where it depends on the values of tensors."""
    if not isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return number
    if number.node.hint is None:
        raise SurgeryError("sizes depend on the values of tensors")
    return number.node.hint


def shapes_of(node: torch.fx.Node) -> tuple[Shape, ...]:
    """Shapes of a node's tensors in the traced run; SurgeryError where they depend on values."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(tuple(int(hint(n)) for n in t.shape) for t in tensors if isinstance(t, Tensor))
