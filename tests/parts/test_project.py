"""Projections: nearest points, exact counts, idempotence."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efficientdnns.parts.project import LargestEntries, LargestInGroups, LargestRows, Levels, SparsitySet

SETS = [
    LargestEntries(7),
    LargestRows(2),
    LargestRows(2, dim=1),
    LargestInGroups(2, 4),
    Levels((-1, 0, 0.5)),
    Levels((-1, 1)),
]


@pytest.mark.parametrize("constraint", SETS, ids=repr)
@pytest.mark.parametrize("shape", [(4, 6), (4, 8, 3, 3)])
def test_projection_is_idempotent_and_leaves_its_argument(constraint, shape) -> None:
    tensor = torch.randn(shape)
    before = tensor.clone()
    once = constraint.project(tensor)
    assert torch.equal(tensor, before)
    assert torch.equal(constraint.project(once), once)
    if isinstance(constraint, SparsitySet):
        mask = constraint.mask(tensor)
        assert torch.equal(once[mask], tensor[mask])
        assert once.count_nonzero() <= tensor.count_nonzero()
        assert not once[~mask].any()


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=7), st.integers(0, 7))
def test_entries_are_a_nearest_point(values, keep) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    keep = min(keep, len(values))
    distance = (tensor - LargestEntries(keep).project(tensor)).square().sum()
    best = min(
        sum(float(tensor[i] ** 2) for i in range(len(values)) if i not in support)
        for support in combinations(range(len(values)), keep)
    )
    assert float(distance) == best
    assert int(LargestEntries(keep).mask(tensor).sum()) == keep


def test_counts_of_the_published_budgets() -> None:
    lenet_300_100 = {(300, 784): 0.04, (100, 300): 0.07, (10, 100): 0.12}
    lenet_5 = {(20, 1, 5, 5): 0.2, (50, 20, 5, 5): 0.08, (500, 800): 0.009, (10, 500): 0.07}
    for layers, counts, ratio in ((lenet_300_100, [9408, 2100, 120], 22.89), (lenet_5, [100, 2000, 3600, 350], 71.16)):
        weights = [torch.randn(shape) for shape in layers]
        sets = [LargestEntries(round(w.numel() * share)) for w, share in zip(weights, layers.values())]
        kept = [int(one.project(w).count_nonzero()) for one, w in zip(sets, weights)]
        assert kept == counts
        assert sum(w.numel() for w in weights) / sum(kept) == pytest.approx(ratio, abs=0.01)


def test_rows_are_a_nearest_point() -> None:
    tensor = torch.randn(5, 3, 2, 2)
    projected = LargestRows(2).project(tensor)
    rows = projected.flatten(1).any(1)
    assert int(rows.sum()) == 2
    norms = tensor.flatten(1).norm(dim=1)
    assert norms[rows].min() > norms[~rows].max()


def test_groups_hold_n_of_m_also_in_a_shorter_last_group() -> None:
    tensor = torch.randn(3, 10, 2, 2)
    mask = LargestInGroups(2, 4).mask(tensor)
    assert mask[:, :4].sum(1).eq(2).all()
    assert mask[:, 4:8].sum(1).eq(2).all()
    assert mask[:, 8:].all()
    row = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
    assert LargestInGroups(2, 4).project(row).tolist() == [[0, -3, 2, 0]]


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20))
def test_levels_are_nearest(values) -> None:
    levels = (-1.0, -0.25, 0.5, 1.0)
    tensor = torch.tensor(values)
    projected = Levels(levels).project(tensor)
    for value, got in zip(tensor.tolist(), projected.tolist()):
        assert got in levels
        assert abs(value - got) == min(abs(value - level) for level in levels)


def test_levels_without_zero_raise_the_count() -> None:
    assert Levels((-1.0, 1.0)).project(torch.zeros(3)).count_nonzero() == 3
    for constraint, value in product((LargestEntries(2), LargestRows(1), LargestInGroups(1, 2)), (torch.zeros(2, 4),)):
        assert constraint.project(value).count_nonzero() == 0
