"""Convolutions and linear layers in integers: int8 weights, int32 biases and an exact reference kernel.

A layer quantizes its floating-point input on entry, computes in integers and returns floating-point numbers, so that it
stands in any network whatever lies between the layers. Two layers that share a grid hand integers to each other without
loss: quantizing a number that lies on the grid gives back its integer.
"""

from __future__ import annotations

import platform
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.parts.integer_arithmetic import INT32_MAX, requantize
from efficientdnns.parts.quantizer import QuantSpec, extremes, quantize, scale_and_zero_point
from efficientdnns.surgery import rebuildable

Activation = Literal["none", "relu", "relu6"]
Grid = tuple[Tensor, Tensor]
"""Scale and zero point."""


class IntegerLayer(nn.Module):
    r"""Base of `QuantizedConv2d` and `QuantizedLinear`: :math:`q_3 = Z_3 + M \sum_j (q_1 - Z_1)(q_2 - Z_2)`, M = S1 S2
    / S3.

    Padding is with Z1, the real number 0. Only scales are stored; the fixed-point multipliers follow from them.

    Args:
        shape: of the weight, output channels first.
        bias: whether there is one.
        weight_bits, activation_bits: 2 to 8.
        per_channel: a weight scale per output channel.
        symmetric: weights with zero point 0 on the narrow grid.
        dynamic: the input's range is that of each batch, and the output is not quantized.
        requantized: the output goes to a grid of its own; else the accumulator's value is returned as a real number.
        activation: the fused activation, a clamp of the output integers.
    """

    weight_buffers = ("weight", "bias")

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor
    output_scale: Tensor
    output_zero_point: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool = True,
        weight_bits: int = 8,
        activation_bits: int = 8,
        per_channel: bool = True,
        symmetric: bool = True,
        dynamic: bool = False,
        requantized: bool = True,
        activation: Activation = "none",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "per_channel": per_channel,
            "symmetric": symmetric,
            "dynamic": dynamic,
            "requantized": requantized and not dynamic,
            "activation": activation,
        }
        self.weight_spec = QuantSpec(weight_bits, symmetric, axis=0 if per_channel else None)
        self.activation_spec = QuantSpec(activation_bits)
        channels = (shape[0],) if per_channel else ()
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(channels))
        if not symmetric:
            self.register_buffer("weight_zero_point", torch.zeros(channels, dtype=torch.int8))
        self.register_buffer(
            "bias", torch.zeros(shape[0], dtype=torch.float32 if dynamic else torch.int32) if bias else None
        )
        for name in () if dynamic else ("input", "output")[: 1 + self.options["requantized"]]:
            self.register_buffer(f"{name}_scale", torch.ones(()))
            self.register_buffer(f"{name}_zero_point", torch.zeros((), dtype=torch.int32))
        self.largest_sum = 0
        self.register_load_state_dict_post_hook(IntegerLayer._measure)

    @torch.no_grad()
    def fill(
        self, weight: Tensor, bias: Tensor | None, inputs: Grid | None = None, outputs: Grid | None = None
    ) -> None:
        """Quantize real weights and biases and set the grids (none for a dynamic layer).

        The bias has the scale S1 S2. Where a channel's weights are so small that its bias would not fit 30 bits of that
        scale, the weight scale is raised until it does; a channel of zeros costs nothing by that.
        """
        scale, zero_point = scale_and_zero_point(*extremes(weight, self.weight_spec.axis), self.weight_spec)
        for name, grid in (("input", inputs), ("output", outputs)):
            if grid is not None:
                getattr(self, f"{name}_scale").copy_(grid[0])
                getattr(self, f"{name}_zero_point").copy_(grid[1])
        if bias is not None and inputs is not None:
            least = bias.abs() / (self.input_scale * 2.0**30)
            if self.weight_spec.axis is None:
                scale = torch.maximum(scale, least.max())
            else:
                empty = weight.flatten(1).abs().amax(1) == 0
                scale = torch.maximum(torch.where(empty & (least > 0), least, scale), least)
        self.weight_scale.copy_(scale)
        if not self.options["symmetric"]:
            self.weight_zero_point.copy_(zero_point)
        self.weight.copy_(quantize(weight, scale, zero_point, self.weight_spec).to(torch.int8))
        if self.bias is not None and bias is not None:
            exact = (
                bias
                if self.options["dynamic"]
                else (bias.double() / (self.input_scale.double() * scale.double())).round()
            )
            self.bias.copy_(exact)
        self._measure()

    def real_weight(self) -> Tensor:
        """The weights as real numbers, S2 (q2 - Z2)."""
        return self._centred(torch.float32) * self._per_output(self.weight_scale, self.weight.dim(), 0)

    def forward(self, x: Tensor) -> Tensor:
        spec, dtype = self.activation_spec, x.dtype
        if self.options["dynamic"]:
            scale, zero_point = scale_and_zero_point(*extremes(x), spec)
        else:
            scale, zero_point = self.input_scale.to(dtype), self.input_zero_point
        q = quantize(x, scale, zero_point, spec).sub_(zero_point)
        kind = torch.float32 if self._fits_float32(x.device) else torch.float64
        accumulator = self.accumulate(q.to(kind), self._centred(kind))
        channel = -3 if self.weight.dim() == 4 else -1
        real_scale = self._per_output(scale.double() * self.weight_scale.double(), accumulator.dim(), channel)
        bias = None if self.bias is None else self._per_output(self.bias, accumulator.dim(), channel)
        if self.options["dynamic"]:
            y = accumulator.to(dtype) * real_scale.to(dtype)
            return self._activate(y if bias is None else y + bias.to(dtype))
        total = accumulator.to(torch.int64)
        if bias is not None:
            total += bias
        if not self.options["requantized"]:
            return self._activate(total.to(dtype) * real_scale.to(dtype))
        low, high = self.limits()
        # q3 - Z3 rather than q3: the same clamp, shifted.
        zero, z3 = torch.zeros_like(self.output_zero_point), self.output_zero_point
        q = requantize(total, real_scale / self.output_scale.double(), zero, low - z3, high - z3)
        return q.to(dtype).mul_(self.output_scale.to(dtype))

    def accumulate(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sums of products of whole numbers in floating point; exact because every partial sum fits the
        mantissa."""
        raise TypeError(f"{type(self).__name__} does not say how it multiplies")

    def limits(self) -> tuple[Tensor, Tensor]:
        """Least and largest output integer after the fused activation."""
        spec = self.activation_spec
        low = self.output_zero_point.new_tensor(spec.low)
        high = self.output_zero_point.new_tensor(spec.high)
        if self.options["activation"] != "none":
            low = torch.maximum(low, self.output_zero_point)
        if self.options["activation"] == "relu6":
            six = self.output_zero_point + (6 / self.output_scale).round().to(torch.int32)
            high = torch.minimum(high, six)
        return low, high

    def _activate(self, y: Tensor) -> Tensor:
        return activate(y, self.options["activation"])

    def _centred(self, dtype: torch.dtype) -> Tensor:
        weight = self.weight.to(dtype)
        if self.options["symmetric"]:
            return weight
        return weight - self._per_output(self.weight_zero_point.to(dtype), weight.dim(), 0)

    def _fits_float32(self, device: torch.device) -> bool:
        # Whole numbers below 2^24 add up exactly in any order. Other processors' convolutions may take detours
        # (Winograd) that do not.
        return device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64") and self.largest_sum < 1 << 24

    def _measure(self, *_: Any) -> None:
        """Bound of the accumulator before the bias, from the weights that are there: once, not at every call."""
        weights = int(self._centred(torch.int16).abs().flatten(1).sum(1).max())
        self.largest_sum = weights * ((1 << self.activation_spec.bits) - 1)

    @staticmethod
    def _per_output(vector: Tensor, dims: int, channel: int) -> Tensor:
        if vector.dim() == 0:
            return vector
        shape = [1] * dims
        shape[channel] = -1
        return vector.view(shape)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config().items())

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"bias": self.bias is not None, **self.options}


@rebuildable
class QuantizedLinear(IntegerLayer):
    """A linear layer in integers, (..., in_features) -> (..., out_features); further arguments are those of
    `IntegerLayer`."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__((out_features, in_features), **options)
        self.in_features, self.out_features = in_features, out_features

    def accumulate(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def config(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, **super().config()}


@rebuildable
class QuantizedConv2d(IntegerLayer):
    """A convolution in integers with zero padding, grouped or not; further arguments are those of `IntegerLayer`.

    Args:
        kernel_size, stride, dilation: pairs. padding: a pair, 'same' or 'valid'.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        **options: Any,
    ) -> None:
        super().__init__((out_channels, in_channels // groups, *kernel_size), **options)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = tuple(kernel_size), tuple(stride), tuple(dilation)
        self.padding = padding if isinstance(padding, str) else tuple(padding)

    def accumulate(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def config(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "padding", "dilation")
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            **{name: value if isinstance(value := getattr(self, name), str) else list(value) for name in names},
            "groups": self.groups,
            **super().config(),
        }


def quantizable(layer: nn.Module) -> bool:
    """Whether an integer layer can take the place of ``layer``: a plain Conv2d with zero padding or Linear whose
    sums fit 32 bits."""
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and layer.weight[0].numel() * 127 * 255 < INT32_MAX
    return type(layer) is nn.Linear and layer.in_features * 127 * 255 < INT32_MAX


def integer_layer(layer: nn.Conv2d | nn.Linear, *, bias: bool, **options: Any) -> QuantizedConv2d | QuantizedLinear:
    """An integer layer of the geometry of ``layer``, still to be filled; ``options`` are those of `IntegerLayer`."""
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(layer.in_features, layer.out_features, bias=bias, **options)
    pairs = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    return QuantizedConv2d(layer.in_channels, layer.out_channels, **pairs, groups=layer.groups, bias=bias, **options)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation function itself."""
    return x if activation == "none" else x.clamp(min=0) if activation == "relu" else x.clamp(0, 6)
