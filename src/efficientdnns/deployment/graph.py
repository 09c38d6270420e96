"""The network as one graph that needs no code of ours: traced by ``torch.export``, once for every format.

What a deployed file takes and gives is plain: tensors, and tuples, lists and dictionaries of them. Data classes and the
outputs of Hugging Face networks become dictionaries; what is no tensor (None, numbers) is left out.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_leaves, tree_map

from efficientdnns.data.nested import length
from efficientdnns.deployment.coded import Decoding, with_coded_weights
from efficientdnns.deployment.detectors import finds_objects, without_branches
from efficientdnns.deployment.files import first_line
from efficientdnns.errors import ModelError
from efficientdnns.measurement.inference import Forward, batch_size, evaluating, to_device, with_batch

Path_ = tuple[str | int, ...]
"""Where a tensor stands in nested outputs: keys of dictionaries and positions in tuples, from outside to inside."""


class Outputs(dict[str, Any]):
    """Outputs with names; ``outputs.logits`` is ``outputs["logits"]``, as in the network before it was exported."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the network has no output '{name}' (outputs: {', '.join(self)})") from None


def plain(value: Any) -> Any:
    """``value`` in tuples, lists and dictionaries of tensors only; None where nothing is left of it."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        return {str(key): kept for key, part in value.items() if (kept := plain(part)) is not None}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, list | tuple):
        parts = [kept for part in value if (kept := plain(part)) is not None]
        return parts if isinstance(value, list) else tuple(parts)
    return None


def flatten(value: Any) -> list[tuple[Path_, Tensor]]:
    """Every tensor of plain outputs with its place, in the order of the exported graph."""
    if isinstance(value, Tensor):
        return [((), value)]
    items: Any = value.items() if isinstance(value, Mapping) else enumerate(value or ())
    return [((key, *path), tensor) for key, part in items for path, tensor in flatten(part)]


def unflatten(places: Sequence[Path_], tensors: Sequence[Tensor]) -> Any:
    """The outputs again: tuples and `Outputs`."""
    if len(places) == 1 and not places[0]:
        return tensors[0]
    groups: dict[str | int, tuple[list[Path_], list[Tensor]]] = {}
    for place, tensor in zip(places, tensors, strict=True):
        inner = groups.setdefault(place[0], ([], []))
        inner[0].append(tuple(place[1:]))
        inner[1].append(tensor)
    parts = {key: unflatten(*group) for key, group in groups.items()}
    return (
        tuple(parts.values())
        if all(isinstance(key, int) for key in parts)
        else Outputs({str(key): part for key, part in parts.items()})
    )


def output_name(place: Path_) -> str:
    """The name of an output in a file: ``output``, ``logits``, ``output.0``, ``output.0.boxes``."""
    parts = [str(part) for part in place]
    return ".".join(parts if place and isinstance(place[0], str) else ["output", *parts])


class Deployed(nn.Module):
    """The network as the task calls it: plain inputs to plain outputs."""

    def __init__(self, network: nn.Module, forward: Forward | None = None) -> None:
        super().__init__()
        self.network, self.call = network, forward or call

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """See the class."""
        inputs = named or (arguments if len(arguments) != 1 else arguments[0])
        outputs = plain(self.call(self.network, inputs))
        if not flatten(outputs):
            raise ModelError("the network gives no tensor; an exported file needs tensors as outputs")
        return outputs


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a deployed network is called: a tuple is spread over the arguments, a mapping over the keywords."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def call(network: nn.Module, inputs: Any) -> Any:
    """Call a network as `Task.outputs` does: a list is one argument, a batch of samples."""
    positional, named = arguments(inputs)
    return network(*positional, **named)


class Tracing(TypedDict, total=False):
    """How `trace` may be told to trace."""

    dynamic_batch: bool
    batch: int | None
    forward: Forward | None


@dataclass(frozen=True)
class Graph:
    """A traced network.

    ``places`` are those of its outputs, ``example`` the inputs it was traced with. ``note`` says why it takes one batch
    size only, where it does.
    """

    program: ExportedProgram
    example: Any
    inputs: tuple[str, ...]
    places: tuple[Path_, ...]
    dynamic_batch: bool
    decodes: bool = False
    """Whether it has weights that it decodes."""
    note: str = ""
    sizes: tuple[int, ...] | None = None
    """Shape of the samples where it takes lists of them in this shape only."""

    @property
    def batch(self) -> int:
        """Samples of the example."""
        return length(self.example)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return tuple(output_name(place) for place in self.places)


def trace(
    model: nn.Module,
    example_input: Any,
    *,
    dynamic_batch: bool = True,
    batch: int | None = None,
    forward: Forward | None = None,
    coded: bool = True,
) -> Graph:
    """Trace ``model`` in evaluation mode on the CPU.

    Args:
        example_input: a tensor, a tuple (arguments) or a mapping (keywords).
        dynamic_batch: leave the batch open; where the network computes with its size it is fixed all the same.
        batch: the size of a fixed batch, by default that of ``example_input``.
        forward: ``forward(model, inputs)`` where calling the model is not enough.
        coded: keep weights that are smaller so as codes.

    Raises:
        ModelError: it cannot be traced; the line says why.
    """
    example = to_device(example_input, torch.device("cpu"))
    for module in model.modules():
        if callable(forget := getattr(module, "forget", None)):
            forget()  # matrices that a layer decoded for itself; the file keeps the codes
    network: nn.Module = Deployed(model.cpu(), forward)
    if coded:
        network = with_coded_weights(network)
    with evaluating(network), quiet():
        if samples_of(example) is not None:
            return _trace_list(network, example, "the network takes a list of samples" if dynamic_batch else "")
        if dynamic_batch:
            # Two samples, because torch.export takes a size of one for a constant.
            size = max(2, batch or batch_size(example))
            graph = _trace(network, with_batch(example, size), open_batch=True)
            if graph.dynamic_batch:
                return graph
        note = "the network computes with the size of its batch" if dynamic_batch else ""
        if batch is not None:
            example = with_batch(example, batch)
        return dataclasses.replace(_trace(network, example, open_batch=False), note=note)


def _trace_list(network: nn.Module, samples: Any, note: str) -> Graph:
    """A network of a list of samples: of any sizes where it lets them, else of those of the example."""
    listed = [sample for sample in samples_of(samples) or [] if isinstance(sample, Tensor)]
    shapes = ShapesCollection()
    for sample in listed:
        shapes[sample] = dict.fromkeys(range(1, sample.dim()), Dim.AUTO)
    graph = _trace(network, samples, open_batch=False, shapes=shapes)
    positional, named = arguments(tree_map(_larger, samples))
    try:
        graph.program.module()(*positional, **named)
    except Exception:  # a guard, or an operation whose sizes were built in
        graph = _trace(network, samples, open_batch=False)
        sizes = tuple(listed[0].shape) if listed else None
        note = "; ".join(filter(None, [note, f"samples of {' x '.join(map(str, sizes or ()))} only"]))
        return dataclasses.replace(graph, note=note, sizes=sizes)
    return dataclasses.replace(graph, note=note)


def _larger(sample: Any) -> Any:
    """A sample of another size and, beyond lines, of another form."""
    if not isinstance(sample, Tensor) or sample.dim() < 2:
        return sample
    return nn.functional.pad(sample, (0, 16, *(0, 40) * (sample.dim() - 2)))


def _trace(network: nn.Module, example: Any, *, open_batch: bool, shapes: ShapesCollection | None = None) -> Graph:
    positional, named = arguments(example)
    shapes = shapes_of(example) if open_batch else shapes
    try:
        # Before tracing, because some networks keep what they find out about the first inputs.
        places = tuple(place for place, _ in flatten(network(*positional, **named)))
        with without_branches():
            program = torch.export.export(network, positional, named, dynamic_shapes=shapes, strict=False)
        _drop_checks(program.graph_module)
        # The keywords of `Deployed.forward` are inputs by their own names.
        program._guards_code = [guard.replace("L['named']", "L") for guard in program._guards_code]
    except ModelError:
        raise
    except Exception as error:
        where = _module_of(error, network)
        raise ModelError(f"torch.export cannot trace {where}: {first_line(error)}") from error
    sizes = [
        node.meta["val"].size() for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    ]
    # A size that tracing fixed is still a symbol, one that reads as its number.
    decodes = any(isinstance(module, Decoding) or hasattr(module, "forget") for module in network.modules())
    batched = _batched(example) if open_batch else []
    is_open = bool(batched) and sum(bool(s) and not str(s[0]).isdigit() for s in sizes) == len(batched)
    return Graph(program, example, tuple(_input_names(positional, named)), places, is_open, decodes)


def _drop_checks(graph: torch.fx.GraphModule) -> None:
    """Leave out what only makes sure that conversions get the type that they got when traced; and, in a detector, the
    numbers of boxes that tracing takes for granted (at least two) though the operations do with none."""
    checks = [torch.ops.aten._assert_tensor_metadata.default]
    if found := finds_objects(graph):
        checks.append(torch.ops.aten._assert_scalar.default)
    for node in list(graph.graph.nodes):
        if node.target in checks:
            graph.graph.erase_node(node)
    if found:
        graph.graph.eliminate_dead_code()
    graph.recompile()


def _module_of(error: BaseException, network: nn.Module) -> str:
    """The innermost module that was at work when tracing failed."""
    names = {id(module): name for name, module in network.named_modules()}
    found, frame = "", error.__traceback__
    while frame is not None:
        found = names.get(id(frame.tb_frame.f_locals.get("self")), found) or found
        frame = frame.tb_next
    name = found.removeprefix("network").removeprefix(".network").removeprefix(".")
    return f"the network at '{name}' ({type(network.get_submodule(found)).__name__})" if name else "the network"


def samples_of(inputs: Any) -> list[Tensor] | None:
    """The list of samples, of sizes of their own, that inputs hold; None where they are tensors of batches."""
    parts = inputs if isinstance(inputs, tuple) else [inputs]
    return next((part for part in parts if isinstance(part, list)), None)


def shapes_of(example: Any) -> ShapesCollection:
    """What ``torch.export`` takes to leave the batch open."""
    shapes = ShapesCollection()
    for leaf in _batched(example):
        shapes[leaf] = {0: Dim.AUTO}
    return shapes


def _batched(example: Any) -> list[Tensor]:
    size = batch_size(example)
    return [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim() and leaf.size(0) == size]


def _input_names(positional: tuple[Any, ...], named: Mapping[str, Any]) -> Iterator[str]:
    single = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(positional)) == 1 and not named
    for place, _ in flatten(plain(positional)):
        yield "input" if single else ".".join(["input", *map(str, place)])
    for place, _ in flatten(plain(dict(named))):
        yield ".".join(map(str, place))


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines and prints of the exporters, whose remarks are about their own insides."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
