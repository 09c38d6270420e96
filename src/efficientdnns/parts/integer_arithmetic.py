r"""The integer arithmetic of gemmlowp and Jacob et al. (https://arxiv.org/abs/1712.05877, section 2.2), bit for bit.

32-bit accumulators are held in int64 tensors, so that every intermediate product is exact. A real multiplier is a
32-bit fraction and a shift, :math:`M = 2^{-n} M_0` with :math:`M_0 \in [0.5, 1)` kept as :math:`\mathrm{round}(2^{31}
M_0)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT32_MAX = (1 << 31) - 1
INT32_MIN = -(1 << 31)


def quantize_multiplier(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """M0 (as round(2^31 M0)) and the right shift n of positive multipliers M = 2^-n M0; n is negative for M >= 1.

    Args:
        multiplier: positive reals of any shape. The relative error is at most 2^-31.

    Returns:
        Two int64 tensors of that shape. A shift beyond 62, where everything becomes 0, is written as M0 = 0.
    """
    fraction, exponent = torch.frexp(multiplier.double())
    mantissa = (fraction * 2.0**31).round().to(torch.int64)
    shift = -exponent.to(torch.int64)
    full = mantissa == 1 << 31
    mantissa, shift = torch.where(full, mantissa // 2, mantissa), torch.where(full, shift - 1, shift)
    gone = shift > 62
    return torch.where(gone, 0, mantissa), torch.where(gone, 0, shift)


def saturating_rounding_doubling_high_mul(a: Tensor, b: Tensor) -> Tensor:
    """The high 32 bits of 2 a b, rounded: (a b + (2^30 if a b >= 0 else 1 - 2^30)) / 2^31 towards zero, for int32
    values in int64.

    Both rules together round to the nearest and ties upward, which is one arithmetic shift. Only INT32_MIN * INT32_MIN
    saturates.
    """
    return (a * b).add_(1 << 30).bitwise_right_shift_(31).clamp_(max=INT32_MAX)


def rounding_divide_by_pot(x: Tensor, exponent: Tensor) -> Tensor:
    """x / 2^exponent rounded to the nearest, ties away from zero, for int32 values in int64; exponent in 0..62.

    gemmlowp adds 1 to the shifted number where the remainder is above a threshold; adding half before the shift, and 1
    less for negative numbers, is the same.
    """
    half = (torch.ones_like(exponent) << exponent) >> 1
    correction = (x >> 63).bitwise_and_(torch.where(exponent > 0, -1, 0))
    return correction.add_(x).add_(half).bitwise_right_shift_(exponent)


def multiply_by_quantized_multiplier(x: Tensor, mantissa: Tensor, shift: Tensor) -> Tensor:
    """M x for int32 values ``x``: a left shift where M >= 1 (saturating), the high multiplication, a rounding right
    shift."""
    left, right = (-shift).clamp(min=0), shift.clamp(min=0)
    x = (x << left).clamp_(INT32_MIN, INT32_MAX)
    return rounding_divide_by_pot(saturating_rounding_doubling_high_mul(x, mantissa), right)


def requantize(accumulator: Tensor, multiplier: Tensor, zero_point: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Accumulators to the integers of the output: clamp(Z3 + M acc, low, high).

    Args:
        accumulator: int32 values as int64.
        multiplier: M = S1 S2 / S3, real, broadcast against the accumulator (per output channel).
        zero_point: Z3.
        low, high: range of the output integers after the fused activation: from Z3 on for ReLU.
    """
    mantissa, shift = quantize_multiplier(multiplier)
    return multiply_by_quantized_multiplier(accumulator, mantissa, shift).add_(zero_point).clamp_(low, high)


def quantized_add(
    a: Tensor,
    b: Tensor,
    scales: tuple[float, float, float],
    zero_points: tuple[int, int, int],
    low: int = -128,
    high: int = 127,
) -> Tensor:
    """Add two quantized tensors in integers, as TensorFlow Lite does, within 1 of the exact result rounded.

    Both inputs are shifted left by 20 bits and brought to a common scale, twice the larger of their own, added, and
    brought to the output scale.

    Args:
        a, b: integers of at most 8 bits. scales, zero_points: of a, b and the output.
    """
    common = 2 * max(scales[0], scales[1])
    total = torch.zeros_like(a, dtype=torch.int64)
    for q, scale, zero_point in zip((a, b), scales, zero_points):
        mantissa, shift = quantize_multiplier(torch.tensor(scale / common, dtype=torch.float64))
        total = total + multiply_by_quantized_multiplier((q.to(torch.int64) - zero_point) << 20, mantissa, shift)
    multiplier = torch.tensor(common / (2**20 * scales[2]), dtype=torch.float64)
    return requantize(total, multiplier, torch.tensor(zero_points[2]), torch.tensor(low), torch.tensor(high))


def zero_point_expansion(q1: Tensor, z1: int, q2: Tensor, z2: int) -> Tensor:
    r"""The product of two quantized matrices without subtracting zero points from the matrices.

    .. math:: \sum_j (q_1 - Z_1)(q_2 - Z_2) = \sum_j q_1 q_2 - Z_1 \sum_j q_2 - Z_2 \sum_j q_1 + N Z_1 Z_2

    Args:
        q1: (m, N), q2: (N, n), integers. Returns int64 (m, n).
    """
    q1, q2 = q1.to(torch.int64), q2.to(torch.int64)
    return q1 @ q2 - z1 * q2.sum(0, keepdim=True) - z2 * q1.sum(1, keepdim=True) + q1.shape[1] * z1 * z2
