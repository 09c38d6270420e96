"""Layers that skip zeros: the same outputs, and chosen by measurement only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts import sparse_kernels
from efficientdnns.parts.select import largest_mask
from efficientdnns.parts.sparse_kernels import SparseConv2d, SparseLinear, compressed, faster_sparse
from efficientdnns.pruning.sparse_execution import SparseExecution


def sparse(layer: nn.Module, share: float = 0.9) -> nn.Module:
    with torch.no_grad():
        weight = layer.weight
        weight.mul_(largest_mask(weight.abs(), round((1 - share) * weight.numel())))
    return layer.eval()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 5), "stride": 2, "dilation": (1, 2), "bias": False},
    ],
)
def test_convolutions_compute_the_same(options, batch) -> None:
    conv = sparse(nn.Conv2d(6, 10, **options))
    new = compressed(conv)
    x = torch.randn(batch, 6, 13, 12)
    with torch.no_grad():
        assert new.rows() is not None
        torch.testing.assert_close(new(x), conv(x), atol=1e-5, rtol=1e-5)
    new(x).sum().backward()
    assert new.weight.grad is not None


def test_linear_layers_compute_the_same_and_follow_their_weights() -> None:
    linear = sparse(nn.Linear(20, 7))
    new = compressed(linear)
    x = torch.randn(2, 5, 20)
    with torch.no_grad():
        torch.testing.assert_close(new(x), linear(x), atol=1e-5, rtol=1e-5)
        new.weight.mul_(2)
        torch.testing.assert_close(new(x), linear(x), atol=1e-5, rtol=1e-5)  # the tensors are shared
    again = SparseLinear(**new.config())
    again.load_state_dict(new.state_dict())
    torch.testing.assert_close(again(x), linear(x), atol=1e-5, rtol=1e-5)


def test_only_what_can_be_compressed_is() -> None:
    assert isinstance(compressed(nn.Conv2d(2, 2, 3)), SparseConv2d)
    for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(2, 2, 3, padding_mode="circular"), nn.LSTM(2, 2), nn.ReLU()):
        assert compressed(layer) is None


def test_layers_are_replaced_where_they_are_faster(trained, digits, monkeypatch, tmp_path) -> None:
    for name in ("conv2", "fc1"):
        sparse(trained.get_submodule(name), 0.95)

    class Time:
        def __init__(self, p10: float) -> None:
            self.p10 = p10

    def clock(pair, inputs, **options):
        _, new = pair
        return [Time(1.0), Time(0.5 if isinstance(new, SparseLinear) else 2.0)]

    monkeypatch.setattr(sparse_kernels, "measure_latency", clock)
    network, found = faster_sparse(trained, digits.example_input, batch=4)
    assert {name: entry["used"] for name, entry in found.items()} == {"conv2": False, "fc1": True}
    assert type(network.fc1) is SparseLinear
    assert type(trained.fc1) is nn.Linear
    result = ed.compress(trained, digits, [SparseExecution()], quiet=True, latency=False)
    result.save(tmp_path / "out")
    x = next(iter(digits.evaluation.batches(8))).inputs
    loaded = ed.load(tmp_path / "out")
    assert type(loaded.fc1) is SparseLinear
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), trained.eval()(x), atol=1e-4, rtol=1e-4)
