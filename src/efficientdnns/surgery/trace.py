"""Walk a network once and record what its operations say about its channels.

The graph comes from ``torch.export``. Where the whole network cannot be exported, its largest exportable submodules
are, one by one, and tensors are followed between them by identity; whatever the code in between touches stays whole.
"""

from __future__ import annotations

import inspect
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from efficientdnns.errors import SurgeryError
from efficientdnns.surgery import layer_rules, mixing_rules, reshape_rules, shape_rules  # noqa: F401  (they register)
from efficientdnns.surgery.atoms import Atoms, KeptWhole, Shape, Split, Value
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


def trace_network(model: nn.Module, example_inputs: Inputs) -> Record:
    """Run the analysis; raises SurgeryError where the network cannot even run on the example."""
    arguments = as_arguments(example_inputs, model)
    with evaluating(model):
        try:
            model(*arguments)
        except Exception as error:
            raise SurgeryError(f"the network does not run on the example input: {first_line(error)}") from error
        tensors, canonical = tensors_of(model), canonical_names(model)
        try:
            program, arguments = export_any_batch(model, arguments)
            record = _walked(program, arguments, tensors, canonical, {})
        except Exception as error:  # torch.export raises many kinds; the reason is listed
            record = Record(source="hooks", example=arguments)
            _trace_modules(model, arguments, Walker(record, tensors, canonical), first_line(error))
            return record
        carriers: dict[Split, int] = {}
        for _ in range(MOST_WALKS):
            other = _other_carriers(record.atoms, carriers)
            if other == carriers:
                break
            carriers = other
            record = _walked(program, arguments, tensors, canonical, carriers)
        return record


MOST_WALKS = 8
"""How often the graph is walked at most to find what carries the removable units where channels are split."""


def _walked(
    program: ExportedProgram,
    arguments: tuple[Any, ...],
    tensors: dict[str, Tensor],
    canonical: dict[str, str],
    carriers: dict[Split, int],
) -> Record:
    record = Record(atoms=Atoms(carriers=carriers), exported=program, example=arguments)
    walker = Walker(record, tensors, canonical)
    placeholders = [Value.untracked(x.shape) if isinstance(x, Tensor) else x for x in tree_leaves(arguments)]
    results = walker.walk(program, "", placeholders, [f"input{n}" for n in range(len(placeholders))])
    record.outputs = tuple(name for _, name in results)
    for value, _ in results:
        if isinstance(value, Value):
            record.atoms.pin_value(value)
    return record


def _other_carriers(atoms: Atoms, carriers: dict[Split, int]) -> dict[Split, int]:
    """What to try next: in every module whose splits keep all channels whole another piece of its last such split."""
    if not atoms.splits:
        return carriers
    unit_of, pinned = atoms.resolve()
    stuck: dict[str, list[Split]] = {}
    for split, carrying in atoms.splits.items():
        if any(pinned[unit_of[ids]].all() for ids in carrying):
            stuck.setdefault(split[0], []).append(split)
    other = dict(carriers)
    for splits in stuck.values():
        for split in reversed(splits):
            if carriers.get(split, 0) < len(split[1]) - 1:
                other[split] = carriers.get(split, 0) + 1
                break
    return other


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
        return torch.export.export(model, arguments, keywords, dynamic_shapes=shapes, strict=False)


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
                    values[node] = Value.untracked((_shapes(node) or ((),))[0])
            elif node.op == "call_function":
                for source in node.all_input_nodes:
                    if source in lazy and source not in values:
                        name = lazy[source]
                        values[source] = self.record.atoms.parameter(name, tuple(self.tensors[name].shape))
                values[node] = self._call(node, prefix, values)
                if _shapes(node):
                    known[node] = self._note(node, prefix, known, lazy)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    if source in lazy:
                        values[source] = self.record.atoms.parameter(lazy[source], _shapes(source)[0])
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
        return Call(operation(node), module, named | keywords, _shapes(node), self.record.atoms, self.tensors, several)

    def _note(
        self, node: torch.fx.Node, prefix: str, known: dict[torch.fx.Node, str], lazy: dict[torch.fx.Node, str]
    ) -> str:
        sources = node.all_input_nodes
        if node.target is operator.getitem and sources[0] in known:
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


def hint(number: Any) -> Any:
    """What a symbolic number was in the traced run; SurgeryError where it depends on the values of tensors."""
    if not isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return number
    if number.node.hint is None:
        raise SurgeryError("sizes depend on the values of tensors")
    return number.node.hint


def _shapes(node: torch.fx.Node) -> tuple[Shape, ...]:
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(tuple(int(hint(n)) for n in t.shape) for t in tensors if isinstance(t, Tensor))


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
    for ids in atoms.statistics:  # what is left of a statistic can only be checked on a whole graph
        atoms.pin(ids, KeptWhole("", "forward", "statistics over these channels cannot be followed without a graph"))
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
        program = export(module, call.arguments, call.keywords)
        for node in program.graph.nodes:
            _shapes(node)  # SurgeryError where sizes depend on values
        programs[module] = program
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
