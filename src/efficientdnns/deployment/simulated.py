"""Integer layers in floating point, for graphs whose runtime has no kernel for their integers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from efficientdnns.parts.integer_layers import IntegerLayer, QuantizedConv2d, activate
from efficientdnns.parts.quantizer import extremes, quantize, scale_and_zero_point
from efficientdnns.surgery import replace_module


class Simulated(nn.Module):
    """What an integer layer computes: the same grids and int8 weights, sums and scaling in float32.

    Equal to it but for results that lie between two integers of the output's grid as nearly as float32 can tell.
    """

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        layer, spec = self.layer, self.layer.activation_spec
        if layer.options["dynamic"]:
            scale, zero_point = scale_and_zero_point(*extremes(x), spec)
        else:
            scale, zero_point = layer.input_scale, layer.input_zero_point
        wide = isinstance(layer, QuantizedConv2d)
        weight = layer.weight.float()
        if not layer.options["symmetric"]:
            weight = weight - _spread(layer.weight_zero_point.float(), weight.dim() - 1)
        total = layer.accumulate(quantize(x, scale, zero_point, spec) - zero_point, weight)
        factor = scale * _spread(layer.weight_scale, 2 * wide)
        bias = None if layer.bias is None else _spread(layer.bias.float(), 2 * wide)
        if layer.options["dynamic"]:
            y = total * factor
            return activate(y if bias is None else y + bias, layer.options["activation"])
        if bias is not None:
            total = total + bias
        if not layer.options["requantized"]:
            return activate(total * factor, layer.options["activation"])
        low, high = ((limit - layer.output_zero_point).float() for limit in layer.limits())
        whole = (total * (factor / layer.output_scale)).round()
        return torch.minimum(torch.maximum(whole, low), high) * layer.output_scale


def simulated(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with a `Simulated` for every integer layer."""
    copied = copy.deepcopy(model).eval()
    for name, module in list(copied.named_modules()):
        if isinstance(module, IntegerLayer):
            replace_module(copied, name, Simulated(module))
    return copied


def _spread(vector: Tensor, dimensions: int) -> Tensor:
    """Give a vector over channels ``dimensions`` more behind it; a number stays."""
    return vector if vector.dim() == 0 else vector.view(-1, *[1] * dimensions)
