"""Integer layers in PyTorch's own quantization operations, which Inductor, torchao and XNNPACK know how to fuse."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from efficientdnns.errors import ModelError
from efficientdnns.parts.integer_layers import Grid, IntegerLayer, activate
from efficientdnns.surgery import replace_module


class Decomposed(nn.Module):
    """An integer layer as quantize, dequantize, the operation in real numbers, quantize, dequantize: the pattern that
    stands for the integer operation.

    Args:
        layer: static, symmetric, with 8-bit activations.
        signed: int8 activations (XNNPACK), else uint8 (x86), which means the same 128 higher.
    """

    def __init__(self, layer: IntegerLayer, signed: bool) -> None:
        super().__init__()
        o = layer.options
        if o["dynamic"] or not o["symmetric"] or o["activation_bits"] != 8:
            raise ModelError("only static 8-bit activations and symmetric weights have integer kernels in PyTorch")
        self.layer, self.activation = (layer,), o["activation"]
        low = layer.activation_spec.low
        self.low, self.high, self.dtype = (-128, 127, torch.int8) if signed else (0, 255, torch.uint8)
        self.shift = self.low - low
        self.register_buffer("weight", layer.weight)
        shape = (layer.weight.shape[0],)
        self.register_buffer("scale", layer.weight_scale.expand(shape).clone())
        self.register_buffer("zero", torch.zeros(shape, dtype=torch.int64))
        bias = None
        if layer.bias is not None:
            bias = (layer.bias.double() * layer.input_scale.double() * layer.weight_scale.double()).float()
        self.register_buffer("bias", bias)
        self.inputs: Grid = (layer.input_scale, layer.input_zero_point)
        self.outputs: Grid | None = (layer.output_scale, layer.output_zero_point) if o["requantized"] else None

    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        (layer,) = self.layer
        ops = torch.ops.quantized_decomposed
        weight = ops.dequantize_per_channel(self.weight, self.scale, self.zero, 0, -127, 127, torch.int8)
        y = layer.accumulate(self._on(x, self.inputs), weight)
        if self.bias is not None:
            y = y + (self.bias.view(-1, 1, 1) if weight.dim() == 4 else self.bias)
        y = activate(y, self.activation)
        return y if self.outputs is None else self._on(y, self.outputs)

    def _on(self, x: Tensor, grid: Grid) -> Tensor:
        numbers = (float(grid[0]), int(grid[1]) + self.shift, self.low, self.high, self.dtype)
        ops = torch.ops.quantized_decomposed
        return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *numbers), *numbers)


def decomposed(model: nn.Module, *, signed: bool) -> nn.Module:
    """A copy of ``model`` with a `Decomposed` for every integer layer.

    Raises:
        ModelError: a layer that PyTorch has no integer kernel for.
    """
    import torchao.quantization.pt2e  # noqa: F401  (registers the operations)

    copied = copy.deepcopy(model).eval()
    for name, module in list(copied.named_modules()):
        if isinstance(module, IntegerLayer):
            replace_module(copied, name, Decomposed(module, signed))
    return copied
