"""The page of one result."""

from __future__ import annotations

import re

import pytest
import yaml

import efficientdnns as ed
from efficientdnns.measurement.by_layer import LayerSize
from efficientdnns.recipe import text
from efficientdnns.reporting import report_page
from efficientdnns.reporting.cost import times_spent
from efficientdnns.reporting.layers import changes, largest, layer_chart
from efficientdnns.reporting.report import verdict
from efficientdnns.reporting.trust import chance
from efficientdnns.result import Report

HOSTILE = "<img src=x onerror=alert(1)>"


def test_it_answers_in_order(make_report) -> None:
    page = report_page(make_report())
    questions = re.findall("<h2>(.*?)</h2>", page)
    assert questions == [
        "Did it work?",
        "Where did the size go?",
        "What did it cost?",
        "What exactly was done?",
        "Can I trust it?",
    ]
    assert page.count("<svg") >= 2 + 4 * 3
    assert "NISP: Pruning Networks" in page
    assert 'href="https://arxiv.org/abs/1711.05908"' in page
    assert "at most 600,000 asked, 500,000 got" in page
    assert "fc9: an output" in page
    assert len(page) < 150_000


def test_the_verdict_is_one_sentence_that_hides_nothing(make_report) -> None:
    said = verdict(make_report(accuracy=97.0, share=0.5))
    assert said == (
        "The file is 2.00x smaller, it does 2.00x fewer multiply-accumulates (MACs), it runs 2.00x faster in pytorch-eager; "
        "accuracy went from 98.00 % to 97.00 % (−1.00 points) on 500 samples."
    )
    slow = make_report()
    slower = slow.latencies[0].speedups[0].__class__(ratio=0.5, low=0.4, high=0.6, significant=True)
    slow.latencies[0].speedups[0] = slower
    assert "it runs 2.00x slower in pytorch-eager" in verdict(slow)
    larger = make_report()
    larger.after = larger.after.model_copy(update={"bytes": 10 * larger.before.bytes})
    assert "the file is 10.00x larger" in verdict(larger).lower()


def test_nothing_hostile_gets_through(make_report) -> None:
    report = make_report(
        model=HOSTILE,
        task=HOSTILE,
        splits={HOSTILE: 3},
        environment={"cpu": HOSTILE, HOSTILE: 1},
        recipe={"model": HOSTILE, "methods": [HOSTILE]},
        exports=[{"format": "onnx", "error": HOSTILE}],
    )
    report.methods[0] = report.methods[0].model_copy(update={"id": HOSTILE, "findings": {"kept_whole": [HOSTILE]}})
    report.history[0]["run"] = HOSTILE
    report.after = report.after.model_copy(
        update={"by_layer": [LayerSize(name=HOSTILE, kind=HOSTILE, params=3, bytes=1)]}
    )
    page = report_page(report)
    assert "<img" not in page
    assert "&lt;img" in page


def test_the_time_of_a_resumed_run_is_that_of_its_training(make_report) -> None:
    report = make_report()
    assert times_spent(report) == [6.0], "three epochs of 2 s; the last stretch took 4 s"
    report.methods[0] = report.methods[0].model_copy(update={"seconds": 9.0})
    assert times_spent(report) == [9.0]


def test_a_report_of_an_earlier_version_has_a_page(make_report) -> None:
    data = make_report().model_dump(mode="json", exclude={"recipe", "latencies"})
    for side in ("before", "after"):
        del data[side]["by_layer"]
    for entry in data["history"]:
        del entry["steps"], entry["step_seconds"]
    page = report_page(Report(**data))
    assert "written before layers were recorded" in page
    assert "pruning_ratio: 0.5" in page
    assert "in theory" in page


def test_what_was_not_measured_is_a_dash(make_report) -> None:
    report = make_report(latencies=[], speedup=None, history=[], budget=[], reload_exact=None, exports=[])
    bare = {"latency_ms": None, "macs": None, "peak_memory": None, "by_layer": []}
    report.before, report.after = (side.model_copy(update=bare) for side in (report.before, report.after))
    page = report_page(report)
    assert "Latency was not measured." in page
    assert "not checked" in page
    assert '<td class="number">-</td>' in page
    assert "None<" not in page
    assert "nan" not in page


def size(name: str, params: int = 1) -> LayerSize:
    return LayerSize(name=name, kind="Linear", params=params, nonzero_params=params, macs=params, bytes=params)


def test_what_a_layer_was_taken_apart_into_counts_as_it() -> None:
    found = changes([size("conv", 9), size("fc")], [size("conv.0", 2), size("conv.1", 3), size("head")])
    assert [change.name for change in found] == ["conv", "fc", "head"]
    assert found[0].after is not None
    assert found[0].after.params == 5
    assert found[1].kind == "Linear → gone"
    assert found[2].before is None


def test_a_large_network_folds_its_small_layers(make_report) -> None:
    every = [size(f"l{i}", 10_000 if i % 30 == 0 else 1) for i in range(300)]
    shown, folded = largest(changes(every, every))
    assert len(shown) < len(folded)
    assert len(shown) + len(folded) == 300
    assert {change.name for change in shown} >= {f"l{i}" for i in range(0, 300, 30)}
    assert "other layers" in layer_chart(every, every)
    assert len(report_page(make_report(count=1000))) < 250_000


def test_chance_is_that_of_a_binomial() -> None:
    assert chance(50, 10_000) == pytest.approx(0.98)
    assert chance(100, 500) > 0


def test_every_result_is_saved_with_its_page_and_a_recipe_that_can_be_run_again(trained, digits, tmp_path) -> None:
    methods = [ed.NISP(pruning_ratio=0.5), [ed.KnowledgeDistillation(epochs=1), ed.Fit(epochs=1)]]
    budget = ed.Budget(macs=0.6, bytes="900kB")
    result = ed.compress(
        trained, digits, methods, budget=budget, training={"batch_size": 64}, seed=3, quiet=True, latency=False
    )
    folder = result.save(tmp_path / "out", exports=())
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Did it work?" in page
    report = Report.model_validate_json((folder / "report.json").read_text())
    layers = report.after.by_layer
    assert {layer.name for layer in layers} == {"conv1", "conv2", "fc1", "fc2"}
    for key, whole in (("params", report.after.params), ("macs", report.after.macs)):
        assert sum(getattr(layer, key) for layer in layers) == whole
    assert report.recipe is not None
    again = ed.Recipe.parse(text(report.recipe))
    assert again.as_data() == report.recipe
    assert again.seed == 3
    assert again.budget.limits() == budget.limits()
    assert again.training.batch_size == 64
    assert [method.name for method in again.methods] == ["nisp", "together"]
    assert yaml.safe_load(text(report.recipe))["methods"][0] == {"nisp": {"pruning_ratio": 0.5}}
    entry = report.history[0]
    assert entry["steps"] == len(digits.train) // 64
    assert 0 < entry["step_seconds"] * entry["steps"] <= entry["seconds"]
