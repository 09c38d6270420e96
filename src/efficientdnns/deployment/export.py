"""From a network to a file: written, opened again, compared on inputs, and measured."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from efficientdnns.data.nested import cut, length
from efficientdnns.deployment.extras import need
from efficientdnns.deployment.files import first_line
from efficientdnns.deployment.graph import Graph, call, samples_of, trace
from efficientdnns.deployment.integers import has_integers, write_integers
from efficientdnns.deployment.opened import Network, difference, in_batches, resized
from efficientdnns.errors import ConfigurationError, EfficientDNNsError, ModelError, suggest
from efficientdnns.measurement.inference import Forward, evaluating

AGREEMENT = 1e-3
"""Mean difference from the network's outputs, as a share of the largest of them, beyond which a file is refused. A
rounding that falls the other way in a quantized network moves a few outputs by a step, a wrong file moves most."""
COARSE = 0.2
"""The same for files in other integers than the network's."""
SIZES = (5, 2)
"""Samples of the two batches on which a file is compared."""


@dataclass(frozen=True)
class Format:
    """A kind of file. ``module`` has ``write_graph(graph, path, calibration)`` and ``open_file(path, threads)``."""

    file: str
    """Its name in the folder of a result."""
    module: str
    runtime: str
    """The package that opens it."""
    extra: str = ""
    packages: tuple[str, ...] = ()
    open_batch: bool = True
    """Whether a file can take any number of samples; else it is made for one."""
    coded: bool = True
    """Whether weights that are smaller so are kept as codes and decoded by the file."""
    exact: bool = True
    """Whether it computes the same up to rounding; else weights and activations are quantized on the way."""


FORMATS = {
    "pt2": Format("model.pt2", "pt2", "torch"),
    "onnx": Format("model.onnx", "onnx", "onnxruntime", "onnx", ("onnx", "onnxscript", "onnxruntime")),
    "torchao": Format("model-torchao.pt2", "torchao", "torch", "torchao", ("torchao",), coded=False, exact=False),
    "openvino": Format("model.xml", "openvino", "openvino", "openvino", ("openvino", "onnx", "onnxscript")),
    "executorch": Format(
        "model.pte", "executorch", "executorch", "executorch", ("executorch",), open_batch=False, coded=False
    ),
}
DEFAULT = ("pt2", "onnx")
"""What comes with every result."""
LARGEST = 2 << 30
"""Bytes of weights up to which a result comes with exported files; beyond, they are made on request."""


class Exported(BaseModel):
    """One exported file, as ``report.json`` lists it; with an ``error`` there is no file, and this is why."""

    model_config = ConfigDict(frozen=True)

    format: str
    path: Path | None = Field(default=None, exclude=True)
    file: str | None = None
    """Its name."""
    bytes: int | None = None
    """Its size, with the weights where they lie in a file of their own."""
    dynamic_batch: bool | None = None
    """Whether it takes any number of samples."""
    batch: int | None = None
    """The number it takes, where it takes but one."""
    sizes: tuple[int, ...] | None = None
    """Shape of the samples where they come in a list, and it takes them in this shape only."""
    opened_with: str | None = None
    max_difference: float | None = None
    """Largest absolute difference between its outputs and the network's; of a detector's, but for the farthest tenth."""
    largest_output: float | None = None
    """The largest absolute output of the network, to compare with."""
    compared: int = 0
    """Samples compared, in batches of two sizes."""
    metric: dict[str, Any] | None = None
    """The task's metric of the file: {name, value, split, n, network}, ``network`` being that of the network on the same
    samples."""
    note: str = ""
    error: str = ""

    @property
    def gap(self) -> float | None:
        """How far the file's metric lies above the network's."""
        return None if self.metric is None else self.metric["value"] - self.metric["network"]

    def __str__(self) -> str:
        if self.error:
            return self.error
        size = "any batch" if self.dynamic_batch else f"batch {self.batch}"
        return (
            f"{self.bytes:,} bytes, {size}, opened with {self.opened_with}, outputs within {self.max_difference:.1e} of "
            f"the network's (largest {self.largest_output:.3g}, {self.compared} samples)"
            + (f"; {self.note}" if self.note else "")
        )


def export(
    model: nn.Module,
    example_input: Any,
    directory: str | Path,
    format: str = "onnx",
    *,
    file: str | Path | None = None,
    batch: int | None = None,
    forward: Forward | None = None,
    samples: Any = None,
    calibration: Iterable[Any] = (),
) -> Exported:
    """Write ``model`` in ``format``, open the file again and compare.

    Args:
        example_input: inputs as the network takes them: a tensor, a tuple (arguments) or a mapping (keywords).
        directory: where to, under the format's usual name unless ``file`` gives another path.
        format: ``onnx``, ``pt2``, ``torchao``, ``openvino`` or ``executorch``.
        batch: fix the batch to this size; by default it stays open where the network lets it.
        forward: ``forward(model, inputs)`` where calling the model is not enough.
        samples: real inputs to compare on, at least a few; by default repetitions of ``example_input``.
        calibration: batches of inputs for formats that quantize activations.

    Raises:
        ConfigurationError: an unknown format, or its packages are not installed.
        ModelError: it cannot be exported, or the file does not compute what the network computes.
    """
    known = check_format(format)
    if batch is not None and batch < 1:
        raise ConfigurationError(f"batch is {batch}, expected at least 1")
    need(known.extra, *known.packages)
    graph = _traced(model, example_input, known, forward, batch)
    path = Path(file) if file is not None else Path(directory) / known.file
    exported, _ = _write(graph, model, path, format, forward, samples, calibration)
    return exported


def export_all(
    model: nn.Module,
    example_input: Any,
    directory: str | Path,
    formats: Sequence[str] = DEFAULT,
    *,
    forward: Forward | None = None,
    samples: Any = None,
    calibration: Iterable[Any] = (),
) -> list[tuple[Exported, Network | None]]:
    """Write several formats from one trace; what cannot be written is listed with the reason. Nothing is raised.

    Returns each file with what it opened as; an older file of a format that cannot be written now is removed.
    """
    for format in formats:
        check_format(format)
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    graphs: dict[tuple[bool, bool], Graph | ModelError] = {}
    found: list[tuple[Exported, Network | None]] = []
    for format in formats:
        path = Path(directory) / FORMATS[format].file
        try:
            if size > LARGEST:
                raise ModelError(f"{size:,} bytes of weights become a file on request only; write efficientdnns export")
            known = FORMATS[format]
            need(known.extra, *known.packages)
            key = known.open_batch, known.coded
            if key not in graphs:
                try:
                    graphs[key] = _traced(model, example_input, known, forward)
                except ModelError as error:
                    graphs[key] = error
            if isinstance(graph := graphs[key], ModelError):
                raise graph
            found.append(_write(graph, model, path, format, forward, samples, calibration))
        except EfficientDNNsError as error:
            discard(directory, format)
            found.append((Exported(format=format, error=" ".join(str(error).split())), None))
    return found


def _traced(
    model: nn.Module, example_input: Any, known: Format, forward: Forward | None, batch: int | None = None
) -> Graph:
    open_batch = known.open_batch and batch is None
    fixed = batch if known.open_batch else batch or 1
    return trace(model, example_input, dynamic_batch=open_batch, batch=fixed, forward=forward, coded=known.coded)


def discard(directory: str | Path, format: str) -> None:
    """Remove the file of a format from a folder."""
    for file in _files(Path(directory) / FORMATS[format].file):
        file.unlink()


def check_format(name: str) -> Format:
    """The format of this name.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in FORMATS:
        raise ConfigurationError(f"no format is called '{name}'{suggest(name, FORMATS)}")
    return FORMATS[name]


def _write(
    graph: Graph,
    model: nn.Module,
    path: Path,
    format: str,
    forward: Forward | None,
    samples: Any,
    calibration: Iterable[Any],
) -> tuple[Exported, Network]:
    known = FORMATS[format]
    module = importlib.import_module(f"efficientdnns.deployment.{known.module}")
    exact, note = known.exact, graph.note
    if has_integers(model):
        exact = format == "pt2"
        note = "; ".join(filter(None, [note, write_integers(format, graph, model, path, forward)]))
    else:
        module.write_graph(graph, path, calibration)
    network: Network = module.open_file(path, torch.get_num_threads())
    batch = None if graph.dynamic_batch else graph.batch
    if batch is not None:
        network = in_batches(network, batch)
    try:
        if samples is None:
            samples = resized(graph.example, sum(SIZES))
        if graph.sizes is not None:
            samples = of_shape(samples, graph.sizes) or samples_of(graph.example)
        facts = compare(model, network, samples, forward=forward, exact=exact)
    except EfficientDNNsError:
        for file in _files(path):
            file.unlink()
        raise
    exported = Exported(
        format=format,
        path=path,
        file=path.name,
        bytes=sum(file.stat().st_size for file in _files(path)),
        dynamic_batch=graph.dynamic_batch,
        batch=batch,
        sizes=graph.sizes,
        opened_with=f"{known.runtime} {importlib.metadata.version(known.runtime)}",
        note=note,
        **facts,
    )
    return exported, network


def compare(
    model: nn.Module, network: Network, samples: Any, *, forward: Forward | None = None, exact: bool = True
) -> dict[str, Any]:
    """The outputs of a network and of an opened file on batches of two sizes: the fields of `Exported` about them.

    Raises:
        ModelError: they differ by more than rounding (unless ``exact``: quantization) explains, in number or in shape.
    """
    largest = scale = mean = 0.0
    with evaluating(model):
        for inputs in _batches(samples):
            expected = (forward or call)(model, inputs)
            try:
                got = network(inputs)
            except EfficientDNNsError:
                raise
            except Exception as error:
                raise ModelError(f"the opened file cannot be run: {first_line(error)}") from error
            found = difference(expected, got)
            largest, mean, scale = max(largest, found[0]), max(mean, found[1]), max(scale, found[2])
    if not math.isfinite(largest) or mean > (AGREEMENT if exact else COARSE) * max(scale, 1e-6):
        raise ModelError(
            f"the opened file differs from the network by up to {largest:.3g}, its outputs being at most {scale:.3g}"
        )
    return {"max_difference": largest, "largest_output": scale, "compared": length(samples)}


def of_shape(samples: Any, shape: Sequence[int]) -> list[Tensor]:
    """Those of a list of samples that have this shape."""
    return [sample for sample in samples_of(samples) or () if tuple(sample.shape) == tuple(shape)]


def _batches(samples: Any) -> list[Any]:
    """Batches of two sizes."""
    count = length(samples)
    some = max(count - SIZES[1], 1)
    return [cut(samples, part) for part in (slice(0, some), slice(some, count)) if part.stop > part.start]


def _files(path: Path) -> list[Path]:
    """The file and those that belong to it."""
    beside = [path.with_name(path.name + ".data"), *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    return [file for file in (path, *beside) if file.is_file()]
