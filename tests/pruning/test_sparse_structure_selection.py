"""Sparse structure selection: factors that reach zero, an exact cut, and budgets in the order of the factors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.pruning.sparse_structure_selection import BlockFactors, ChannelFactors, GroupFactors
from efficientdnns.session import Session


def images_task(n: int = 64) -> ed.Task:
    torch.manual_seed(0)
    x, y = torch.randn(n, 3, 12, 12), torch.randint(4, (n,))
    return ed.Task.from_tensors((x, y), (x[:16], y[:16]), num_classes=4)


def small_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(360, 4)),
    )


def session_of(model: nn.Module, task: ed.Task) -> Session:
    return Session(model=model, task=task, original=copy.deepcopy(model))


class Keep(ed.Callback):
    """Notes the outputs with factors before the cut, and what gradients arrive where."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self.outputs = torch.empty(0)

    def finish(self, trainer):
        with torch.inference_mode():
            self.outputs = trainer.model.eval()(self.x)


def train(method: ed.SparseStructureSelection, model: nn.Module, **options):
    task = images_task()
    session, x = session_of(model, task), torch.randn(5, 3, 12, 12)
    callback, keep = method.callback(session), Keep(x)
    session.train([callback, keep], **{"epochs": method.epochs, "batch_size": 8, "learning_rate": 0.05} | options)
    with torch.inference_mode():
        torch.testing.assert_close(session.model(x), keep.outputs, atol=1e-5, rtol=1e-5)
    return session, callback


def test_exact_zeros_appear_go_and_change_nothing() -> None:
    method = ed.SparseStructureSelection(gamma=0.15, epochs=3)
    session, callback = train(method, small_net(), schedule="constant")
    zeros = {name: int((value == 0.0).sum()) for name, value in callback.factors.items()}
    assert 0 < sum(zeros.values()) < 18
    findings = session.findings["fit"]
    assert findings["zeros_by_epoch"][-1] == zeros
    assert {name: before - after for name, (before, after) in findings["widths"].items()} == {
        name: min(count, callback.factors[name].numel() - 1) for name, count in zeros.items()
    }
    assert not any("scaling_factors" in name for name in session.model.state_dict())


def test_no_zero_appears_without_a_penalty_and_nothing_goes() -> None:
    session, callback = train(ed.SparseStructureSelection(gamma=0.0, epochs=1), small_net())
    assert all((value > 0).all() for value in callback.factors.values())
    assert session.model[0].out_channels == 8


def test_blocks_of_zero_factor_go_and_change_nothing() -> None:
    class Kill(BlockFactors):
        def epoch_end(self, trainer):
            with torch.no_grad():
                self.factors["layer2.0"].zero_()
            super().epoch_end(trainer)

    model, task = ed.models.build("small-resnet", num_classes=4, in_channels=3), images_task(48)
    session, x = session_of(model, task), torch.randn(5, 3, 12, 12)
    method = ed.SparseStructureSelection(level="block", gamma=0.0, epochs=1)
    callback, keep = Kill(method, session), Keep(x)
    session.train([callback, keep], epochs=1, batch_size=16)
    with torch.inference_mode():
        torch.testing.assert_close(session.model(x), keep.outputs, atol=1e-5, rtol=1e-5)
    assert session.findings["fit"]["removed"] == ["layer2.0"]
    assert not any(name.startswith("layer2.0.") for name, _ in session.model.named_parameters())


def test_factors_are_outside_weight_decay_and_a_closed_branch_trains_only_its_factor() -> None:
    seen: list[tuple[bool, bool]] = []

    class Closed(BlockFactors):
        def after_backward(self, trainer):
            with torch.no_grad():
                if trainer.step:
                    weight = trainer.model.get_parameter("layer1.0.conv2.weight")
                    seen.append((bool(weight.grad.any()), bool(self.factors["layer1.0"].grad.any())))
            super().after_backward(trainer)
            with torch.no_grad():
                self.factors["layer1.0"].zero_()

    method = ed.SparseStructureSelection(level="block", gamma=0.0, epochs=1)
    session = session_of(ed.models.build("small-resnet", num_classes=4, in_channels=3), images_task(48))
    callback = Closed(method, session)
    session.train([callback], epochs=1, batch_size=16, weight_decay=0.1)
    assert set(seen) == {(False, True)}


def test_weight_decay_is_off_for_factors() -> None:
    groups: list[dict] = []

    class Watch(ChannelFactors):
        def start(self, trainer):
            groups.extend(trainer.optimizer.param_groups)

    session = session_of(small_net(), images_task())
    session.train([Watch(ed.SparseStructureSelection(), session)], epochs=0, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(p.numel() for p in groups[1]["params"]) == 18


def test_the_budget_takes_the_smallest_factors_wherever_they_are() -> None:
    class Given(ChannelFactors):
        def start(self, trainer):
            with torch.no_grad():
                self.factors["0"].copy_(torch.linspace(0.5, 1, 8))
                self.factors["4"].copy_(torch.linspace(0.1, 0.4, 10))

    model, task = small_net(), images_task()
    session = session_of(model, task)
    session.budget = ed.Budget(params=0.7)
    session.train([Given(ed.SparseStructureSelection(), session)], epochs=0)
    assert session.model[0].out_channels == 8
    assert session.model[4].out_channels < 8


@pytest.mark.parametrize("level", ["channel", "block"])
def test_meets_a_budget(level) -> None:
    step = ed.SparseStructureSelection(level=level, gamma=0.1, epochs=1, batch_size=16)
    model = ed.models.build("small-resnet", num_classes=4, in_channels=3)
    result = ed.compress(model, images_task(48), [step], budget="params=0.6", quiet=True, latency=False)
    assert result.budget[0].met


def test_a_budget_of_blocks_out_of_reach_and_a_network_without_blocks_are_refused() -> None:
    step, task = ed.SparseStructureSelection(level="block", epochs=1), images_task(48)
    model = ed.models.build("small-resnet", num_classes=4, in_channels=3)
    with pytest.raises(ed.BudgetError, match="least that is reachable"):
        ed.compress(model, task, [step], budget="params=0.001", quiet=True)
    with pytest.raises(ed.SurgeryError, match="no residual branches; write level=channel"):
        ed.compress(small_net(), task, [step], quiet=True)
    with pytest.raises(ed.ConfigurationError, match="gamma"):
        ed.SparseStructureSelection(gamma=-1)


def test_too_weak_a_penalty_is_said(capsys) -> None:
    result = ed.compress(
        small_net(), images_task(), [ed.SparseStructureSelection(epochs=1, batch_size=16)], latency=False
    )
    assert result.report.methods[0].findings["pull"] < 1
    assert "too little to reach zero" in " ".join(capsys.readouterr().err.split())


def test_groups_of_zero_factor_go_and_change_nothing() -> None:
    class Kill(GroupFactors):
        def epoch_end(self, trainer):
            with torch.no_grad():
                self.factors["3"].copy_(torch.tensor([0.0, 0.7, 0.0, 1.2]))
            super().epoch_end(trainer)

    def grouped() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12), nn.ReLU()),
            *(nn.Conv2d(12, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)),
        )

    session, x = session_of(grouped(), images_task(48)), torch.randn(5, 3, 12, 12)
    method = ed.SparseStructureSelection(level="group", gamma=0.0, epochs=1)
    keep = Keep(x)
    session.train([Kill(method, session), keep], epochs=1, batch_size=16)
    with torch.inference_mode():
        torch.testing.assert_close(session.model(x), keep.outputs, atol=1e-5, rtol=1e-5)
    assert session.findings["fit"]["cardinality"] == {"3": [4, 2]}
    assert session.model[3].groups == 2
    step = ed.SparseStructureSelection(level="group", gamma=0.0, epochs=1, batch_size=16)
    result = ed.compress(grouped(), images_task(48), [step], budget="params=0.7", quiet=True, latency=False)
    assert result.budget[0].met
    with pytest.raises(ed.SurgeryError, match="no grouped convolutions"):
        ed.compress(small_net(), images_task(48), [step], quiet=True)
