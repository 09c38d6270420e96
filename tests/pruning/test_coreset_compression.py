"""Coreset compression: the mask of the first step, ranks, variants, budgets."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.measurement.macs import count_macs
from efficientdnns.pruning.coreset_compression import activation_mask, best_ranks
from efficientdnns.session import Session


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


@pytest.fixture(scope="module")
def small() -> ed.Task:
    return ed.Task.from_name("digits", size=8, limit=200, evaluation_limit=50)


def compress(model: nn.Module, task: ed.Task, budget: str = "", **fields) -> Session:
    session = Session(copy.deepcopy(model), task, model, ed.Budget.parse(budget), label="coreset")
    method = ed.CoresetCompression(**{"samples": 100} | fields)
    method.check_network(session)
    method.apply(session)
    return session


def test_a_filter_that_one_class_needs_survives() -> None:
    responses = torch.zeros(20, 6)
    classes = torch.arange(20) % 4
    responses[:, 0] = 5.0
    responses[:, 1] = 1.0
    responses[classes == 2, 5] = 9.0  # silent for all others
    mask = activation_mask(responses, classes, 2 / 6)
    assert mask.tolist() == [True, True, False, False, False, True]
    assert activation_mask(responses, torch.zeros(20), 1.0).all()
    assert best_ranks(responses, classes).max() == 6


def test_silent_filters_are_removed_and_take_no_rank(small) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[:4], model[0].bias[:4] = 0.0, -1.0
    result = compress(model, small, keep=8 / 12, ratio="auto", skip=("3",))
    found = result.findings["coreset"]
    assert found["widths"]["0"] == [12, 8]
    assert set(result.model[0].weight.shape[:1] if isinstance(result.model[0], nn.Conv2d) else []) <= {8}
    x = small.evaluation.inputs[:20]
    whole = compress(model, small, keep=8 / 12, ratio=0.0, skip=("3",)).model
    torch.testing.assert_close(whole(x), model(x), rtol=1e-4, atol=1e-5)


def test_ratios_say_the_ranks_and_what_would_grow_stays_whole(small) -> None:
    result = compress(network(), small, keep=1.0, ratio=0.5, ratios={"0": 0.9})
    found = result.findings["coreset"]
    assert found["layers"]["3"]["rank"] == 8
    assert found["layers"]["3"]["parameters"] == [16 * 109, 8 * (109 + 16)]
    assert 0 < found["layers"]["3"]["relative_error"] < 1
    assert found["kept"]["0"] == "rank 10 would not be smaller"
    assert found["kept"]["7"] == "the last layer"
    assert [m.weight.shape[0] for m in result.model[3]] == [8, 16]
    assert result.model[3][0].bias is not None
    assert result.model[3][1].bias is None


def test_sparse_factors_stay_sparse(small) -> None:
    result = compress(network(), small, variant="S", keep=1.0, ratio=0.5, alpha=0.2, epochs=1)
    share = float((result.model[3][1].weight == 0).double().mean())
    assert 0.05 < share < 1
    basis = compress(network(), small, variant="S", sparse="basis", keep=1.0, ratio=0.5, alpha=0.2).model[3][0]
    assert float((basis.weight == 0).double().mean()) > 0.05


def test_weighted_by_responses(small) -> None:
    model = network()
    plain, weighted = (compress(model, small, keep=1.0, ratio=0.3, variant=v) for v in "KA")
    assert plain.model[3][0].weight.shape == weighted.model[3][0].weight.shape
    assert not torch.allclose(plain.model[3][0].weight, weighted.model[3][0].weight)


@pytest.mark.parametrize(("keep", "budget"), [(1.0, "params=0.5"), (0.5, "macs=0.9"), (0.9, "macs=0.4,params=0.5")])
def test_meets_a_budget(keep, budget, small) -> None:
    model = network()
    small_one = compress(model, small, keep=keep, budget=budget).model
    limits = ed.Budget.parse(budget).limits()
    shares = {"params": count(small_one) / count(model), "macs": macs(small_one, small) / macs(model, small)}
    assert all(shares[name] <= limit for name, limit in limits.items())
    assert max(shares[name] / limit for name, limit in limits.items()) > 0.85


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, task: ed.Task) -> int:
    return count_macs(model, task.example_input).total


def test_refuses_what_cannot_be_reached_and_unknown_layers(small) -> None:
    with pytest.raises(ed.BudgetError, match="cannot be met"):
        compress(network(), small, budget="params=0.001")
    with pytest.raises(ed.ConfigurationError, match="coreset-compression: ratios: no layer is called"):
        compress(network(), small, ratios={"convx": 0.5})


def test_without_labels_all_images_are_one_class(small) -> None:
    x = torch.randn(80, 1, 8, 8)
    task = ed.Task.from_tensors(x, None, x[:40], kind="regression", example_input=x[:1])
    result = compress(network(), task, ratio=0.5)
    assert result.model[0] is not None
