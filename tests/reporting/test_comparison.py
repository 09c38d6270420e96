"""Grouping, dominance, labels and warnings."""

from __future__ import annotations

import json
import random

import pytest

from efficientdnns.errors import ConfigurationError, FileFormatError
from efficientdnns.reporting import compare, compare_page, read
from efficientdnns.reporting.charts import Scale
from efficientdnns.reporting.comparison import Spread, dominated
from efficientdnns.reporting.labels import place


def test_a_spread() -> None:
    spread = Spread.of([3.0, None, 1.0, float("nan")])
    assert spread is not None
    assert (spread.mean, spread.low, spread.high, spread.n) == (2.0, 1.0, 3.0, 2)
    assert spread.std == pytest.approx(2**0.5)
    assert Spread.of([None]) is None
    assert Spread.of([1.0]).std is None


@pytest.mark.parametrize("higher", [True, False])
def test_what_is_not_dominated_is_a_front(higher) -> None:
    rng = random.Random(0)
    points = [(rng.random(), rng.random()) for _ in range(60)] + [(0.5, 0.5), (0.5, 0.5)]
    beaten = dominated(points, higher)
    front = sorted(point for point, worse in zip(points, beaten) if not worse)
    scores = [score for _, score in front]
    assert scores == sorted(scores, reverse=not higher)
    for point, worse in zip(points, beaten):
        better = [
            other
            for other in points
            if other != point and other[0] <= point[0] and (other[1] >= point[1] if higher else other[1] <= point[1])
        ]
        assert bool(better) == worse


def test_runs_that_differ_only_in_the_seed_are_one(write, make_report) -> None:
    folders = [write(f"half-{s}", make_report(97 + s / 10, 0.5, s)) for s in (0, 1, 2)]
    folders += [write("quarter-0", make_report(95, 0.25)), write("bad-0", make_report(94, 0.3))]
    found = compare(folders)
    assert [(group.label, group.seeds) for group in found.groups] == [
        ("half", [0, 1, 2]),
        ("quarter", [0]),
        ("bad", [0]),
    ]
    half, quarter, bad = found.groups
    assert half.metric.mean == pytest.approx(97.1)
    assert half.metric.std == pytest.approx(0.1)
    assert half.done == "nisp (pruning_ratio 0.5)"
    assert found.warnings == []
    assert [axis.key for axis in found.axes] == ["bytes", "macs", "nonzero_params", "latency in pytorch-eager"]
    assert {"bytes", "macs"} <= set(half.fronts)
    assert {"bytes", "macs"} <= set(quarter.fronts)
    assert bad.fronts == []
    assert json.loads(json.dumps(found.data()))["groups"][0]["latency in pytorch-eager"]["mean"] == 50.0


def test_a_run_that_costs_more_than_the_dense_network_and_scores_less_is_dominated(write, make_report) -> None:
    worse = make_report(90)
    worse.after = worse.after.model_copy(update={"bytes": 2 * worse.before.bytes})
    (group,) = compare([write("worse", worse)]).groups
    assert "bytes" not in group.fronts


def test_a_network_that_was_only_trained_is_its_own_dense_network(write, make_report) -> None:
    found = compare([write("dense", make_report(98, 1.0, method="fit")), write("small", make_report(97, 0.5))])
    assert "differs" not in " ".join(found.warnings)


def test_what_cannot_be_compared_is_said_in_one_line(write, make_report) -> None:
    base = write("a", make_report())
    other = write("b", make_report(task="mnist"))
    (warning,) = compare([base, other]).warnings
    assert warning.startswith("not comparable, the task differs: digits (accuracy) in")
    assert str(other) in warning
    (warning,) = compare([base, write("c", make_report(model="resnet"))]).warnings
    assert "the dense network differs: lenet5 (6,000 parameters)" in warning
    moved = make_report(96, 0.4)
    moved.before = moved.before.model_copy(update={"metric": moved.before.metric.model_copy(update={"value": 91.0})})
    (warning,) = compare([base, write("d", moved)]).warnings
    assert "with seed 0 it scores 91.00" in warning


def test_another_metric_stays_out_of_the_chart(write, make_report) -> None:
    other = make_report(3.0, 0.1)
    for side in ("before", "after"):
        found = getattr(other, side)
        metric = found.metric.model_copy(update={"name": "perplexity", "unit": "", "higher_is_better": False})
        setattr(other, side, found.model_copy(update={"metric": metric}))
    found = compare([write("a", make_report()), write("b", other)])
    assert [group.label for group in found.comparable] == ["a"]
    assert "perplexity" in found.warnings[0]
    assert compare_page(found)


def test_a_folder_that_is_no_result_is_named(write, make_report, tmp_path) -> None:
    inner = write("runs/one", make_report())
    with pytest.raises(FileFormatError, match=r"holds no result .* its folders one do"):
        read(inner.parent)
    with pytest.raises(FileFormatError, match="nowhere holds no result"):
        compare([inner, tmp_path / "nowhere"])
    with pytest.raises(ConfigurationError, match="nothing to compare"):
        compare([])
    for text, message in (("{", "is no report"), ("{}", "is no report"), ("[]", "is no report")):
        (inner / "report.json").write_text(text)
        with pytest.raises(FileFormatError, match=message):
            read(inner)
    (tmp_path / "going" / ".checkpoints").mkdir(parents=True)
    with pytest.raises(FileFormatError, match="finish it with --resume"):
        read(tmp_path / "going")
    newer = make_report(schema_version=99)
    with pytest.raises(FileFormatError, match="schema 99"):
        read(write("newer", newer))


def test_hostile_names_are_escaped(write, make_report) -> None:
    hostile = "<script>alert(1)</script>"
    report = make_report(model=hostile, task=hostile)
    report.methods[0] = report.methods[0].model_copy(update={"id": hostile})
    page = compare_page(compare([write("<b>bold&", report)]))
    assert hostile not in page
    assert "<b>bold&" not in page
    assert "&lt;b&gt;bold&amp;" in page


def test_scales_keep_the_order_and_stay_inside() -> None:
    values = [58.0, 97.5, 98.2, 98.7]
    for scale in (Scale.over(values), Scale.over(values, log=True), Scale.of_metric(values, "%", True)):
        places = [scale(value) for value in values]
        assert places == sorted(places)
        assert 0 < places[0] < places[-1] < 1
        assert all(-1e-9 <= scale(tick) <= 1 + 1e-9 for tick in scale.ticks)
    stretched = Scale.of_metric(values, "%", True)
    assert stretched.top == 100
    assert stretched(98.7) - stretched(97.5) > 0.1
    assert Scale.of_metric([58.0, 100.0], "%", True).top is None
    assert Scale.over([5.0])(5.0) == pytest.approx(0.5)


def test_numbers_of_points_do_not_cover_each_other_where_there_is_room() -> None:
    spots = place([(0.2, 0.5), (0.23, 0.5), (0.9, 0.1)])
    assert spots[0] != spots[1]
    assert len(spots) == 3
