"""Stacked filters stationary flow: the format in both orders, the execution order, the processor model, the file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.coding import load_weights, save_weights
from efficientdnns.coding.csf import CSFCodec, column_entries, fillers, stacked, storage_bits
from efficientdnns.errors import ConfigurationError, FileFormatError
from efficientdnns.parts.select import largest_mask
from efficientdnns.pruning.stacked_filters_stationary_flow import (
    StackedFiltersStationaryFlow,
    compare_formats,
    pe_utilization,
    sfs_conv2d,
    sfs_linear,
)


def sparse(*shape: int, density: float, levels: int = 15) -> torch.Tensor:
    return torch.randint(1, levels + 1, shape) / 8 * (torch.rand(shape) < density)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("order", ["stacked", "filter-major", None])
def test_comes_back_bit_for_bit(density, order) -> None:
    weight = sparse(12, 5, 3, 3, density=density)
    for index_bits in (2, 5, 16, None):
        codec = CSFCodec(index_bits, order)
        data, parameters = codec.encode(weight)
        assert torch.equal(codec.decode(data, parameters, tuple(weight.shape), weight.dtype), weight)


@pytest.mark.parametrize("index_bits", [2, 3, 4])
def test_fillers_of_gaps_at_the_limits(index_bits) -> None:
    limit = 2**index_bits - 1
    for gap, expected in ((limit - 1, 0), (limit, 0), (limit + 1, 1), (2 * limit + 1, 1), (2 * limit + 2, 2)):
        weight = torch.zeros(gap + 1, 1)
        weight[gap] = 1.0
        assert fillers(weight, index_bits) == expected == gap // (limit + 1)
        codec = CSFCodec(index_bits)
        assert torch.equal(codec.decode(codec.encode(weight)[0], {}, (gap + 1, 1), torch.float32), weight)


def test_bits_are_those_of_the_formula() -> None:
    weight = sparse(16, 8, 3, 3, density=0.2)
    entries = int(weight.count_nonzero()) + fillers(weight, 3)
    assert storage_bits(weight, 3) == entries * (3 + 4) + 32 * 15
    head = len(CSFCodec(3, "stacked").encode(weight)[0]) - 4 * 15
    assert head == pytest.approx(entries * 7 / 8, abs=9)
    counted = storage_bits(weight, 3, per_column=True)
    assert counted == int(column_entries(weight, 3).sum()) * 7 + 32 * 15 + 72 * 5


def test_order_does_not_matter_for_chance_and_does_for_structure() -> None:
    chance = sparse(200, 100, 10, 1, density=0.1)
    for bits in (2, 4, 8):
        sizes = [storage_bits(chance, bits, order) for order in ("stacked", "filter-major")]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    inputs = sparse(64, 64, 3, 3, density=0.5) * (torch.rand(64) < 0.1).float()[:, None, None]
    by_filter = inputs.transpose(0, 1).contiguous()
    assert storage_bits(inputs, 2, "stacked") < storage_bits(inputs, 2, "filter-major")
    assert storage_bits(by_filter, 2, "filter-major") < storage_bits(by_filter, 2, "stacked")
    for weight, number in ((inputs, 1), (by_filter, 0)):
        assert CSFCodec(2).encode(weight)[0][0] == number, "the smaller order is taken"


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 0, 1), (2, 1, 1), (1, 2, 2), (2, 1, 4)])
def test_execution_is_the_convolution(stride, padding, groups) -> None:
    conv = nn.Conv2d(4, 8, 3, stride, padding, groups=groups)
    weight = conv.weight.detach() * (torch.rand_like(conv.weight) < 0.3)
    x = torch.randn(2, 4, 9, 8)
    expected = nn.functional.conv2d(x, weight, conv.bias, stride, padding, groups=groups)
    found, multiplications = sfs_conv2d(x, weight, conv.bias, stride, padding, groups)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert multiplications == int(weight.count_nonzero()) * 2 * expected[0, 0].numel()
    skipping = sfs_conv2d(x.relu(), weight, None, stride, padding, groups, skip_zeros=True)
    assert skipping[1] < 0.7 * multiplications
    torch.testing.assert_close(
        skipping[0], nn.functional.conv2d(x.relu(), weight, None, stride, padding, groups=groups), atol=1e-5, rtol=0
    )


def test_execution_of_linear_layers() -> None:
    weight, bias, x = sparse(6, 10, density=0.4), torch.randn(6), torch.randn(3, 10)
    found, multiplications = sfs_linear(x, weight, bias)
    torch.testing.assert_close(found, x @ weight.T + bias, atol=1e-5, rtol=0)
    assert multiplications == 3 * int(weight.count_nonzero())


def test_utilisation() -> None:
    assert pe_utilization(torch.ones(32, 4, 3, 3)) == 1.0
    weight = sparse(64, 16, 3, 3, density=0.25)
    density = int(weight.count_nonzero()) / weight.numel()
    assert pe_utilization(weight, skip_zeros=False) == pytest.approx(density)
    skipping = pe_utilization(weight, lanes=4)
    assert density < skipping < 1
    assert pe_utilization(weight, lanes=1) == 1.0
    assert pe_utilization(weight, lanes=1, index_bits=1) < 1.0, "fillers take cycles"
    assert pe_utilization(torch.zeros(4, 4)) == 0.0


def test_stacked_order() -> None:
    weight = torch.randn(5, 4, 3, 2)
    assert torch.equal(stacked(weight)[2, 1, 0], weight[:, 2, 1, 0])
    assert stacked(torch.randn(5, 4)).shape == (4, 5)


def test_network_is_coded_without_loss_and_counted(trained, digits, tmp_path) -> None:
    with torch.no_grad():
        for name in ("conv2", "fc1"):
            weight = trained.get_submodule(name).weight
            weight.copy_((weight * 40).round() / 40 * largest_mask(weight.abs(), weight.numel() // 10))
    result = ed.compress(trained, digits, [StackedFiltersStationaryFlow()], quiet=True, latency=False)
    assert result.after.metric.value == result.before.metric.value
    finding = result.report.methods[0].findings
    assert set(finding["layers"]) == {"conv2.weight", "fc1.weight"}
    assert set(finding["left"]) == {"conv1.weight", "fc2.weight"}
    entry = finding["layers"]["fc1.weight"]
    assert (
        entry["bytes"]["csf"] == min(entry["bytes"]["stacked"], entry["bytes"]["filter-major"]) < entry["bytes"]["csr"]
    )
    assert entry["utilization"]["skipping"] > entry["utilization"]["not skipping"] == pytest.approx(0.1, abs=0.02)
    executed = finding["multiplications"]["executed"] / finding["multiplications"]["dense"]
    assert 0.1 < executed < 0.3
    result.save(tmp_path / "out")
    loaded = ed.load(tmp_path / "out")
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in trained.named_parameters())


def test_file_and_formats(tmp_path) -> None:
    weight = sparse(50, 200, density=0.05)
    sizes = compare_formats(weight)
    assert sizes["stacked"] < sizes["csr"] < sizes["dense"]
    save_weights(tmp_path / "w.safetensors", {"w": weight}, {"w": "csf"})
    assert torch.equal(load_weights(tmp_path / "w.safetensors")["w"], weight)
    assert compare_formats(torch.randn(5, 5)).keys() == {"dense", "csr", "smallest"}


def test_refuses_what_is_wrong(digits) -> None:
    with pytest.raises(ConfigurationError, match="use 'stacked' or 'filter-major'"):
        CSFCodec(4, "columns").encode(torch.eye(4))  # type: ignore[arg-type]
    with pytest.raises(FileFormatError, match="unknown order"):
        CSFCodec().decode(b"\7", {}, (2, 2), torch.float32)
    with pytest.raises(ConfigurationError, match="index_bits is 40"):
        StackedFiltersStationaryFlow(index_bits=40)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.AdaptiveAvgPool1d(10))
    with pytest.raises(ConfigurationError, match="no linear, convolutional or recurrent layer"):
        ed.compress(model, digits, [StackedFiltersStationaryFlow()], quiet=True, latency=False)
