"""ONNX files: written from the traced graph, opened with ONNX Runtime."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from efficientdnns.deployment.extras import need
from efficientdnns.deployment.files import first_line, opening, replacing
from efficientdnns.deployment.graph import Graph, Path_, Tracing, quiet, trace, unflatten
from efficientdnns.deployment.processor import compute_exactly
from efficientdnns.errors import DataError, ModelError

OUTPUTS = "efficientdnns.outputs"
"""Key of the file's metadata under which the places of the outputs are kept."""
_FOLDED = 64
"""Elements up to which constants are computed when a file with coded weights is written: the rest is decoded on opening."""


def write_onnx(model: nn.Module, example_input: Any, path: Path, **tracing: Unpack[Tracing]) -> Path:
    """Write ``model`` as an ONNX file, atomically.

    Inputs are called ``input``, ``input.0``, ... or as in a mapping; outputs ``output``, ``output.0``, ... or as in the
    dictionary that the network returns. The first dimension is called ``batch`` and stays open where the network lets it.
    Weights beyond 2 GB lie beside the file in ``<name>.data``.

    Args: ``example_input`` and ``tracing`` (``dynamic_batch``, ``batch``, ``forward``) as `trace` takes them.

    Raises:
        ConfigurationError: onnx or onnxscript is not installed. ModelError: the network cannot be traced or written.
    """
    write_graph(trace(model, example_input, **tracing), Path(path))
    return Path(path)


def write_graph(graph: Graph, path: Path, calibration: Any = ()) -> None:
    """Write a traced network as an ONNX file; see `write_onnx`."""
    need("onnx", "onnx", "onnxscript")
    try:
        with quiet():
            program = torch.onnx.export(
                graph.program,
                dynamo=True,
                verbose=False,
                input_names=graph.inputs,
                output_names=graph.outputs,
                optimize=not graph.decodes,
            )
            assert program is not None
            if graph.decodes:
                from onnxscript import optimizer

                optimizer.optimize(program.model, input_size_limit=_FOLDED)
    except Exception as error:
        raise ModelError(f"torch.onnx cannot write this network: {_cause(error)}") from error
    program.model.metadata_props[OUTPUTS] = json.dumps(graph.places)
    _tidy(program.model, graph.dynamic_batch)
    with replacing(path) as partial:
        program.save(partial)


class OnnxNetwork:
    """An ONNX file in ONNX Runtime on the CPU, called like the network it was made from; see `open_onnx`."""

    runtime = "onnxruntime"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        need("onnx", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        compute_exactly(options)
        with opening(path, "an ONNX file", "ONNX Runtime"):
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        kept = self.session.get_modelmeta().custom_metadata_map.get(OUTPUTS)
        default: list[Path_] = [()] if len(self.outputs) == 1 else [(name,) for name in self.outputs]
        self.places = [tuple(place) for place in json.loads(kept)] if kept else default

    def __call__(self, inputs: Any) -> Any:
        """The outputs: a tensor, or tuples and named `Outputs` of them as the network gave them."""
        found = self.session.run(None, feed(self.inputs, inputs))
        return unflatten(self.places, [torch.from_numpy(array) for array in found])


def open_onnx(path: Path, threads: int | None = None) -> OnnxNetwork:
    """Open an ONNX file with ONNX Runtime (CPU) and return a function of inputs: tensors in, tensors out.

    Args:
        threads: CPU threads, by default what ONNX Runtime chooses.

    Raises:
        ConfigurationError: onnxruntime is not installed. FileFormatError: no ONNX file, or one it cannot run.
    """
    return OnnxNetwork(Path(path), threads)


open_file = open_onnx


def feed(names: Sequence[str], inputs: Any) -> dict[str, Any]:
    """The arrays of ``inputs`` by the names of a file's inputs.

    Raises:
        DataError: there are more or fewer.
    """
    if isinstance(inputs, Mapping) and all(name in inputs for name in names):
        return {name: _array(inputs[name]) for name in names}
    tensors = [leaf for leaf in tree_leaves(inputs) if hasattr(leaf, "shape")]
    if len(tensors) != len(names):
        raise DataError(f"the file takes {len(names)} inputs ({', '.join(names)}), got {len(tensors)}")
    return {name: _array(tensor) for name, tensor in zip(names, tensors)}


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _tidy(model: Any, dynamic_batch: bool) -> None:
    """Call an open batch 'batch' and leave out notes about where each node came from, which are half of a small
    file and hold paths of the machine that wrote it."""
    symbols = (str(d) for value in model.graph.inputs for d in value.shape if not isinstance(d, int))
    symbol = next(symbols, None) if dynamic_batch else None
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if symbol and not isinstance(size, int):
                value.shape[axis] = re.sub(rf"\b{re.escape(symbol)}\b", "batch", str(size))
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for function in model.functions.values():
        for node in function:
            node.metadata_props.clear()
    for value in values:
        value.metadata_props.clear()


def _cause(error: BaseException) -> str:
    """The innermost reason; the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
