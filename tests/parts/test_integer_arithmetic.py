import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientdnns.parts.integer_arithmetic import (
    INT32_MAX,
    INT32_MIN,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    quantized_add,
    requantize,
    rounding_divide_by_pot,
    saturating_rounding_doubling_high_mul,
    zero_point_expansion,
)

int32 = st.integers(INT32_MIN, INT32_MAX)


def literal_high_mul(a: int, b: int) -> int:
    if a == b == INT32_MIN:
        return INT32_MAX
    ab = a * b
    nudged = ab + ((1 << 30) if ab >= 0 else 1 - (1 << 30))
    return abs(nudged) // (1 << 31) * (1 if nudged >= 0 else -1)


def literal_divide(x: int, exponent: int) -> int:
    mask = (1 << exponent) - 1
    threshold = (mask >> 1) + (x < 0)
    return (x >> exponent) + ((x & mask) > threshold)


@given(int32, int32)
@settings(max_examples=300, deadline=None)
def test_high_mul_is_gemmlowps(a, b):
    assert saturating_rounding_doubling_high_mul(torch.tensor(a), torch.tensor(b)) == literal_high_mul(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [(INT32_MIN, INT32_MIN), (INT32_MIN, INT32_MAX), (1, 1 << 30), (-1, 1 << 30), (1, -(1 << 30)), (3, 1 << 30)],
)
def test_high_mul_at_ties_and_ends(a, b):
    assert saturating_rounding_doubling_high_mul(torch.tensor(a), torch.tensor(b)) == literal_high_mul(a, b)


@given(int32, st.integers(0, 31))
@settings(max_examples=300, deadline=None)
def test_divide_is_gemmlowps(x, exponent):
    assert rounding_divide_by_pot(torch.tensor(x), torch.tensor(exponent)) == literal_divide(x, exponent)


def test_divide_rounds_ties_away_from_zero():
    x = torch.tensor([-5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5])
    assert rounding_divide_by_pot(x, torch.tensor(1)).tolist() == [-3, -2, -2, -1, -1, 0, 1, 1, 2, 2, 3]
    assert rounding_divide_by_pot(x, torch.tensor(0)).tolist() == x.tolist()


@given(st.floats(1e-9, 1e4))
@settings(max_examples=300, deadline=None)
def test_multiplier_is_accurate(m):
    mantissa, shift = quantize_multiplier(torch.tensor(m, dtype=torch.float64))
    assert 1 << 30 <= mantissa <= INT32_MAX
    assert math.ldexp(int(mantissa), -31 - int(shift)) == pytest.approx(m, rel=2**-31)


def test_multiplier_that_rounds_up_to_one():
    mantissa, shift = quantize_multiplier(torch.tensor(1 - 2.0**-40, dtype=torch.float64))
    assert (int(mantissa), int(shift)) == (1 << 30, -1)


def test_multiplier_so_small_that_nothing_is_left():
    mantissa, shift = quantize_multiplier(torch.tensor(1e-30, dtype=torch.float64))
    assert multiply_by_quantized_multiplier(torch.tensor([INT32_MAX, INT32_MIN]), mantissa, shift).tolist() == [0, 0]


@pytest.mark.parametrize("m", [1e-5, 0.013, 0.5, 0.9999, 1.0, 3.7, 40.0])
def test_product_is_within_one_of_the_real_one(m):
    x = torch.randint(-30000, 30000, (2000,), generator=torch.Generator().manual_seed(0))
    mantissa, shift = quantize_multiplier(torch.tensor(m, dtype=torch.float64))
    # Two roundings on the right shift; on the left shift the first rounding is the only one.
    assert (multiply_by_quantized_multiplier(x, mantissa, shift) - m * x.double()).abs().max() <= 0.51 + (m < 1)


def test_requantize_clamps_to_the_fused_activation():
    acc = torch.tensor([-1000, -10, 0, 10, 1000])
    zero = torch.tensor(-128)
    half = torch.tensor(0.5, dtype=torch.float64)
    relu = requantize(acc, half, zero, zero, torch.tensor(127))
    assert relu.tolist() == [-128, -128, -128, -123, 127]
    assert requantize(acc, half, zero, zero, torch.tensor(-100)).tolist() == [-128, -128, -128, -123, -100]


def test_quantized_add_within_one_step():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scales = tuple((torch.rand(3, generator=generator) * 0.1 + 0.001).tolist())
        zeros = tuple(torch.randint(-128, 128, (3,), generator=generator).tolist())
        a, b = torch.randint(-128, 128, (2, 500), generator=generator)
        real = scales[0] * (a - zeros[0]).double() + scales[1] * (b - zeros[1]).double()
        exact = (real / scales[2] + zeros[2]).clamp(-128, 127)
        got = quantized_add(a, b, scales, zeros)
        assert (got - exact).abs().max() <= 0.51


def test_zero_point_expansion_is_the_direct_product():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (5, 40), generator=generator)
    b = torch.randint(-128, 128, (40, 3), generator=generator)
    assert torch.equal(zero_point_expansion(a, 17, b, -5), (a - 17) @ (b + 5))
