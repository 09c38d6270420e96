import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficientdnns.measurement.size import nonzero_parameters, parameter_count
from efficientdnns.parts.integer_arithmetic import quantize_multiplier
from efficientdnns.parts.integer_layers import activate, integer_layer, quantizable
from efficientdnns.parts.quantizer import extremes, fake_quantize, quantize, scale_and_zero_point
from efficientdnns.surgery import apply_difference, difference

LAYERS = {
    "plain": (lambda: nn.Conv2d(6, 8, 3, padding=1), (5, 6, 9, 9)),
    "strided, dilated": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2, bias=False), (5, 6, 9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 9, (3, 1), groups=3, padding="same"), (5, 6, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (5, 6, 9, 9)),
    "linear": (lambda: nn.Linear(20, 7), (5, 20)),
    "linear on sequences": (lambda: nn.Linear(20, 7, bias=False), (5, 4, 20)),
}


def made(name="plain", activation="none", seed=0, **options):
    """A real layer, its filled integer layer, inputs, and the output's grid."""
    torch.manual_seed(seed)
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape) + 0.3
    integer = integer_layer(layer, bias=layer.bias is not None, activation=activation, **options)
    outputs = activate(layer(x).detach(), activation)
    grids = [scale_and_zero_point(*extremes(t), integer.activation_spec) for t in (x, outputs)]
    bias = None if layer.bias is None else layer.bias.detach()
    wanted = (not integer.options["dynamic"], integer.options["requantized"])
    integer.fill(layer.weight.detach(), bias, *(grid if want else None for grid, want in zip(grids, wanted)))
    return layer, integer.eval(), x, outputs


def imitated(layer, integer, x):
    """What fake quantization computes."""
    spec, weight = integer.activation_spec, layer.weight.detach()
    grid = scale_and_zero_point(*extremes(weight, integer.weight_spec.axis), integer.weight_spec)
    w = fake_quantize(weight, *grid, integer.weight_spec)
    clone = copy.deepcopy(layer)
    clone.weight.data = w
    y = clone(fake_quantize(x, integer.input_scale, integer.input_zero_point, spec)).detach()
    return fake_quantize(
        activate(y, integer.options["activation"]), integer.output_scale, integer.output_zero_point, spec
    )


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_integer_path_is_the_imitated_one(name, activation, per_channel, symmetric):
    layer, integer, x, outputs = made(name, activation, per_channel=per_channel, symmetric=symmetric)
    steps = (integer(x) - imitated(layer, integer, x)) / integer.output_scale
    assert (steps.abs() > 0.5).float().mean() <= 0.01
    assert steps.abs().max() < 1.01
    assert (integer(x) - outputs).abs().max() < 6 * integer.output_scale


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_kernel_is_an_int64_computation(name, symmetric):
    layer, integer, x, _ = made(name, "relu", symmetric=symmetric)
    spec, channel = integer.activation_spec, (1 if isinstance(layer, nn.Conv2d) else -1)
    q = quantize(x, integer.input_scale, integer.input_zero_point, spec).long() - integer.input_zero_point

    def along(vector, dims, axis):
        shape = [1] * dims
        shape[axis] = -1
        return vector.view(shape)

    w = integer.weight.long() - (0 if symmetric else along(integer.weight_zero_point.long(), integer.weight.dim(), 0))
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str):
            q = F.pad(q, (0, 0, 1, 1))
            padding = (0, 0)
        else:
            padding = layer.padding
        acc = F.conv2d(q, w, None, layer.stride, padding, layer.dilation, layer.groups)
    else:
        acc = q @ w.T
    acc = acc if integer.bias is None else acc + along(integer.bias.long(), acc.dim(), channel)
    multiplier = integer.input_scale.double() * integer.weight_scale.double() / integer.output_scale.double()
    m0, n = (along(part, acc.dim(), channel) for part in quantize_multiplier(multiplier))
    y = ((acc << (-n).clamp(min=0)) * m0 + (1 << 30)) >> 31
    n = n.clamp(min=0)
    remainder, threshold = y & ((1 << n) - 1), (((1 << n) - 1) >> 1) + (y < 0)
    y = ((y >> n) + (remainder > threshold) + integer.output_zero_point).clamp(integer.output_zero_point, 127)
    assert torch.equal(integer(x), (y - integer.output_zero_point).float() * integer.output_scale)


@pytest.mark.parametrize("exact", [True, False])
def test_float32_is_used_only_where_it_is_exact(exact, monkeypatch):
    _, integer, x, _ = made("plain")
    assert integer.largest_sum < 1 << 24
    seen = []
    monkeypatch.setattr(integer, "accumulate", lambda a, w: seen.append(a.dtype) or F.conv2d(a, w, padding=1))
    integer.largest_sum = integer.largest_sum if exact else 1 << 24
    integer(x)
    assert seen[0] == torch.float64 or exact


def test_padding_is_the_real_zero():
    _, integer, x, _ = made("plain")
    assert integer.input_zero_point != 0
    x = torch.zeros_like(x)
    bias = integer.bias.float() * integer.input_scale * integer.weight_scale
    expected = bias.view(-1, 1, 1).expand(5, 8, 9, 9)
    assert (integer(x) - expected).abs().max() <= integer.output_scale * 0.51


def test_relu6_clamps():
    layer, integer, x, _ = made("plain", "relu6")
    y = integer(100 * x)
    assert y.min() == 0
    layer.weight.data *= 60
    grid = integer.input_scale, integer.input_zero_point
    nine = scale_and_zero_point(torch.tensor(0.0), torch.tensor(9.0), integer.activation_spec)
    integer.fill(layer.weight.detach(), layer.bias.detach(), grid, nine)
    assert abs(integer(x).max() - 6) <= integer.output_scale / 2
    assert integer.limits()[1] < 127


def test_a_grid_goes_through_unchanged():
    _, integer, x, _ = made("plain")
    y = integer(x)
    spec, scale, zero = integer.activation_spec, integer.output_scale, integer.output_zero_point
    assert torch.equal((quantize(y, scale, zero, spec) - zero) * scale, y)


def test_dynamic_range_is_the_batchs():
    layer, integer, x, _ = made("linear", dynamic=True)
    for factor in (0.01, 1.0, 100.0):
        y = layer(x * factor)
        assert (integer(x * factor) - y).abs().max() < 0.03 * (y - layer.bias).abs().max()
    assert integer.bias.dtype == torch.float32
    assert not hasattr(integer, "input_scale")


def test_without_an_output_grid_the_accumulators_come_out():
    layer, integer, x, _ = made("linear", requantized=False)
    assert (integer(x) - layer(x)).abs().max() < 0.05
    assert len(integer(x).unique()) > 30
    assert not hasattr(integer, "output_scale")


def test_dead_and_nearly_dead_channels_keep_their_bias():
    layer, _, x, _ = made("plain")
    layer.weight.data[0] = 0
    layer.weight.data[1] *= 1e-12
    layer.bias.data[:2] = torch.tensor([0.7, -1.3])
    integer = integer_layer(layer, bias=True)
    y = layer(x).detach()
    grids = [scale_and_zero_point(*extremes(t), integer.activation_spec) for t in (x, y)]
    integer.fill(layer.weight.detach(), layer.bias.detach(), *grids)
    assert (integer(x) - y).abs().max() < 6 * integer.output_scale
    assert (integer(x) - y)[:, :2].abs().max() <= 0.51 * integer.output_scale
    assert (integer.weight[0] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_exactly_zero(symmetric):
    layer, _, x, _ = made("plain")
    mask = torch.rand_like(layer.weight) < 0.5
    layer.weight.data[mask] = 0
    integer = integer_layer(layer, bias=True, symmetric=symmetric)
    integer.fill(
        layer.weight.detach(), layer.bias.detach(), *[scale_and_zero_point(*extremes(x), integer.activation_spec)] * 2
    )
    assert (integer.real_weight()[mask] == 0).all()
    assert (integer.real_weight() - layer.weight).abs().max() <= integer.weight_scale.max() * 0.51
    if symmetric:
        assert integer.weight.min() >= -127
        assert parameter_count(integer) == layer.weight.numel() + 8
        assert nonzero_parameters(integer) <= layer.weight.numel() + 8 - mask.sum()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "options", [{}, {"dynamic": True}, {"symmetric": False, "weight_bits": 3, "requantized": False}]
)
def test_rebuilt_from_data(name, options):
    layer, integer, x, _ = made(name, **options)
    model, reference = nn.Sequential(integer), nn.Sequential(layer)
    again = apply_difference(reference, difference(model, nn.Sequential(copy.deepcopy(layer))))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_what_can_be_quantized():
    assert quantizable(nn.Linear(66_000, 1, device="meta"))
    assert not quantizable(nn.Linear(67_000, 1, device="meta"))
    assert not quantizable(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    assert not quantizable(nn.ConvTranspose2d(2, 2, 3))
