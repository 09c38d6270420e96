r"""Affine quantizers: real numbers to small integers and back, :math:`\hat r = S(q - Z)`.

The maths of Jacob et al. (https://arxiv.org/abs/1712.05877, section 2.1): a positive scale S and an integer zero point
Z, so that the real number 0 is exactly the integer Z. All functions work on one range for a whole tensor or on one
range per channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efficientdnns.errors import ConfigurationError


@dataclass(frozen=True)
class QuantSpec:
    """What integers a quantizer maps to.

    Attributes:
        bits: width b of an integer, 1 to 16 (1 needs ``signed=False``: the symmetric signed grid of 1 bit is 0 alone).
        symmetric: Z = 0 and the narrow grid -(2^(b-1) - 1) .. 2^(b-1) - 1, on which -128 * -128 cannot occur. Unsigned:
            0 .. 2^b - 1.
        signed: -2^(b-1) .. 2^(b-1) - 1 in place of 0 .. 2^b - 1.
        axis: dimension with a scale and zero point of its own per index (the output channels of a weight: 0); None: one
            for all.
    """

    bits: int = 8
    symmetric: bool = False
    signed: bool = True
    axis: int | None = None

    def __post_init__(self) -> None:
        least = 2 if self.signed else 1
        if not least <= self.bits <= 16:
            raise ConfigurationError(f"a quantizer has {self.bits} bits, expected {least} to 16")

    @property
    def low(self) -> int:
        """The least integer of the grid."""
        return 0 if not self.signed else -(1 << (self.bits - 1)) + self.symmetric

    @property
    def high(self) -> int:
        """The largest integer of the grid."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


def extremes(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Least and largest value of ``x``: scalars, or vectors over dimension ``axis``."""
    if axis is None:
        low, high = torch.aminmax(x.detach())
    else:
        low, high = torch.aminmax(x.detach().movedim(axis, 0).flatten(1), dim=1)
    return low, high


def scale_and_zero_point(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    r"""Scale S and zero point Z of the range [low, high], which is first widened to hold 0.

    .. math:: S = \frac{b - a}{q_{max} - q_{min}}, \quad Z = \mathrm{clamp}(\mathrm{round}(q_{min} - a / S), q_{min},
    q_{max})

    Symmetric: :math:`S = \max(|a|, |b|) / q_{max}`, Z = 0. A range that is 0 alone gets S = 1.

    Args:
        low, high: a and b, scalars or one per channel, of any floating type.

    Returns:
        S in the type of ``low`` and Z as int32, of the shape of ``low``.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.symmetric:
        scale = torch.maximum(-low, high) / spec.high
    else:
        scale = (high - low) / (spec.high - spec.low)
    # A range below the smallest normal number would make 1 / S infinite.
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
    zero_point = torch.zeros_like(scale)
    if not spec.symmetric:
        zero_point = (spec.low - low / scale).round().clamp(spec.low, spec.high)
    return scale, zero_point.to(torch.int32)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """The integers q = clamp(round(x / S) + Z), ties to even, as whole numbers in the type of ``x``.

    The quotient is formed as x * (1 / S), as PyTorch's own fake quantizer does, so that both agree at every tie.
    """
    scale, zero_point = _along(scale, x, spec), _along(zero_point, x, spec)
    return x.mul(scale.reciprocal()).round_().add_(zero_point).clamp_(spec.low, spec.high)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """The real numbers S(q - Z)."""
    return (q - _along(zero_point, q, spec)) * _along(scale, q, spec)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Quantize and dequantize; the gradient passes unchanged inside the range and is 0 outside (straight-through).

    No gradient flows to the scale; `round_straight_through` is the part from which learned scales are made.
    """
    if spec.axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, spec.low, spec.high)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, spec.axis, spec.low, spec.high)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def round_straight_through(x: Tensor) -> Tensor:
    """round(x), ties to even, with the gradient of x."""
    return _Round.apply(x)


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value`` going forward, the gradient of ``x`` going backward: dL/dx := dL/dvalue."""
    return _Replace.apply(x, value)


def _along(parameter: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """Give a vector over channels the dimensions of ``x``."""
    if spec.axis is None:
        return parameter
    shape = [1] * x.dim()
    shape[spec.axis] = -1
    return parameter.view(shape)
