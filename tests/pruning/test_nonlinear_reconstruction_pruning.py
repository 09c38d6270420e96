"""Nonlinear reconstruction: how many are eliminated, and that activated errors come out smaller than linear fits leave them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.reconstruction import Reading, Response, total_error
from efficientdnns.pruning.nonlinear_reconstruction_pruning import eliminate
from efficientdnns.session import Session
from efficientdnns.surgery import Member, zero_contributions


def reading(n: int = 300, size: int = 20, out: int = 6) -> Reading:
    x, w = torch.relu(torch.randn(n, size, 1)), torch.randn(size, 1, out)
    before = x.flatten(1) @ w.flatten(0, 1) - 1
    member = Member("l.weight", "l", "weight", 1, "in", torch.arange(size)[:, None])
    return Reading(
        member, x, w, torch.full_like(before, -1.0), torch.zeros(out), True, before, Response(activation=torch.relu)
    )


@pytest.mark.parametrize(("keep", "fraction"), [(5, 0.05), (7, 0.3), (19, 1.0), (1, 1.0)])
def test_exactly_as_many_stay(keep, fraction) -> None:
    kept = eliminate([reading()], keep, fraction, steps=1)
    assert len(kept) == len(kept.unique()) == keep


def test_the_activated_error_is_smaller_than_that_of_linear_fits() -> None:
    first, second = reading(), None
    second = copy.deepcopy(first)
    nonlinear = ed.NonlinearReconstructionPruning().fit([first], 6)
    linear = ed.NonlinearReconstructionPruning(criterion="linear").fit([second], 6)
    assert total_error([first], nonlinear) < 0.9 * total_error([second], linear)


def session_of(model: nn.Module, task: ed.Task) -> Session:
    return Session(model=model, task=task, original=copy.deepcopy(model))


def test_cutting_is_masking_and_the_sweep_sees_what_was_pruned(trained, digits) -> None:
    method = ed.NonlinearReconstructionPruning(samples=48, points=4, drop_fraction=0.2, steps=2, refine_steps=5)
    session = session_of(trained.eval(), digits)
    graph, groups = method.groups(session)
    selection = method.select(session, graph, groups)
    method.apply(cut := session_of(copy.deepcopy(session.original), digits))
    masked = zero_contributions(session.model, selection, graph)
    x = next(iter(digits.evaluation.batches(32))).inputs
    with torch.inference_mode():
        torch.testing.assert_close(cut.model.eval()(x), masked.eval()(x), atol=1e-4, rtol=1e-4)
    assert {name: len(gone) for name, gone in selection.items()} == {"conv1": 10, "conv2": 25, "fc1": 250}
    errors = session.findings["fit"]["errors"]
    assert errors["fc1"]["activated"] == pytest.approx(errors["fc1"]["linear"]), "nothing follows the logits"
    assert errors["conv1"]["activated"] < errors["conv1"]["linear"]


def test_repairs_what_norms_leave_broken(trained, digits) -> None:
    step = ed.NonlinearReconstructionPruning(
        pruning_ratio=0.7, samples=51, points=6, drop_fraction=0.2, refine_steps=20
    )
    ours = ed.compress(trained, digits, [step], quiet=True, latency=False)
    norms = ed.compress(trained, digits, [ed.PruneChannels(pruning_ratio=0.7)], quiet=True, latency=False)
    assert ours.after.params == norms.after.params
    assert ours.after.metric.value > norms.after.metric.value


def test_meets_a_budget_and_refuses_nonsense(trained, digits) -> None:
    fields = ed.NonlinearReconstructionPruning.contract_fields
    step = ed.NonlinearReconstructionPruning(**fields, scope="global")
    result = ed.compress(trained, digits, [step], budget="params=0.5", quiet=True, latency=False)
    assert result.budget[0].met
    for wrong in ({"drop_fraction": 0.0}, {"criterion": "cubic"}, {"samples": 0}):
        with pytest.raises(ed.ConfigurationError, match=next(iter(wrong))):
            ed.NonlinearReconstructionPruning(**wrong)
