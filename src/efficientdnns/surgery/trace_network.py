"""Trace a whole network, or what of it can be exported.

The graph comes from ``torch.export``. Where the whole network cannot be exported, its largest exportable submodules
are, one by one, and tensors are followed between them by identity; whatever the code in between touches stays whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from efficientdnns.errors import SurgeryError
from efficientdnns.surgery.atoms import Atoms, KeptWhole, Split, Value
from efficientdnns.surgery.trace import (
    Inputs,
    Record,
    Walker,
    as_arguments,
    canonical_names,
    evaluating,
    export,
    export_any_batch,
    first_line,
    shapes_of,
    tensors_of,
)


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
            shapes_of(node)  # SurgeryError where sizes depend on values
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
