"""Learned factors: their order, what goes with and without a budget, parameters lent to a network."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.learned_factors import FactorCallback, FactorOptions, adopt, left_whole, ranks, release
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph

VALUES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=8)


class Given(FactorOptions):
    """Factors that are at their end from the start."""

    name: ClassVar[str] = ""
    factors: dict[str, list[float]] = {}

    def callback(self, session):
        return GivenFactors(self, session)


class GivenFactors(FactorCallback):
    def magnitudes(self, trainer):
        return {name: torch.tensor(values) for name, values in self.method.factors.items()}


FACTORS = {"0": [0.0, 0.5, 0.0, 0.1, 0.9, 0.0, 0.3, 0.2], "2": [0.6, 0.01, 0.7, 0.0, 0.8, 0.02]}


def pruned(budget: str = "", **fields) -> Session:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    settings = ed.training.TrainingSettings(batch_size=12, learning_rate=1e-9)
    task = ed.Task.from_tensors((x, y), (x, y))
    session = Session(model, task, copy.deepcopy(model), ed.Budget.parse(budget), settings)
    Given(epochs=1, factors=FACTORS, **fields).apply(session)
    return session


@pytest.fixture(scope="module")
def plain() -> Session:
    """Pruned by nothing but zeros."""
    return pruned()


def kept(session: Session) -> tuple[list[int], list[int]]:
    """Which units of either layer are still there, found by their weights."""
    first = (session.model[0].weight[:, None] - session.original[0].weight[None]).abs().sum(2).argmin(1).tolist()
    rows = session.original[2].weight[:, first]
    return first, (session.model[2].weight[:, None] - rows[None]).abs().sum(2).argmin(1).tolist()


@given(VALUES, VALUES, st.integers(0, 99))
def test_places_follow_magnitudes_and_then_ties(a, b, seed) -> None:
    values = {"a": torch.tensor(a), "b": torch.tensor(b)}
    generator = torch.Generator().manual_seed(seed)
    ties = {name: torch.rand(len(value), generator=generator) for name, value in values.items()}
    places = ranks(values, ties)
    assert [len(places[name]) for name in values] == [len(a), len(b)]
    every = torch.cat([places["a"], places["b"]]).tolist()
    assert sorted(every) == list(range(1, len(a) + len(b) + 1))
    keys = list(zip([*a, *b], [*ties["a"].tolist(), *ties["b"].tolist()], strict=True))
    assert [keys[i] for i in sorted(range(len(keys)), key=every.__getitem__)] == sorted(keys)


def test_no_groups_have_no_places() -> None:
    assert ranks({}, {}) == {}


def test_exactly_the_zeros_go(plain) -> None:
    assert kept(plain) == ([1, 3, 4, 6, 7], [0, 1, 2, 4, 5])


def test_a_ratio_takes_the_smallest_wherever_they_are(plain) -> None:
    assert kept(pruned(pruning_ratio=0.5)) == ([1, 4, 6, 7], [0, 2, 4])
    assert kept(pruned(pruning_ratio=0.1)) == kept(plain), "zeros go in any case"
    assert kept(pruned(pruning_ratio=0.5, scope="layer")) == ([1, 4, 6, 7], [0, 2, 4])
    assert kept(pruned(pruning_ratio=0.8, scope="layer")) == ([1, 4], [2, 4])


def test_widths_are_multiples_and_single_ratios_count() -> None:
    assert kept(pruned(round_to=4)) == ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5]), "5 channels live in either"
    first, second = kept(pruned(ratios={"0": 0.75}))
    assert first == [1, 4]
    assert second == [0, 1, 2, 4, 5]
    assert len(kept(pruned(ratios={"0": 0.0}))[0]) == 8, "a ratio of its own keeps zeros too"


def test_a_budget_says_how_much_and_factors_what_first(plain) -> None:
    def size(session: Session) -> int:
        return sum(p.numel() for p in session.model.parameters())

    loose, tight = pruned("params=0.9"), pruned("params=0.4")
    assert size(plain) < size(loose) <= 0.9 * 123, "zeros stay where there is room"
    assert size(tight) <= 0.4 * 123
    for session in (loose, tight):
        for units, factors in zip(kept(session), FACTORS.values(), strict=True):
            assert sorted(factors[i] for i in units) == sorted(factors)[-len(units) :]
    for units, alive in zip(kept(loose), kept(plain), strict=True):
        assert {*alive} <= {*units}, "no other channel goes before the zeros"


def test_groups_without_factors_are_named() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = ChannelGraph.trace(model, torch.zeros(1, 5))
    assert left_whole(graph, [graph.group("2")]) == ["0"]
    assert left_whole(graph, graph.groups) == []


def test_lent_parameters_are_the_networks_until_they_are_released() -> None:
    model = nn.Linear(3, 2)
    before = dict(model.named_parameters())
    lent = adopt(model, "factors", [torch.ones(2), torch.zeros(3)])
    other = adopt(model, "gates", [torch.ones(1)])
    assert [id(p) for p in model.parameters()][2:] == [id(p) for p in (*lent, *other)]
    assert all(p.requires_grad for p in lent)
    assert model.state_dict()["factors_1"].tolist() == [0, 0, 0]
    release(model, "factors")
    assert dict(model.named_parameters()).keys() == {*before, "gates_0"}
    release(model, "gates")
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())


def test_without_magnitudes_there_is_an_error(plain) -> None:
    with pytest.raises(ed.ConfigurationError, match="has no factors"):
        FactorCallback.magnitudes(GivenFactors(Given(), plain), None)
