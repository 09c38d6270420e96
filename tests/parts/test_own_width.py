"""Who says how many channels stay: the method's own rule, a ratio, the ratio of one group, or the budget."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.own_width import OwnWidth
from efficientdnns.session import Session


class Thirds(OwnWidth):
    """Keeps a third where nobody says how many."""

    name: ClassVar[str] = ""

    def select(self, session, graph, groups):
        plan = self.plan(session, graph, groups)
        kept = {group.name: plan[group.name] or self.rounded(group.size // 3, group.size) for group in groups}
        return {group.name: torch.arange(kept[group.name], group.size) for group in groups}


def session_of(budget: str = "") -> Session:
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 18), nn.ReLU(), nn.Linear(18, 3))
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    task = ed.Task.from_tensors((x, y), (x, y))
    return Session(model, task, copy.deepcopy(model), ed.Budget.parse(budget))


@pytest.mark.parametrize(
    ("fields", "plan", "widths"),
    [
        ({}, [0, 0], [4, 6]),
        ({"round_to": 5}, [0, 0], [5, 10]),
        ({"pruning_ratio": 0.5}, [6, 9], [6, 9]),
        ({"pruning_ratio": 0.0}, [12, 18], [12, 18]),
        ({"ratios": {"2": 0.5}}, [0, 9], [4, 9]),
        ({"pruning_ratio": 0.5, "ratios": {"0": 0.25}}, [9, 9], [9, 9]),
    ],
)
def test_the_rule_holds_where_nothing_else_is_said(fields, plan, widths) -> None:
    session, method = session_of(), Thirds(**fields)
    graph, groups = method.groups(session)
    assert [method.plan(session, graph, groups)[name] for name in ("0", "2")] == plan
    assert [method.decides(session, group) for group in groups] == [kept == 0 for kept in plan]
    method.apply(session)
    assert [session.model[0].out_features, session.model[2].out_features] == widths


def test_a_budget_goes_before_the_rule() -> None:
    session, method = session_of("params=0.7"), Thirds()
    _, groups = method.groups(session)
    assert not any(method.decides(session, group) for group in groups)
    before = sum(p.numel() for p in session.model.parameters())
    method.apply(session)
    assert 0.55 * before < sum(p.numel() for p in session.model.parameters()) <= 0.7 * before


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_widths_are_rounded_up_to_what_is_allowed(size, round_to, data) -> None:
    kept = data.draw(st.integers(0, size))
    width = Thirds(round_to=round_to).rounded(kept, size)
    assert max(1, kept) <= width <= size
    assert width % round_to == 0 or width == size
    assert width - max(1, kept) < round_to
