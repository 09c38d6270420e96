"""Which layer time is booked to: with a clock that modules move, and with ONNX Runtime's real profile."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import nn

from efficientdnns.errors import ConfigurationError
from efficientdnns.measurement import count_macs, layers
from efficientdnns.measurement.layers import OVERHEAD, layer_times
from efficientdnns.measurement.runtimes import available
from efficientdnns.measurement.tables import layer_table

needs_onnx = pytest.mark.skipif("onnxruntime" not in available(), reason="onnx or onnxruntime is not installed")


@pytest.fixture
def now(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(layers, "perf_counter", lambda: now[0])
    return now


class Slow(nn.Linear):
    """A layer that moves the clock."""

    def __init__(self, now: list[float], seconds: float) -> None:
        super().__init__(2, 2)
        self.now, self.seconds = now, seconds

    def forward(self, x):
        self.now[0] += self.seconds
        return super().forward(x)


class Block(nn.Module):
    """Spends time itself, beside its two layers, one of which it calls twice."""

    def __init__(self, now: list[float]) -> None:
        super().__init__()
        self.now = now
        self.first, self.second = Slow(now, 0.004), Slow(now, 0.002)

    def forward(self, x):
        x = self.second(self.first(x))
        self.now[0] += 0.001
        return self.second(x)


def test_eager_time_is_booked_to_the_module_that_spent_it(now):
    model = nn.Sequential(Block(now), Slow(now, 0.003)).train()
    times = layer_times(model, torch.zeros(3, 2), repeats=8, warmup=1)
    assert {layer.name: pytest.approx(layer.ms) for layer in times.layers} == {
        "": 0,
        "0": 1,
        "0.first": 4,
        "0.second": 4,
        "1": 3,
    }
    assert times.ms == pytest.approx(12)
    assert times.macs == count_macs(model, torch.zeros(1, 2)).total == 16
    row = {row["layer"]: row for row in times.rows()}["0.second"]
    assert row["macs"] == 8
    assert row["macs_share"] == pytest.approx(0.5)
    assert row["time_share"] == pytest.approx(1 / 3)
    assert row["macs_per_ms"] == pytest.approx(8 * 3 / 4)  # of the whole batch
    assert row["kind"] == "Slow"
    assert (times.runtime, times.batch, times.threads) == ("pytorch-eager", 3, torch.get_num_threads())
    assert model.training
    text = Console(width=150)
    with text.capture() as captured:
        text.print(layer_table("mine", times))
    assert "mine: pytorch-eager, batch 3" in captured.get()
    assert "33.3 %" in captured.get()


def test_hooks_are_gone_afterwards_also_after_an_error(now):
    from torch.nn.modules import module

    before = len(module._global_forward_hooks), len(module._global_forward_pre_hooks)
    layer_times(Slow(now, 0.1), torch.zeros(1, 2), repeats=2)
    with pytest.raises(RuntimeError):
        layer_times(Slow(now, 0.1), torch.zeros(1, 3), repeats=2)
    assert (len(module._global_forward_hooks), len(module._global_forward_pre_hooks)) == before


def test_runtimes_that_do_not_tell_layers_apart_are_refused():
    with pytest.raises(ConfigurationError, match="write pytorch-eager or onnxruntime"):
        layer_times(nn.Linear(2, 2), torch.zeros(1, 2), runtime="compile")


class Residual(nn.Module):
    """What ONNX Runtime fuses or lays out anew: batch norm, activations, additions, blocked convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.pool(torch.relu(x + self.branch(x))).flatten(1))


@needs_onnx
def test_onnxruntime_time_is_booked_to_the_layers_of_the_network():
    times = layer_times(Residual(), torch.randn(2, 3, 16, 16), runtime="onnxruntime", threads=1, repeats=4)
    named = {layer.name: layer for layer in times.layers}
    assert set(named) <= {"stem.0", "branch.0", "pool", "head", "", OVERHEAD, "stem.2", "stem.1", "branch.1"}
    for name in ("stem.0", "branch.0"):
        assert any("Conv" in operation for operation in named[name].operations)
        assert named[name].ms > 0
    assert any("Gemm" in operation or "MatMul" in operation for operation in named["head"].operations)
    assert times.macs == count_macs(Residual(), torch.zeros(1, 3, 16, 16)).total
    assert times.batch == 2


class Attention(nn.Module):
    """A block without convolutions: products with and without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.proj(torch.softmax(q @ k.transpose(1, 2), -1) @ v)


@needs_onnx
def test_products_without_weights_belong_to_the_module_that_calls_them():
    model = nn.Sequential(Attention(), nn.GELU())
    found = layer_times(model, torch.randn(1, 6, 8), runtime="onnxruntime", threads=1, repeats=4)
    with_macs = {layer.name: layer.ms for layer in found.layers if layer.macs}
    assert set(with_macs) == {"0", "0.qkv", "0.proj"}
    assert all(ms > 0 for ms in with_macs.values())
