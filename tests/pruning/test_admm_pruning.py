"""ADMM pruning: the iteration on a quadratic, the run on digits, budgets and constraint sets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.measurement.size import nonzero_parameters
from efficientdnns.models import build
from efficientdnns.parts.project import LargestEntries, LargestInGroups, LargestRows, Levels
from efficientdnns.parts.select import layer_weights
from efficientdnns.parts.sparse_budgets import sparse_macs
from efficientdnns.pruning.admm_pruning import ADMM, ADMMPruning, project_and_update
from efficientdnns.session import Session
from efficientdnns.training import Callback

QUICK = {"learning_rate": 0.01, "every": 1, "rho": 1e-2}


def compress(model, task, methods, **options):
    return ed.compress(model, task, methods, quiet=True, latency=False, **options)


@pytest.mark.parametrize("seed", range(5))
def test_quadratic_from_a_warm_start_ends_at_its_largest_entries(seed) -> None:
    torch.manual_seed(seed)
    target, rho, constraint = torch.randn(12, dtype=torch.float64), 2.0, LargestEntries(4)
    weight, dual = target.clone(), torch.zeros_like(target)
    copy = constraint.project(weight)
    for _ in range(200):
        weight = (target + rho * (copy - dual)) / (1 + rho)
        copy, dual = project_and_update(weight, dual, constraint)
    torch.testing.assert_close(copy, constraint.project(target), atol=1e-6, rtol=0)
    assert (weight - copy).norm() < 1e-6
    pruned = copy == 0
    torch.testing.assert_close(dual[pruned], target[pruned] / rho, atol=1e-6, rtol=0)


@pytest.mark.parametrize("constraint", [LargestEntries(9), LargestRows(2), LargestInGroups(1, 2), Levels((-1.0, 1.0))])
def test_steps_of_every_constraint_set(constraint) -> None:
    weight, dual = torch.randn(4, 6), torch.randn(4, 6)
    copy, new = project_and_update(weight, dual, constraint)
    assert torch.equal(copy, constraint.project(weight + dual)), "projects W + U, not W"
    torch.testing.assert_close(new, dual + (weight - copy))


def test_run_leaves_exactly_what_was_asked_and_later_training_keeps_it(trained, digits) -> None:
    keep = {"conv1": 0.2, "conv2": 0.08, "fc1": 0.02, "fc2": 350}
    quick = {"optimizer": "adam", "learning_rate": 2e-3, "batch_size": 32}
    method = ADMMPruning(epochs=4, every=1, retrain_epochs=2, keep=keep, rho=0.1, **quick)
    result = compress(trained, digits, [method, ed.Fit(epochs=1, learning_rate=0.01)])
    counts = {name: int(w.count_nonzero()) for name, w in layer_weights(result.model).items()}
    assert counts == {"conv1.weight": 100, "conv2.weight": 2000, "fc1.weight": 8000, "fc2.weight": 350}
    assert result.after.metric.value > result.before.metric.value - 5
    finding = result.report.methods[0].findings
    assert [len(rounds) for rounds in finding["residuals"].values()] == [4] * 4
    assert finding["kept"]["fc1.weight"] == [8000, 400_000]


def test_validation_sees_the_cut_network_and_training_the_whole_one(trained, digits) -> None:
    session = Session(trained, digits, trained)
    method = ADMMPruning(epochs=2, retrain_epochs=0, keep={"*": 0.05}, **QUICK)
    seen = []

    class Spy(Callback):
        def epoch_start(self, trainer) -> None:
            seen.append(int(trainer.model.fc1.weight.count_nonzero()))

    history = session.train([method.callback(session), Spy()], epochs=2, batch_size=64, learning_rate=0.01)
    assert seen == [400_000, 400_000]
    assert history[-1]["accuracy"] == session.evaluate()
    assert int(session.model.fc1.weight.count_nonzero()) == 20_000
    assert session.sparse == set(layer_weights(session.model))
    assert session.findings["fit"]["metric_before_retraining"] == history[1]["accuracy"]


def test_without_rounds_it_is_magnitude_pruning(trained, digits) -> None:
    result = compress(trained, digits, [ADMMPruning(epochs=0, retrain_epochs=0, keep={"*": 0.1})])
    for name, weight in layer_weights(trained).items():
        expected = LargestEntries(round(0.1 * weight.numel())).project(weight)
        assert torch.equal(result.model.get_parameter(name), expected)
    retrained = compress(trained, digits, [ADMMPruning(epochs=0, retrain_epochs=1, keep={"fc1": 0.1}, **QUICK)])
    mask = LargestEntries(40_000).mask(trained.fc1.weight)
    assert torch.equal(retrained.model.fc1.weight != 0, mask)


def test_cut_hurts_less_after_the_rounds_than_at_once_and_the_residual_falls(digits) -> None:
    keep, quick = (
        {"fc1": 0.016, "fc2": 0.028, "fc3": 0.048},
        {"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 32},
    )
    model = build("lenet-300-100")
    dense = ed.Fit(epochs=10, **quick)
    at_once = compress(model, digits, [dense, ADMMPruning(epochs=0, retrain_epochs=0, keep=keep)])
    method = ADMMPruning(epochs=30, every=3, retrain_epochs=0, keep=keep, rho=0.2, **quick)
    rounds = compress(model, digits, [dense, method])
    assert rounds.after.metric.value >= at_once.after.metric.value + 20
    residuals = rounds.report.methods[1].findings["residuals"]["fc1.weight"]
    assert residuals[-1] < 0.5 * residuals[0]


def test_dropout_is_off_in_the_rounds_only(digits) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.Dropout(0.4), nn.Linear(16, 10))
    session = Session(model, digits, model)
    method = ADMMPruning(epochs=1, retrain_epochs=1, sparsity=0.5, **QUICK)
    rates = []

    class Spy(Callback):
        def batch(self, trainer, batch):
            rates.append(trainer.model[2].p)
            return batch

    session.train([method.callback(session), Spy()], epochs=2)
    half = len(rates) // 2
    assert set(rates[:half]) == {0.0}
    assert set(rates[half:]) == {0.4}
    assert session.model[2].p == 0.4


def test_growing_rho_rescales_the_dual_variable() -> None:
    model = nn.Linear(4, 3)
    made = ADMM(ADMMPruning(rho=0.1, rho_growth=10), None, {"weight": LargestEntries(5)})
    trainer = SimpleNamespace(model=model)
    weight = model.weight.detach()
    made.copies, made.duals = {"weight": torch.zeros(3, 4)}, {"weight": torch.ones(3, 4)}
    made._update(trainer)
    copy, dual = project_and_update(weight, torch.ones(3, 4), LargestEntries(5))
    assert made.rho == pytest.approx(1.0)
    torch.testing.assert_close(made.rho * made.duals["weight"], 0.1 * dual)
    torch.testing.assert_close(made.targets["weight"], copy - dual / 10)
    penalty = made.penalty(trainer)
    torch.testing.assert_close(penalty, 0.5 * (model.weight - copy + dual / 10).square().sum())


@pytest.mark.parametrize("restart", [False, True])
def test_learning_rate_starts_anew(restart) -> None:
    method = ADMMPruning(epochs=4, every=2, retrain_epochs=2, sparsity=0.5, restart_schedule=restart)
    callback = ADMM(method, None, {})
    settings = SimpleNamespace(schedule="linear")
    rates = [
        callback.learning_rate(SimpleNamespace(step=s, steps_per_epoch=10, total_steps=60, settings=settings))
        for s in (0, 10, 20, 30, 40, 50)
    ]
    first = [1, 0.5, 1, 0.5] if restart else [1, 0.75, 0.5, 0.25]
    assert rates == pytest.approx([*first, 1, 0.5])


def test_parameter_budget_is_met_and_an_impossible_one_named(trained, digits) -> None:
    method = ADMMPruning(epochs=1, retrain_epochs=0, **QUICK)
    result = compress(trained, digits, [method], budget="params=20k")
    assert result.budget[0].met
    assert 19_990 <= nonzero_parameters(result.model) <= 20_000
    with pytest.raises(ed.BudgetError, match="584 is the least"):
        compress(trained, digits, [method], budget="params=100")


def test_filters_are_really_removed(trained, digits) -> None:
    method = ADMMPruning(epochs=1, retrain_epochs=1, constraint="filters", keep={"conv1": 0.5, "conv2": 20}, **QUICK)
    session = Session(trained, digits, trained)
    history = session.train([method.callback(session)], epochs=2, learning_rate=0.01)
    assert session.model.conv1.out_channels == 10
    assert session.model.conv2.weight.shape == (20, 10, 5, 5)
    assert session.model.fc1.in_features == 20 * 16
    assert session.evaluate() == pytest.approx(history[-1]["accuracy"])


@pytest.mark.parametrize("budget", ["macs=0.5", "params=0.4", "bytes=0.5", "macs=0.6,bytes=0.3"])
def test_budgets_say_how_many_filters_stay(trained, digits, budget) -> None:
    method = ADMMPruning(epochs=1, retrain_epochs=1, constraint="filters", **QUICK)
    result = compress(trained, digits, [method], budget=budget)
    assert all(line.met for line in result.budget)
    # One filter of conv1 is 4 % of the multiply-accumulates.
    assert max(line.got / line.asked for line in result.budget) > 0.96
    assert result.model.conv2.weight.all(), "filters are removed, not zeroed"


def test_filters_are_left_in_multiples(trained, digits) -> None:
    for fields, budget in (({"sparsity": 0.45}, None), ({}, "macs=0.6")):
        method = ADMMPruning(epochs=1, retrain_epochs=0, constraint="filters", round_to=4, **fields, **QUICK)
        model = compress(trained, digits, [method], budget=budget).model
        assert model.conv1.out_channels % 4 == model.conv2.out_channels % 4 == 0
        assert 4 <= model.conv1.out_channels < 20
        assert 4 <= model.conv2.out_channels < 50


def test_zeros_do_not_buy_latency(trained, digits) -> None:
    with pytest.raises(ed.ConfigurationError, match="'latency' cannot be solved for"):
        compress(trained, digits, [ADMMPruning(**QUICK)], budget="latency=0.5")


def test_n_of_m(trained, digits) -> None:
    result = compress(trained, digits, [ADMMPruning(epochs=1, retrain_epochs=1, constraint="2:4", **QUICK)])
    for name in ("conv2.weight", "fc1.weight", "fc2.weight"):
        groups = result.model.get_parameter(name).movedim(1, -1).unflatten(-1, (-1, 4))
        assert int((groups != 0).sum(-1).max()) == 2
    assert result.model.conv1.weight.all()


def test_theoretical_macs_count_non_zero_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4))
    with torch.no_grad():
        model[0].weight.copy_(LargestEntries(17).project(model[0].weight))
        model[3].weight.copy_(LargestEntries(9).project(model[3].weight))
    assert sparse_macs(model, torch.zeros(1, 3, 8, 8)) == 17 * 6 * 6 + 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "must know what stays"),
        ({"sparsity": 0.5, "keep": {"fc1": 0.5}}, "give one of them"),
        ({"keep": {"fc9": 0.5}}, "no layer is called 'fc9'"),
        ({"constraint": "2:4", "sparsity": 0.5}, "fixes what stays"),
        ({"constraint": "filters"}, "must know what stays"),
        ({"round_to": 8, "sparsity": 0.5}, "round_to is for filters"),
    ],
)
def test_fields_that_do_not_go_together(trained, digits, fields, message) -> None:
    with pytest.raises(ed.ConfigurationError, match=message):
        compress(trained, digits, [ADMMPruning(**fields)])
