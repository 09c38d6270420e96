"""Combinations, ratios and what a comparison says, with runners whose time is made up."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from rich.console import Console
from torch import nn

from efficientdnns.errors import ConfigurationError, ModelError
from efficientdnns.measurement import Latency, compare_latency, latency
from efficientdnns.measurement import compare as compare_module
from efficientdnns.measurement.compare import Comparison
from efficientdnns.measurement.tables import latency_table


class Network(nn.Module):
    """Takes this many seconds a sample."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


@pytest.fixture
def opened(monkeypatch) -> list[tuple[str, float, int, int]]:
    """Runners that let time pass; what was opened, in order."""
    journal: list[tuple[str, float, int, int]] = []
    now = [0.0]

    class Fake:
        def __init__(self, name: str, model: Network) -> None:
            self.runtime, self.model = name, model

        @contextmanager
        def opened(self, inputs, threads):
            journal.append((self.runtime, self.model.seconds, threads, len(inputs)))

            def once():
                now[0] += self.model.seconds * len(inputs) / threads

            yield once

    def make(name, model, example_input, forward=None):
        if name == "torch-compile":
            raise ConfigurationError("torch-compile needs a C++ compiler")
        return Fake(name, model)

    monkeypatch.setattr(latency, "perf_counter", lambda: now[0])
    monkeypatch.setattr(compare_module, "runner", make)
    return journal


def test_every_combination_is_measured_with_both_networks_in_one_run(opened):
    pair = [Network(0.02), Network(0.01)]
    found = compare_latency(
        pair,
        torch.zeros(1, 2),
        runtimes=["eager", "onnx"],
        threads=[1, 2],
        batches=[1, 4],
        macs=[300, 100],
        repeats=5,
    )
    wanted = [(name, t, b) for name in ("pytorch-eager", "onnxruntime") for t in (1, 2) for b in (1, 4)]
    assert [(c.runtime, c.threads, c.batch) for c in found] == wanted
    assert opened == [(name, seconds, t, b) for name, t, b in wanted for seconds in (0.02, 0.01)]
    for entry in found:
        before, after = entry.latencies
        assert before.run == after.run
        assert before.median == pytest.approx(20 * entry.batch / entry.threads)
        assert entry.speedups[0].ratio == pytest.approx(2)
        assert entry.mac_ratios == [3]
        assert entry.realised == [pytest.approx(2 / 3)]
    assert str(found[1]) == ("pytorch-eager, batch 4, 1 thread: theoretical 3.00x, measured 2.00x faster (2.00-2.00)")


def test_several_networks_are_compared_with_the_first(opened):
    (found,) = compare_latency([Network(0.03), Network(0.03), Network(0.01)], torch.zeros(1), macs=[6, 6, 2], repeats=5)
    assert [gain.ratio for gain in found.speedups] == [pytest.approx(1), pytest.approx(3)]
    assert found.mac_ratios == [1, 3]
    assert "no measurable difference" in str(found)
    text = Console(width=200)
    with text.capture() as captured:
        text.print(latency_table(["dense", "same", "small"], [found]))
    assert "3.00x (3.00-3.00)" in captured.get()
    assert "1.00x, within noise" in captured.get()
    assert "100 %" in captured.get()


def test_without_known_macs_nothing_is_claimed_about_theory(opened):
    for macs in ([], [5, None], [5, 0]):
        (found,) = compare_latency([Network(0.02), Network(0.01)], torch.zeros(1), macs=macs, repeats=5)
        assert found.mac_ratios == found.realised == []
        assert "theoretical" not in str(found)
    (alone,) = compare_latency([Network(0.02)], torch.zeros(1), repeats=5)
    assert str(alone).startswith("20 ms")


def test_a_runtime_that_is_missing_is_an_error_or_a_line_of_the_report(opened):
    pair = [Network(0.02), Network(0.01)]
    with pytest.raises(ConfigurationError, match="C\\+\\+ compiler"):
        compare_latency(pair, torch.zeros(1), runtimes=["compile"])
    found = compare_latency(pair, torch.zeros(1), runtimes=["compile", "eager"], threads=[1], repeats=5, lenient=True)
    assert [c.runtime for c in found] == ["torch-compile", "pytorch-eager"]
    assert str(found[0]) == "torch-compile, batch 1, 1 thread: not measured (torch-compile needs a C++ compiler)"
    assert found[1].latencies
    with pytest.raises(ConfigurationError, match="no runtime"):
        compare_latency(pair, torch.zeros(1), runtimes=["tensorrt"], lenient=True)


def test_a_network_that_fails_in_one_runtime_does_not_hide_the_others(monkeypatch, opened):
    class Broken:
        runtime = "onnxruntime"

        @contextmanager
        def opened(self, inputs, threads):
            raise ModelError("cannot be exported")
            yield

    real = compare_module.runner
    monkeypatch.setattr(compare_module, "runner", lambda name, *a: Broken() if name[0] == "o" else real(name, *a))
    found = compare_latency([Network(0.02)] * 2, torch.zeros(1), runtimes=["onnx", "eager"], repeats=5, lenient=True)
    assert [bool(c.problem) for c in found] == [True, False]


def test_a_comparison_survives_the_report():
    pair = [Latency.of([s] * 9, runtime="onnxruntime", threads=1, batch=1, run=1) for s in (2.0, 1.0)]
    found = Comparison.of(pair, [4, 2])
    again = Comparison.model_validate_json(found.model_dump_json())
    assert str(again) == str(found)
    assert again.speedups == found.speedups
    assert set(found.model_dump()) == {
        *("runtime", "threads", "batch", "latencies", "speedups", "mac_ratios", "problem")
    }
