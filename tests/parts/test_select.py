"""Exact selection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from efficientdnns.errors import ConfigurationError
from efficientdnns.parts.select import by_pattern, largest_mask, layer_weights, share_out


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(-1, 31))
def test_mask_has_exactly_keep_entries_and_they_are_the_largest(values, keep) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    mask = largest_mask(scores, keep)
    assert int(mask.sum()) == max(0, min(keep, len(values)))
    if mask.any() and not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


def test_ties_go_to_the_lowest_index_and_the_shape_stays() -> None:
    mask = largest_mask(torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0]]), 3)
    assert mask.tolist() == [[True, True, True], [False, False, False]]


def test_layer_weights_are_matrices_of_layers_only() -> None:
    layers = {"embed": nn.Embedding(5, 4), "rnn": nn.LSTM(4, 3), "norm": nn.BatchNorm1d(3), "out": nn.Linear(3, 2)}
    model = nn.ModuleDict(layers)
    assert list(layer_weights(model)) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"]


def test_patterns_fit_layers_and_parameters_in_order() -> None:
    names = ["conv1.weight", "block.fc1.weight", "block.fc2.weight"]
    found = by_pattern({"block.fc1": 1, "block.*": 2}, names, "keep")
    assert found == {"block.fc1.weight": 1, "block.fc2.weight": 2}
    assert by_pattern({"*.weight": 3}, names, "keep") == dict.fromkeys(names, 3)
    with pytest.raises(ConfigurationError, match=r"keep: no layer is called 'conv2' \(did you mean 'conv1'"):
        by_pattern({"conv2": 1}, names, "keep")


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.floats(0, 1))
def test_shares_add_up_exactly_and_fit(sizes, share) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    total = int(share * sum(sizes))
    kept = share_out(named, total)
    assert sum(kept.values()) == total
    assert all(0 <= kept[name] <= size for name, size in named.items())


def test_shares_follow_the_square_root_of_the_size() -> None:
    assert share_out({"small": 100, "large": 10_000}, 110) == {"small": 10, "large": 100}
    assert share_out({"small": 100, "large": 10_000}, 2_100) == {"small": 100, "large": 2_000}
