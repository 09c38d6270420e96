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
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_leaves

from efficientdnns.data.nested import length
from efficientdnns.deployment.coded import Decoding, with_coded_weights
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

    Where the batch cannot stay open, because the network computes with its size or is asked not to, it is fixed to
    ``batch``, by default that of ``example_input``. With ``coded`` weights that are smaller so are kept as codes.

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
        lists = _holds_list(example)
        if dynamic_batch and not lists:
            # Two samples, because torch.export takes a size of one for a constant.
            size = max(2, batch or batch_size(example))
            graph = _trace(network, with_batch(example, size), open_batch=True)
            if graph.dynamic_batch:
                return graph
        note = "the network computes with the size of its batch" if dynamic_batch else ""
        if dynamic_batch and lists:
            note = "the network takes a list of samples"
        if batch is not None and not lists:
            example = with_batch(example, batch)
        return dataclasses.replace(_trace(network, example, open_batch=False), note=note)


def _trace(network: nn.Module, example: Any, *, open_batch: bool) -> Graph:
    positional, named = arguments(example)
    shapes = shapes_of(example) if open_batch else None
    try:
        program = torch.export.export(network, positional, named, dynamic_shapes=shapes, strict=False)
        _drop_checks(program.graph_module)
        places = tuple(place for place, _ in flatten(network(*positional, **named)))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"torch.export cannot trace the network: {first_line(error)}") from error
    sizes = [
        node.meta["val"].size() for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    ]
    # A size that tracing fixed is still a symbol, one that reads as its number.
    decodes = any(isinstance(module, Decoding) or hasattr(module, "forget") for module in network.modules())
    batched = _batched(example) if open_batch else []
    is_open = bool(batched) and sum(bool(s) and not str(s[0]).isdigit() for s in sizes) == len(batched)
    return Graph(program, example, tuple(_input_names(positional, named)), places, is_open, decodes)


def _drop_checks(graph: torch.fx.GraphModule) -> None:
    """Leave out what only makes sure that conversions get the type that they got when traced."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
    graph.recompile()


def _holds_list(inputs: Any) -> bool:
    return isinstance(inputs, list) or (isinstance(inputs, tuple) and any(isinstance(part, list) for part in inputs))


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


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


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
