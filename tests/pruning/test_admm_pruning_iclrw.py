"""ADMM pruning, workshop version: the projection, the stopping rule, and what it shares with its longer version."""

from __future__ import annotations

import itertools

import pytest
import torch

import efficientdnns as ed
from efficientdnns.parts.project import LargestEntries
from efficientdnns.parts.select import layer_weights
from efficientdnns.pruning.admm_pruning_iclrw import ADMMPruningICLRW

QUICK = {"learning_rate": 0.01, "every": 1, "keep": {"conv1": 0.2, "conv2": 0.08, "fc1": 0.02, "fc2": 350}}


def compress(model, task, methods, **options):
    return ed.compress(model, task, methods, quiet=True, latency=False, **options)


@pytest.mark.parametrize("keep", [0, 1, 3, 6])
def test_projection_is_a_nearest_point_of_the_set(keep) -> None:
    weight = torch.tensor([0.5, -2.0, 0.5, 1.0, 0.0, -0.5])
    projected = LargestEntries(keep).project(weight)
    supports = itertools.combinations(range(6), keep)
    nearest = min(float(weight.square().sum() - weight[list(chosen)].square().sum()) for chosen in supports)
    assert float((weight - projected).square().sum()) == pytest.approx(nearest)
    assert int((projected != 0).sum()) == min(keep, 5)
    assert torch.equal(LargestEntries(keep).project(projected), projected)


def test_stops_when_the_weights_have_met_their_copies(trained, digits) -> None:
    late = compress(trained, digits, [ADMMPruningICLRW(epochs=4, retrain_epochs=1, tolerance=1e-9, **QUICK)])
    early = compress(trained, digits, [ADMMPruningICLRW(epochs=4, retrain_epochs=1, tolerance=1e9, **QUICK)])
    assert "stopped_after_epochs" not in late.report.methods[0].findings
    finding = early.report.methods[0].findings
    assert finding["stopped_after_epochs"] == 1
    assert {len(rounds) for rounds in finding["residuals"].values()} == {1}
    for result in (late, early):
        counts = {name: int(w.count_nonzero()) for name, w in layer_weights(result.model).items()}
        assert counts == {"conv1.weight": 100, "conv2.weight": 2000, "fc1.weight": 8000, "fc2.weight": 350}


def test_without_a_tolerance_it_is_the_longer_version(trained, digits) -> None:
    fields = QUICK | {"epochs": 2, "retrain_epochs": 1, "rho": 1e-2}
    short = compress(trained, digits, [ADMMPruningICLRW(**fields)])
    full = compress(trained, digits, [ed.ADMMPruning(**fields)])
    for name, value in full.model.state_dict().items():
        assert torch.equal(short.model.state_dict()[name], value), name


def test_has_one_constraint_set(trained) -> None:
    with pytest.raises(ed.ConfigurationError, match="constraint"):
        ADMMPruningICLRW(constraint="filters")
