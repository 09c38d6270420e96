"""Profiles with a stub task, and their ratio."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from efficientdnns.data.metric import MetricValue
from efficientdnns.measurement.environment import environment
from efficientdnns.measurement.profile import Metric, Profile, profile, profile_many


class StubTask:
    example_input = torch.zeros(1, 8)

    def evaluate(self, model, split="evaluation"):
        return MetricValue("accuracy", 90.0, split, 200, True, "%")

    def outputs(self, model, inputs):
        return model(inputs)


@pytest.fixture(autouse=True)
def _sizes(monkeypatch):
    """Four bytes an element, one where a codec is given."""
    coding = types.ModuleType("efficientdnns.coding")
    coding.weights_layout = lambda state, codecs: (  # type: ignore[attr-defined]
        sum(tensor.numel() * (1 if name in codecs else 4) for name, tensor in state.items()),
        [],
    )
    monkeypatch.setitem(sys.modules, "efficientdnns.coding", coding)


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))


def test_everything_is_measured_and_the_model_is_left_alone():
    model = network(16).train()
    measured = profile(model, StubTask(), threads=1, codecs={"0.weight": "int8"})
    assert measured.metric == Metric(name="accuracy", value=90.0, split="evaluation", n=200, unit="%")
    assert measured.params == measured.nonzero_params == 8 * 16 + 16 + 32 + 2
    assert measured.macs == 8 * 16 + 32
    assert measured.bytes == 8 * 16 + 4 * (16 + 32 + 2)
    assert measured.peak_memory == 4 * (measured.params + 8 + 16 + 16)
    assert measured.latency_ms is not None
    assert measured.latency_ms.threads == 1
    assert model.training


def test_the_report_has_the_documented_fields():
    data = profile(network(4), StubTask(), threads=1).model_dump(mode="json")
    assert set(data) == {"metric", "params", "nonzero_params", "macs", "bytes", "latency_ms", "peak_memory", "by_layer"}
    assert {"name", "value", "split", "n"} <= set(data["metric"])
    assert {"median", "p10", "p90", "runtime", "threads", "batch"} <= set(data["latency_ms"])
    assert Profile.model_validate(data).macs == 40


def test_ratio_before_over_after():
    (before, after), latencies = profile_many([network(16), network(8)], StubTask(), threads=1)
    ratio = before.ratio(after)
    assert ratio.macs == 2.0
    assert ratio.params == before.params / after.params
    assert ratio.metric == 0.0
    assert ratio.latency is not None
    assert [before.latency_ms, after.latency_ms] == latencies
    assert latencies[0].run == latencies[1].run


def test_separately_measured_latencies_give_no_speedup():
    before, after = (profile(network(width), StubTask(), threads=1) for width in (16, 8))
    assert before.ratio(after).latency is None
    again = Profile.model_validate_json(before.model_dump_json())
    assert again.ratio(again).latency is None
    assert again.ratio(again).macs == 1.0


def test_without_latency():
    profiles, latencies = profile_many([network(4)], StubTask(), latency=False)
    assert latencies == []
    assert profiles[0].latency_ms is None
    assert profiles[0].ratio(profiles[0]).latency is None


def test_a_result_that_is_no_network():
    class Tree:
        def count_parameters(self):
            return 31, 30

    (before, after), latencies = profile_many([network(4), Tree()], StubTask(), threads=1)
    assert (after.params, after.nonzero_params, after.macs, after.bytes) == (31, 30, None, None)
    assert after.metric.value == 90.0
    assert len(latencies) == 1
    assert before.ratio(after).macs is None
    assert before.ratio(after).params == before.params / 31


def test_a_batched_example_is_reported_for_one_sample():
    task = StubTask()
    task.example_input = torch.zeros(5, 8)
    measured = profile(network(4), task, threads=1)
    assert measured.macs == 40
    assert measured.peak_memory == profile(network(4), StubTask(), latency=False).peak_memory
    assert measured.latency_ms is not None
    assert measured.latency_ms.batch == 5


def test_environment_names_versions_but_no_machine():
    import platform

    found = environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    text = str(found)
    assert platform.node() not in text or platform.node() in ("Linux", "localhost", "")
    assert "/" not in text


def test_a_metric_reads_as_one_line():
    value = MetricValue("accuracy", 91.2345, "test", 10_000, True, "%")
    assert str(Metric(**value._asdict())) == str(value) == "accuracy 91.23 % (test, n=10,000)"
