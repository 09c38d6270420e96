"""What `measure` puts together; how it is measured is tested in tests/measurement."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from rich.console import Console

import efficientdnns as ed
from efficientdnns import side_by_side as module
from efficientdnns.errors import ConfigurationError
from efficientdnns.measurement import Latency
from efficientdnns.measurement.compare import Comparison
from efficientdnns.measurement.runtimes import available
from efficientdnns.side_by_side import listed, numbers, side_by_side

ONE = {"runtime": "pytorch-eager", "threads": 1, "batch": 1, "run": 1}


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What was to be compared; nothing is timed."""
    calls: list[dict] = []

    def compare(models, example_input, **options):
        calls.append({"models": models, **options})
        return [Comparison.of([Latency.of([2.0 / (1 + i)] * 9, **ONE) for i in range(len(models))], options["macs"])]

    monkeypatch.setattr(module, "compare_latency", compare)
    return calls


@pytest.fixture(scope="module")
def saved(tmp_path_factory, digits) -> str:
    """A result without exported files."""
    folder = tmp_path_factory.mktemp("results") / "small"
    torch.manual_seed(0)
    result = ed.compress(ed.models.build("lenet5"), digits, [ed.NISP(pruning_ratio=0.5)], quiet=True, latency=False)
    result.save(folder, exports=())
    return str(folder)


def test_numbers_and_names():
    assert numbers("1, 2,32", "batch") == [1, 2, 32]
    assert numbers(None, "batch") == []
    assert listed(" eager, onnxruntime,") == ["eager", "onnxruntime"]
    for text in ("0", "1,x", "-1", "1.5"):
        with pytest.raises(ConfigurationError, match=r"threads is .*, expected at least 1"):
            numbers(text, "threads")


def test_one_network_without_options_is_its_profile(digits, asked):
    found = side_by_side(["lenet5"], digits)
    assert not asked
    data = found.data()
    assert data["latency_ms"]["runtime"] == "pytorch-eager"
    assert data.keys() == ed.Profile.model_fields.keys()


def test_networks_are_compared_with_the_first(digits, asked, saved):
    found = side_by_side(["lenet5", saved], digits, runtimes=["onnx", "eager"], threads=[1, 2], batches=[4])
    (call,) = asked
    assert (call["runtimes"], call["threads"], call["batches"]) == (["onnxruntime", "pytorch-eager"], [1, 2], [4])
    assert call["macs"] == [profile.macs for profile in found.profiles.values()]
    data = json.loads(json.dumps(found.data()))
    assert [entry["model"] for entry in data["models"]] == ["lenet5", saved]
    (entry,) = data["latencies"]
    assert entry["models"] == ["lenet5", saved]
    assert entry["mac_ratios"] == [call["macs"][0] / call["macs"][1]]
    assert entry["speedups"][0]["ratio"] == 2
    text = Console(width=200)
    with text.capture() as captured:
        for table in found.tables():
            text.print(table)
    assert "2.00x (2.00-2.00)" in captured.get()


def test_the_same_network_twice_has_two_names(digits, asked):
    assert side_by_side(["lenet5", "lenet5"], digits).names == ["lenet5", "lenet5 #2"]


def test_a_result_is_compared_with_what_it_was_made_from(digits, asked, saved):
    found = side_by_side([saved], digits, runtimes=["eager"])
    assert found.names == ["before", "after"]
    before, after = asked[0]["models"]
    assert before.conv1.out_channels == 20
    assert after.conv1.out_channels < 20
    assert asked[0]["macs"][1] == found.data()["macs"]  # the profile of the result stays on top
    assert list(found.profiles) == [saved]


def test_layers_of_every_network(digits, asked):
    found = side_by_side(["lenet5", "lenet5-caffe"], digits, layers=True, threads=[1], batches=[3])
    assert [(name, times.runtime, times.batch) for name, times in found.layers] == [
        ("lenet5", "pytorch-eager", 3),
        ("lenet5-caffe", "pytorch-eager", 3),
    ]
    rows = found.data()["layers"][0]["layers"]
    assert {row["layer"] for row in rows} >= {"conv1", "conv2", "fc1", "fc2"}
    assert sum(row["time_share"] for row in rows) == pytest.approx(1)
    with pytest.raises(ConfigurationError, match="torch-compile does not tell layers apart"):
        side_by_side(["lenet5"], digits, layers=True, runtimes=["compile"])


def test_the_report_has_every_runtime_beside_the_ratio_of_macs(digits, trained, monkeypatch):
    calls: list[dict] = []

    def compare(models, example_input, **options):
        calls.append(options)
        return [Comparison(runtime=name, threads=1, batch=1, problem="not here") for name in options["runtimes"]]

    monkeypatch.setattr(importlib.import_module("efficientdnns.compress"), "compare_latency", compare)
    result = ed.compress(trained, digits, [ed.NISP(pruning_ratio=0.5)], quiet=True, runtimes=["eager", "onnx"])
    assert [call["runtimes"] for call in calls] == [["onnxruntime"]]
    assert calls[0]["lenient"]
    eager, onnx = result.report.latencies
    assert eager.latencies == [result.before.latency_ms, result.after.latency_ms]
    assert eager.speedups == [result.speedup]
    assert eager.mac_ratios == [result.before.macs / result.after.macs]
    assert onnx.problem == "not here"
    assert "not here" in str(result)
    again = type(result.report).model_validate_json(result.report.model_dump_json())
    assert str(again.latencies[0]) == str(eager)
    with pytest.raises(ConfigurationError, match="did you mean 'onnxruntime'"):
        ed.compress(trained, digits, [ed.NISP(pruning_ratio=0.5)], quiet=True, runtimes=["onnxruntim"])


@pytest.mark.skipif("onnxruntime" not in available(), reason="onnx, onnxscript or onnxruntime is not installed")
def test_eager_and_onnxruntime_for_real(digits, saved):
    found = side_by_side([saved], digits, runtimes=["eager", "onnxruntime"], threads=[1])
    assert [entry.runtime for entry in found.comparisons] == ["pytorch-eager", "onnxruntime"]
    for entry in found.comparisons:
        assert len(entry.latencies) == 2
        assert entry.mac_ratios[0] > 1.5
        assert not entry.problem
