"""Widths, their order, and what they cost."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import efficientdnns as ed
from efficientdnns.measurement.macs import count_macs
from efficientdnns.measurement.size import nonzero_parameters
from efficientdnns.parts.structured import WidthCosts, Widths, holders, lowest, narrowed, prunable, weakest
from efficientdnns.session import Session

SCORES = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.floats(0.01, 100), min_size=2, max_size=30).map(torch.tensor), min_size=1
)


def session_for(model, shape) -> Session:
    x, y = torch.randn(4, *shape), torch.randint(10, (4,))
    return Session(model=model, task=ed.Task.from_tensors((x, y), (x, y)), original=copy.deepcopy(model))


@given(SCORES, st.integers(1, 8), st.floats(0, 0.99), st.sampled_from(["layer", "global"]))
def test_every_width_is_a_multiple_or_the_whole(scores, round_to, ratio, scope) -> None:
    plan = Widths.of(scores, scope=scope, round_to=round_to).at(ratio)
    for name, score in scores.items():
        assert plan[name] == len(score) or (plan[name] % round_to == 0 and plan[name] > 0)


@given(SCORES, st.floats(0, 0.99))
def test_one_ratio_a_layer_is_floor_of_each(scores, ratio) -> None:
    plan = Widths.of(scores).at(ratio)
    assert plan == {name: len(score) - len(lowest(score, ratio)) for name, score in scores.items()}


def test_one_threshold_cuts_where_scores_are_low_for_their_group() -> None:
    scores = {"flat": torch.ones(10), "steep": torch.tensor([0.01] * 9 + [1.0])}
    plan = Widths.of(scores, scope="global").at(0.45)
    assert plan == {"flat": 10, "steep": 1}
    scaled = Widths.of({"flat": 1000 * scores["flat"], "steep": scores["steep"]}, scope="global").at(0.45)
    assert scaled == plan, "the scale of a group's scores does not matter"


def test_fixed_ratios_are_left_out_of_the_order() -> None:
    offer = Widths.of({"a": torch.ones(20), "b": torch.ones(20)}, round_to=4, ratios={"b": 0.5})
    assert offer.least["b"] == offer.full["b"] == 12
    assert {block.group for block in offer.offered} == {"a"}


@given(SCORES)
def test_the_weakest_go_first(scores) -> None:
    for score in scores.values():
        gone = weakest(score, len(score) // 2)
        kept = [i for i in range(len(score)) if i not in set(gone.tolist())]
        assert score[gone].max() <= score[kept].min()


@pytest.fixture(scope="module", params=["lenet5", "cifar-resnet20"])
def traced(request):
    torch.manual_seed(0)
    shape = (1, 28, 28) if request.param == "lenet5" else (3, 32, 32)
    session = session_for(ed.models.build(request.param), shape)
    return session, *prunable(session)


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_arithmetic_gives_what_counting_gives(traced, data) -> None:
    session, graph, groups = traced
    costs = WidthCosts(session, session.model, {g.name: g.size for g in groups}, {g.name: holders(g) for g in groups})
    plan = {group.name: data.draw(st.integers(1, group.size)) for group in groups}
    model = narrowed(session, graph, groups, plan)
    guess = costs(plan)
    assert guess["macs"] == pytest.approx(count_macs(model, session.task.example_input).total, rel=1e-6)
    assert guess["params"] == pytest.approx(nonzero_parameters(model), rel=1e-6)


def test_unknown_layers_to_skip_are_named(trained, digits) -> None:
    for method in (
        ed.NISP(skip=("conv7",)),
        ed.SoftFilterPruning(skip=("conv7",)),
        ed.TuckerDecomposition(skip=("conv7",)),
    ):
        with pytest.raises(ed.ConfigurationError, match=r"skip: no layer is called 'conv7'.*conv"):
            ed.compress(trained, digits, [method], quiet=True, latency=False)


def test_skipped_layers_are_left_whole_under_a_budget(trained, digits) -> None:
    method = ed.NISP(skip=("conv*",), round_to=8, samples=64)
    result = ed.compress(trained, digits, [method], budget="params=0.3", quiet=True, latency=False)
    assert list(result.report.methods[0].findings["widths"]) == ["fc1"]
    assert result.model.conv1.out_channels == 20
    assert result.model.fc1.out_features % 8 == 0
    assert all(line.met for line in result.budget)
