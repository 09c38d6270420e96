"""Where quantizers belong in a network, and the layers that imitate integer arithmetic while a network is calibrated
or trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.parts.integer_layers import Activation, activate, integer_layer, quantizable
from efficientdnns.parts.observer import Observer
from efficientdnns.parts.quantizer import QuantSpec, extremes, fake_quantize, scale_and_zero_point
from efficientdnns.surgery import ChannelGraph, Node, get_module, replace_module
from efficientdnns.surgery.trace import Inputs

# What hands integers on as they are: a layer after these reads the grid of the layer before.
KEEPS_GRID = {
    *(
        "relu",
        "max_pool1d",
        "max_pool2d",
        "flatten",
        "view",
        "reshape",
        "unsafe_view",
        "unflatten",
        "squeeze",
        "unsqueeze",
    ),
    *("permute", "transpose", "t", "dropout", "clone", "contiguous"),
}


@dataclass(frozen=True)
class Place:
    """One layer to be quantized.

    Attributes:
        name: path of the layer.
        norm: path of the batch norm that alone reads it, or None.
        activation: the activation that alone reads it (or its norm).
        source: path of the layer whose output grid its input is on, or None where the input needs a quantizer of its
            own.
        is_output: the network's output is this layer's output, which is then not quantized.
    """

    name: str
    norm: str | None
    activation: Activation
    source: str | None
    is_output: bool


def places(model: nn.Module, example_inputs: Inputs, skip: tuple[str, ...] = ()) -> tuple[list[Place], list[str]]:
    """The layers that can be quantized, in execution order, and the names of Conv, Linear and recurrent layers that
    stay real.

    Left alone are layers that match ``skip`` (patterns such as ``layer1.*``), are called more or less often than once,
    share their weights, or that no integer layer can replace (`quantizable`).
    """
    graph = ChannelGraph.trace(model, example_inputs, verify=False)
    uses = [name for node in graph.nodes for name in node.parameters]
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
        name for name, _ in model.named_parameters()
    }
    shared = {id(model.get_parameter(name)) for name in tied}
    found: dict[str, Node] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.RNNBase | nn.MultiheadAttention):
            continue
        nodes = [node for node in graph.nodes if f"{name}.weight" in node.parameters and node.module == name]
        once = len(nodes) == 1 and uses.count(f"{name}.weight") == 1 and nodes[0].operation in ("conv2d", "linear")
        if once and quantizable(module) and id(module.weight) not in shared and not matches(name, skip):
            found[name] = nodes[0]
        else:
            left.append(name)
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for source in node.inputs:
            readers.setdefault(source, []).append(node)
    by_name = {node.name: node for node in graph.nodes}
    result: dict[str, Place] = {}
    last: dict[str, str] = {}
    for name, node in sorted(found.items(), key=lambda item: graph.nodes.index(item[1])):
        norm = _batch_norm(graph, model, name)
        end = node if norm is None else readers[node.name][0]
        activation: Activation = "none"
        if end.name not in graph.outputs and len(readers.get(end.name, ())) == 1:
            reader = readers[end.name][0]
            activation = _activation(model, reader)
            end = reader if activation != "none" else end
        result[name] = Place(
            name, norm, activation, _source(node, by_name, last), _reaches_output(end, readers, graph.outputs)
        )
        last[end.name] = name
    dead = {place.name for place in result.values() if place.is_output}
    ordered = [
        p if p.source not in dead else Place(p.name, p.norm, p.activation, None, p.is_output) for p in result.values()
    ]
    return ordered, left


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether ``name`` is one of the names or fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _batch_norm(graph: ChannelGraph, model: nn.Module, name: str) -> str | None:
    norm = graph.batch_norm_after(name)
    if norm is None:
        return None
    module = get_module(model, norm)
    calls = [node.module for node in graph.nodes if node.operation == "batch_norm"].count(norm)
    return (
        norm
        if calls == 1 and isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        else None
    )


def _activation(model: nn.Module, node: Node) -> Activation:
    if node.operation == "relu":
        return "relu"
    six = node.operation == "relu6" or (
        node.operation in ("hardtanh", "clamp") and isinstance(get_module(model, node.module), nn.ReLU6)
    )
    return "relu6" if six else "none"


def _source(node: Node, by_name: dict[str, Node], last: dict[str, str]) -> str | None:
    """The quantized layer from which the input of ``node`` comes through nothing but operations that keep the grid."""
    while len(node.inputs) == 1 or node.operation in ("conv2d", "linear"):
        before = node.inputs[0] if node.inputs else ""
        if before in last:
            return last[before]
        if before not in by_name or by_name[before].operation not in KEEPS_GRID:
            return None
        node = by_name[before]
    return None


def _reaches_output(node: Node, readers: dict[str, list[Node]], outputs: tuple[str, ...]) -> bool:
    while node.name not in outputs:
        after = readers.get(node.name, [])
        if len(after) != 1 or after[0].operation not in KEEPS_GRID - {"relu"}:
            return False
        node = after[0]
    return True


class ActivationQuantizer(nn.Module):
    """Observes a tensor and, where ``quantizing``, quantizes and dequantizes it.

    It observes in training mode, and in eval mode where ``calibrating``.
    """

    def __init__(self, spec: QuantSpec, observer: Observer) -> None:
        super().__init__()
        self.spec, self.observer = spec, observer
        self.quantizing = self.calibrating = False

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range observed so far."""
        return scale_and_zero_point(*self.observer.range(), self.spec)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.calibrating:
            self.observer(x)
        return fake_quantize(x, *self.grid(), self.spec) if self.quantizing else x


class FakeQuantizedLayer(nn.Module):
    r"""A Conv2d or Linear with its batch norm and activation, computing in real numbers what the integer layer will
    compute.

    The weight that is quantized is the folded one, :math:`\gamma w / \sqrt{EMA(\sigma^2) + \epsilon}`. The
    convolution's result is divided by the same factor again and normalised by the live batch norm, so that the batch's
    own statistics train the network while the quantizer sees the steady fold.

    Attributes: ``weight`` and ``bias`` are the parameters of the layer replaced, under their old names; ``norm`` its
    batch norm or None; ``inputs`` and ``outputs`` the quantizers, None where the grid is another layer's or there is
    none.
    """

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        norm: nn.Module | None,
        activation: Activation,
        weight_spec: QuantSpec,
        inputs: ActivationQuantizer | None,
        outputs: ActivationQuantizer | None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.layer = (layer,)  # its geometry; in a tuple, so that it is no submodule
        self.norm, self.activation, self.weight_spec = norm, activation, weight_spec
        self.inputs, self.outputs = inputs, outputs
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None:
            x = self.inputs(x)
        factor = self._fold_factor()
        weight = self.weight if factor is None else self.weight * factor.view(-1, *[1] * (self.weight.dim() - 1))
        grid = scale_and_zero_point(*extremes(weight, self.weight_spec.axis), self.weight_spec)
        weight = fake_quantize(weight, *grid, self.weight_spec)
        if self.norm is None or factor is None:
            y = self._multiply(x, weight, self.bias)
        else:
            y = self._multiply(x, weight, None) / factor.view(-1, *[1] * (self.weight.dim() - 2))
            y = self.norm(y if self.bias is None else y + self.bias.view(-1, *[1] * (self.weight.dim() - 2)))
        y = activate(y, self.activation)
        return y if self.outputs is None else self.outputs(y)

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the batch norm's running statistics folded in."""
        norm: Any = self.norm
        if norm is None:
            return self.weight.detach(), None if self.bias is None else self.bias.detach()
        factor = torch.rsqrt(norm.running_var + norm.eps) * (1.0 if norm.weight is None else norm.weight)
        shift = ((0.0 if self.bias is None else self.bias) - norm.running_mean) * factor
        weight = self.weight * factor.view(-1, *[1] * (self.weight.dim() - 1))
        return weight, shift + (0.0 if norm.bias is None else norm.bias)

    def release(self) -> None:
        """Let go of the float tensors; the layer is of use for its quantizers' grids alone."""
        self.weight = self.bias = self.norm = None  # type: ignore[assignment]
        self.layer = ()  # type: ignore[assignment]

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (layer,) = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    def _fold_factor(self) -> Tensor | None:
        norm: Any = self.norm
        if norm is None:
            return None
        factor = torch.rsqrt(norm.running_var + norm.eps)
        # A channel that was pruned (gamma = 0) could not be divided by its factor.
        return factor if norm.weight is None else factor * torch.where(norm.weight == 0, 1.0, norm.weight)


def prepare(
    model: nn.Module,
    plan: Sequence[Place],
    weight_spec: QuantSpec,
    activation_spec: QuantSpec,
    observer: Callable[[], Observer],
) -> dict[str, FakeQuantizedLayer]:
    """Put a `FakeQuantizedLayer` in the place of every layer of ``plan`` (in place), and return them by name, in
    order."""
    layers: dict[str, FakeQuantizedLayer] = {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def quantizer(wanted: bool) -> ActivationQuantizer | None:
        return ActivationQuantizer(activation_spec, observer()).to(device) if wanted else None

    for place in plan:
        layer: Any = get_module(model, place.name)
        norm = None if place.norm is None else get_module(model, place.norm)
        inputs, outputs = quantizer(place.source is None), quantizer(not place.is_output)
        layers[place.name] = FakeQuantizedLayer(layer, norm, place.activation, weight_spec, inputs, outputs)
        replace_module(model, place.name, layers[place.name])
        if place.norm is not None:
            replace_module(model, place.norm, nn.Identity())
    return layers


def quantizers(layers: Mapping[str, FakeQuantizedLayer]) -> Iterator[ActivationQuantizer]:
    """All activation quantizers."""
    for layer in layers.values():
        yield from (q for q in (layer.inputs, layer.outputs) if q is not None)


def convert(
    model: nn.Module, plan: Sequence[Place], layers: Mapping[str, FakeQuantizedLayer], dynamic: bool = False
) -> None:
    """Put integer layers in the places of the imitating ones (in place), with the ranges that were observed."""
    for place in plan:
        fake = layers[place.name]
        weight, bias = fake.folded()
        inputs = outputs = None
        bits = 8
        if not dynamic:
            entry = fake.inputs if place.source is None else layers[place.source].outputs
            assert entry is not None
            inputs, bits = entry.grid(), entry.spec.bits
            outputs = None if fake.outputs is None else fake.outputs.grid()
        new = integer_layer(
            fake.layer[0],
            bias=bias is not None,
            weight_bits=fake.weight_spec.bits,
            activation_bits=bits,
            per_channel=fake.weight_spec.axis is not None,
            symmetric=fake.weight_spec.symmetric,
            dynamic=dynamic,
            requantized=outputs is not None,
            activation=place.activation,
        ).to(weight.device)
        new.fill(weight, bias, inputs, outputs)
        replace_module(model, place.name, new.train(fake.training))
