"""Masks of single weights, rows and patterns: exact counts, schedules, and what comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientdnns.parts.sparsity_schedule import remaining, scheduled_sparsity
from efficientdnns.parts.weight_pruning import EVERYTHING, masks_of, pattern_mask, row_masks, share_evenly


def test_the_cubic_schedule() -> None:
    values = {0: 0.0, 0.1: 0.2439, 0.25: 0.5203, 0.5: 0.7875, 0.75: 0.8859, 1: 0.9}
    for progress, sparsity in values.items():
        assert scheduled_sparsity(progress, 0.9) == pytest.approx(sparsity, abs=5e-5)
    assert scheduled_sparsity(1.7, 0.9) == 0.9
    assert scheduled_sparsity(-1, 0.9, 0.2) == pytest.approx(0.2)
    assert remaining(3, 0.2) == pytest.approx(0.512)


@given(st.floats(0, 0.99), st.floats(0, 1), st.floats(0.2, 6), st.floats(0, 1), st.floats(0, 1))
def test_sparsity_never_falls(final, share, exponent, a, b) -> None:
    low, high = (scheduled_sparsity(p, final, share * final, exponent) for p in sorted((a, b)))
    assert low <= high + 1e-12
    assert share * final - 1e-12 <= low
    assert high <= final + 1e-12


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.floats(0, 1))
def test_shares_are_even_and_their_sum_is_exact(sizes, share) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    total = round(share * sum(sizes))
    kept = share_evenly(named, total)
    assert all(1 <= kept[name] <= size for name, size in named.items())
    assert sum(kept.values()) == max(total, len(sizes))
    if total > 2 * len(sizes):
        for name, size in named.items():
            assert abs(kept[name] - total * size / sum(sizes)) < 1 + len(sizes)


@given(st.integers(0, 40), st.integers(0, 2**31))
def test_masks_have_exact_counts_even_among_equal_scores(kept, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.randint(0, 3, shape, generator=generator).float() for n, shape in (("a", (4, 5)), ("b", (5, 4)))}
    together = masks_of(scores, {EVERYTHING: kept})
    assert sum(int(mask.sum()) for mask in together.values()) == kept
    inside = torch.cat([scores[n][together[n]] for n in scores])
    outside = torch.cat([scores[n][~together[n]] for n in scores])
    assert not len(inside) or not len(outside) or inside.min() >= outside.max()
    each = masks_of(scores, {"a": min(kept, 20), "b": 3})
    assert [int(mask.sum()) for mask in each.values()] == [min(kept, 20), 3]


@given(st.integers(0, 61), st.integers(0, 2**31))
@settings(max_examples=50)
def test_rows_go_whole_and_never_more_stay_than_fit(kept, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(shape, generator=generator) for n, shape in (("a", (5, 3, 2)), ("b", (4, 8)))}
    for counts in ({"a": min(kept, 30), "b": 12}, {EVERYTHING: kept}):
        masks = row_masks(scores, counts)
        rows = {name: mask.flatten(1) for name, mask in masks.items()}
        assert all(torch.equal(mask.any(1), mask.all(1)) for mask in rows.values())
        assert sum(int(mask.any(1).sum()) for mask in rows.values()) >= 1
        means = {name: score.flatten(1).mean(1) for name, score in scores.items()}
        if EVERYTHING in counts:
            total = sum(int(mask.sum()) for mask in masks.values())
            assert total <= max(kept, 8)
            inside = torch.cat([means[n][rows[n].any(1)] for n in scores])
            outside = torch.cat([means[n][~rows[n].any(1)] for n in scores])
            assert not len(outside) or inside.min() >= outside.max()
        else:
            assert int(rows["a"].any(1).sum()) == max(1, counts["a"] // 6)
            assert int(rows["b"].any(1).sum()) == 1


@given(st.integers(1, 3), st.floats(0, 1), st.integers(1, 13), st.integers(0, 2**31))
@settings(max_examples=50)
def test_patterns_are_in_force_for_a_share_of_the_runs(n, share, columns, seed) -> None:
    scores = torch.rand(6, columns, generator=torch.Generator().manual_seed(seed)) + 0.01
    mask = pattern_mask(scores, n, 4, share)
    padded = torch.nn.functional.pad(mask.int(), (0, -columns % 4)).unflatten(1, (-1, 4)).sum(2)
    whole = torch.nn.functional.pad(torch.ones_like(mask).int(), (0, -columns % 4)).unflatten(1, (-1, 4)).sum(2)
    sparse = padded <= n
    assert (sparse | (padded == whole)).all()
    assert int(sparse.sum()) >= round(share * padded.numel())
    if share == 1:
        assert sparse.all()
