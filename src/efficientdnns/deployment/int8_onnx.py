"""Integer networks as ONNX files that ONNX Runtime computes in integers.

The file is in the QDQ form: every integer tensor is followed by a DequantizeLinear and every real one that becomes
integers by a QuantizeLinear, with int8 weights (a scale per channel), int32 biases and uint8 activations, placed so that
ONNX Runtime fuses all of them away: a convolution becomes QLinearConv, a residual addition QLinearAdd, the global average
pool QLinearGlobalAveragePool. What moves numbers without changing them (slices, padding, max pools, reshapes) works on the
integers themselves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from efficientdnns.deployment.extras import need
from efficientdnns.deployment.files import replacing
from efficientdnns.deployment.graph import Tracing, trace
from efficientdnns.deployment.onnx import write_graph
from efficientdnns.deployment.qdq import Rewriter
from efficientdnns.deployment.small_onnx import shrink
from efficientdnns.errors import ModelError
from efficientdnns.models.cifar_resnet import PadShortcut
from efficientdnns.parts.integer_layers import IntegerLayer, QuantizedConv2d
from efficientdnns.surgery import replace_module
from efficientdnns.surgery.remove import clone


def write_int8_onnx(model: nn.Module, example_input: Any, path: str | Path, **tracing: Unpack[Tracing]) -> Path:
    r"""Write a network of integer layers (the result of ``int8-quantization``) as an ONNX file in integers, atomically.

    The integer layers' own scales, zero points, weights and biases stand in the file; activations are shifted by 128
    from int8 to uint8, which means the same. A sum, a product, a concatenation or an average is rounded to the grid of
    the integer layer that reads it, also where something else, such as the next shortcut, reads it too: the residual
    stream is integers from end to end. A ReLU in front of a grid that starts at 0 is the grid's own lower end and falls
    away. Layers that stayed real are written in real numbers; one that stands between two integer layers is quantized by
    ONNX Runtime itself when it opens the file (it finds integers before and behind it), so it is real only at the ends.

    Bytes beside the int8 weights: 12 a channel (the weight's scale, the int32 bias and its scale), at most 450 a layer
    for its nodes and those of the additions around it, and 500 for the rest.

    Outputs differ from those of the network by what rounding does: ONNX Runtime multiplies accumulators by a float32
    (ties to even), the integer layers by a 32-bit fraction (ties away from zero), which is at most one step of the grid
    in a layer; and by the rounding of the residual stream, half a step an addition.

    Args: as `efficientdnns.deployment.onnx.write_onnx`.

    Raises:
        ModelError: there is no integer layer, or one that ONNX Runtime has no kernel for; the line says what to write
            instead. ConfigurationError: onnx or onnxscript is not installed.
    """
    need("onnx", "onnx", "onnxscript")
    path = Path(path)
    file = integer_file(model, example_input, **tracing)
    shrink(file)
    with replacing(path) as partial:
        partial.write_bytes(file.SerializeToString())
    return path


def integer_file(model: nn.Module, example_input: Any, **tracing: Unpack[Tracing]) -> Any:
    """The ONNX model of a network of integer layers, with the nodes of each layer called ``layer/number``; see
    `write_int8_onnx`."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, IntegerLayer)}
    _check(layers)
    file = real_file(model, example_input, **tracing)
    Rewriter(file.graph, layers).rewrite()
    return file


def real_file(model: nn.Module, example_input: Any, **tracing: Unpack[Tracing]) -> Any:
    """The ONNX model of the same graph in real numbers, with arbitrary weights in the place of integer layers'; nodes
    and results of these layers are called ``layer/...``."""
    import onnx

    graph = trace(real_image(model), example_input, coded=False, **tracing)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "real.onnx"
        write_graph(graph, path)
        file = onnx.load(path)
    layers = {f"network.{name}.weight" for name, module in model.named_modules() if isinstance(module, IntegerLayer)}
    outputs = {value.name for value in file.graph.output}
    new: dict[str, str] = {}
    if absent := layers - {tensor.name for tensor in file.graph.initializer}:
        raise ModelError(f"torch.onnx left out the weights of {len(absent)} integer layers ({sorted(absent)[0]})")
    for number, node in enumerate(file.graph.node):
        weight = next((name for name in node.input if name in layers), "")
        node.name = f"{weight.removeprefix('network.').removesuffix('.weight')}/{number}" if weight else ""
        before = new.get(node.input[0], "") if node.op_type == "Relu" and node.input else ""
        if (node.name or before) and node.output[0] not in outputs:
            new[node.output[0]] = (node.name or before) + ("/activation" if before else "")
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for value in file.graph.value_info:
        value.name = new.get(value.name, value.name)
    return file


def _check(layers: Mapping[str, IntegerLayer]) -> None:
    if not layers:
        raise ModelError("the network has no integer layer; run int8-quantization first or write format onnx")
    for name, layer in layers.items():
        options = layer.options
        if options["activation_bits"] != 8 and not options["dynamic"]:
            raise ModelError(
                f"'{name}' has activations of {options['activation_bits']} bits, ONNX Runtime's kernels take 8; "
                "write activation_bits: 8"
            )
        if not options["symmetric"]:
            raise ModelError(
                f"'{name}' has weights with a zero point, for which ONNX Runtime has no kernel; write symmetric: true"
            )


def may_saturate(layer: IntegerLayer) -> bool:
    """Whether sums of two products of this layer can leave 16 bits, as they are formed by processors without VNNI.

    There ONNX Runtime multiplies uint8 by int8 with an instruction that adds two products in 16 bits and clips the sum:
    results differ from those elsewhere. Its session option ``session.x64quantprecision`` = 1 takes slower exact kernels
    instead (and changes nothing where there is VNNI); weights of 7 bits (``weight_bits: 7``) are safe everywhere.
    """
    two = layer.weight.flatten(1).int().abs().topk(min(2, layer.weight[0].numel()), dim=1).values.sum(1)
    return int(two.max()) * 255 > 32767


class RealImage(nn.Module):
    """Stands for an integer layer in the graph that is traced: the same operation under the same name, with weights
    that are like no other's, so that the exporter takes no two layers for one. Any activation is a ReLU here."""

    def __init__(self, layer: IntegerLayer, number: int) -> None:
        super().__init__()
        self.layer = (layer,)
        shape = layer.weight.shape if isinstance(layer, QuantizedConv2d) else layer.weight.T.shape
        self.weight = nn.Parameter(torch.rand(shape, generator=torch.Generator().manual_seed(number)))

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.layer
        y = layer.accumulate(x, self.weight) if isinstance(layer, QuantizedConv2d) else x @ self.weight
        return y if layer.options["activation"] == "none" else torch.relu(y)


class SliceAndPad(nn.Module):
    """An option-A shortcut whose channels are a run with zero channels around it, in two operations."""

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.channels = stride, (before, after)

    def forward(self, x: Tensor) -> Tensor:
        # A pool of one pixel is a strided slice in one operation.
        x = nn.functional.max_pool2d(x, 1, self.stride)
        return nn.functional.pad(x, (0, 0, 0, 0, *self.channels))


def real_image(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with a `RealImage` for every integer layer and short graphs for shortcuts."""
    image = clone(model).eval()
    for number, (name, module) in enumerate(list(image.named_modules())):
        if isinstance(module, IntegerLayer):
            replace_module(image, name, RealImage(module, number))
        elif isinstance(module, PadShortcut) and (padding := _padding(module.index.tolist())):
            replace_module(image, name, SliceAndPad(module.stride, *padding))
    return image


def _padding(index: list[int]) -> tuple[int, int] | None:
    """Zero channels before and after, where the others are all input channels in order."""
    zero = max(index)
    before = next((i for i, source in enumerate(index) if source != zero), 0)
    after = next((i for i, source in enumerate(reversed(index)) if source != zero), 0)
    middle = index[before : len(index) - after]
    return (before, after) if middle == list(range(zero)) else None
