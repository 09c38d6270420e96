import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientdnns.errors import ConfigurationError
from efficientdnns.parts.quantizer import (
    QuantSpec,
    dequantize,
    extremes,
    fake_quantize,
    quantize,
    round_straight_through,
    scale_and_zero_point,
    straight_through,
)

ends = st.floats(-1e4, 1e4, allow_nan=False, width=32)
specs = st.builds(QuantSpec, bits=st.integers(2, 8), symmetric=st.booleans(), signed=st.booleans())


def test_grids():
    assert (QuantSpec().low, QuantSpec().high) == (-128, 127)
    assert (QuantSpec(symmetric=True).low, QuantSpec(symmetric=True).high) == (-127, 127)
    assert (QuantSpec(4, signed=False).low, QuantSpec(4, signed=False).high) == (0, 15)
    with pytest.raises(ConfigurationError, match="1 bits, expected 2 to 16"):
        QuantSpec(1)


@given(ends, ends, specs)
@settings(max_examples=200, deadline=None)
def test_zero_is_exact_and_the_error_at_most_half_a_step(a, b, spec):
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    if spec.symmetric and not spec.signed:
        low = low.clamp(min=0)
    scale, zero = scale_and_zero_point(low, high, spec)
    assert spec.low <= zero <= spec.high
    q = quantize(torch.zeros(1), scale, zero, spec)
    assert q == zero
    assert dequantize(q, scale, zero, spec) == 0
    x = torch.linspace(0, 1, 101) * (high.clamp(min=0) - low.clamp(max=0)) + low.clamp(max=0)
    # Rounding the zero point may shift the grid by half a step, so that the last half step at an end is clipped.
    error = (dequantize(quantize(x, scale, zero, spec), scale, zero, spec) - x).abs()
    inside = (x >= (spec.low - zero) * scale) & (x <= (spec.high - zero) * scale)
    assert (error[inside] <= scale * 0.5001 + 1e-30).all()
    assert (error <= scale * 1.001).all()


def test_a_range_of_zero_has_scale_one():
    scale, zero = scale_and_zero_point(torch.tensor(0.0), torch.tensor(0.0), QuantSpec())
    assert scale == 1
    assert dequantize(quantize(torch.zeros(3), scale, zero, QuantSpec()), scale, zero, QuantSpec()).eq(0).all()


def test_the_range_is_widened_to_hold_zero():
    scale, zero = scale_and_zero_point(torch.tensor(5.0), torch.tensor(10.0), QuantSpec(signed=False))
    assert zero == 0
    assert scale == pytest.approx(10 / 255)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_channel_is_the_whole_tensor(symmetric):
    x = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    whole, one = QuantSpec(symmetric=symmetric), QuantSpec(symmetric=symmetric, axis=0)
    a = fake_quantize(x, *scale_and_zero_point(*extremes(x), whole), whole)
    b = fake_quantize(x, *scale_and_zero_point(*extremes(x, 0), one), one)
    assert torch.equal(a, b)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quantize_is_quantize_and_dequantize(axis, bits):
    x = torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(0)) * 3
    spec = QuantSpec(bits, axis=axis)
    grid = scale_and_zero_point(*(v * 0.7 for v in extremes(x, axis)), spec)
    q = quantize(x, *grid, spec)
    assert q.min() >= spec.low
    assert q.max() <= spec.high
    assert torch.equal(q, q.round())
    assert torch.equal(fake_quantize(x, *grid, spec), dequantize(q, *grid, spec))


def test_gradient_passes_inside_the_range_and_stops_outside():
    x = torch.tensor([-3.0, -0.4, 0.3, 5.0], requires_grad=True)
    fake_quantize(
        x, *scale_and_zero_point(torch.tensor(-1.0), torch.tensor(1.0), QuantSpec()), QuantSpec()
    ).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_straight_through_parts():
    x = torch.tensor([0.4, 1.6], requires_grad=True)
    y = round_straight_through(x)
    assert y.tolist() == [0, 2]
    (y * torch.tensor([2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [2, 3]
    x.grad = None
    z = straight_through(x, torch.tensor([7.0, 8.0]))
    assert z.tolist() == [7, 8]
    z.sum().backward()
    assert x.grad.tolist() == [1, 1]
