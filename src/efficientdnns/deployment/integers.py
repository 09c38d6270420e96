"""Networks of integer layers (the result of ``int8-quantization``) in each runtime's own integers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from efficientdnns.deployment import executorch, onnx, openvino, pt2
from efficientdnns.deployment.decomposed import decomposed
from efficientdnns.deployment.graph import Graph, trace
from efficientdnns.deployment.int8_onnx import may_saturate, write_int8_onnx
from efficientdnns.deployment.processor import NOTE, lacks_vnni
from efficientdnns.deployment.simulated import simulated
from efficientdnns.errors import ModelError
from efficientdnns.measurement.inference import Forward
from efficientdnns.parts.integer_layers import IntegerLayer


def has_integers(model: nn.Module) -> bool:
    """Whether there is an integer layer in ``model``."""
    return any(isinstance(module, IntegerLayer) for module in model.modules())


def write_integers(format: str, graph: Graph, model: nn.Module, path: Path, forward: Forward | None) -> str:
    """Write ``model``, traced as ``graph``; returns a note.

    ``pt2`` keeps the exact integer arithmetic of the layers. The others use the kernels of their runtime, whose rounding
    may differ by a step of the grid in a layer; where it has none for these layers (other than 8 bits, weights with a zero
    point), int8 weights are computed with in floating point.

    Raises:
        ModelError: it cannot be written.
    """
    if format == "pt2":
        pt2.write_graph(graph, path)
        return "exact integer arithmetic"
    try:
        _write(format, graph, model, path, forward)
        layers = (module for module in model.modules() if isinstance(module, IntegerLayer))
        clips = format == "onnx" and lacks_vnni() and any(may_saturate(layer) for layer in layers)
        return f"computes in int8; {NOTE}" if clips else "computes in int8"
    except ModelError as error:
        if format == "torchao":
            raise
        plain = trace(simulated(model), graph.example, dynamic_batch=graph.dynamic_batch, forward=forward)
        {"onnx": onnx, "openvino": openvino, "executorch": executorch}[format].write_graph(plain, path)
        return f"int8 weights, computed with in floating point: {error}"


def _write(format: str, graph: Graph, model: nn.Module, path: Path, forward: Forward | None) -> None:
    example, open_batch = graph.example, graph.dynamic_batch
    if format == "onnx":
        write_int8_onnx(model, example, path, dynamic_batch=open_batch, forward=forward)
    elif format == "openvino":
        with tempfile.TemporaryDirectory() as folder:
            source = write_int8_onnx(model, example, Path(folder) / "x.onnx", dynamic_batch=open_batch, forward=forward)
            openvino.from_onnx(source, path, graph.places)
    else:
        signed = format == "executorch"
        traced = trace(decomposed(model, signed=signed), example, dynamic_batch=open_batch, forward=forward)
        (executorch if signed else pt2).write_graph(traced, path)
