"""DCP: selection from the empty set by gradients, the layer trained on, the rule of DCP-Adapt, classifiers in the middle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.auxiliary_heads import AuxiliaryHead, AuxiliaryTraining, auxiliary_layers
from efficientdnns.pruning.discrimination_aware_channel_pruning import Chooser, Layer, stopped
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph


def session_of(model: nn.Module, task: ed.Task) -> Session:
    return Session(model=model, task=task, original=copy.deepcopy(model))


def images_task(n: int = 96) -> ed.Task:
    torch.manual_seed(0)
    x, y = torch.randn(n, 3, 8, 8), torch.randint(4, (n,))
    return ed.Task.from_tensors((x, y), (x[:16], y[:16]), num_classes=4)


def net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    ).eval()


def chooser_of(model: nn.Module, **fields) -> tuple[Chooser, ChannelGraph]:
    method = ed.DiscriminationAwareChannelPruning(samples=64, **fields)
    session = session_of(model, images_task())
    graph = ChannelGraph.trace(model, session.example_input)
    return Chooser(method, session, graph, AuxiliaryTraining(session, auxiliary_layers(model, graph, 1)).heads), graph


def test_a_classifier_gives_logits_of_averaged_maps() -> None:
    for shape, last in (((5, 7, 6, 4), False), ((5, 7), True), ((5, 9, 7), True)):
        head = AuxiliaryHead(7, 3, last)
        x = torch.randn(shape)
        assert head.features(x).shape == (5, 7)
        assert head(x).shape == (5, 3)
    maps = torch.randn(5, 7, 6, 4)
    head = AuxiliaryHead(7, 3).eval()
    torch.testing.assert_close(head.features(maps), torch.relu(maps / (1 + 1e-5) ** 0.5).mean((2, 3)))


def test_classifiers_are_spread_evenly_and_never_last() -> None:
    model = net()
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8))
    assert list(auxiliary_layers(model, graph, 1)) in (["0"], ["3"])
    assert list(auxiliary_layers(model, graph, 5)) == ["0", "3"]
    assert auxiliary_layers(model, graph, 0) == {}


def test_selection_starts_from_nothing_and_adds_one_at_a_time(monkeypatch) -> None:
    model = net()
    chooser, graph = chooser_of(model, steps=2)
    counts: list[tuple[int, int]] = []
    train = Layer.train

    def watched(self, chosen):
        train(self, chosen)
        weight = self.model[3].weight.detach()
        counts.append((int(chosen.sum()), int(weight.abs().sum((0, 2, 3)).count_nonzero())))
        assert not weight[:, ~chosen].any()

    monkeypatch.setattr(Layer, "train", watched)
    gone = chooser(graph.group("0"), 5)
    assert counts == [(n, n) for n in range(1, 6)]
    assert len(gone) == 3
    assert len(chooser.losses["0"]) == 6


def test_unselected_channels_have_gradients_that_rank_them() -> None:
    chooser, graph = chooser_of(net())
    layer = Layer(chooser, graph.group("0"))
    _, slopes = layer.loss_and_slopes()
    assert not layer.model[3].weight.any()
    assert (slopes > 0).all()
    layer.close()


class Scaled(nn.Module):
    """Channels that are the inputs themselves, read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.relu(self.read(self.make(x))))


def test_the_one_channel_that_matters_comes_first() -> None:
    model = Scaled().eval()
    with torch.no_grad():
        model.make.weight.copy_(torch.eye(6))
        model.read.weight.mul_(torch.eye(6)[4])
    x, y = torch.randn(256, 6), torch.randint(3, (256,))
    session = session_of(model, ed.Task.from_tensors((x, y), (x[:16], y[:16]), num_classes=3))
    graph = ChannelGraph.trace(model, session.example_input)
    method = ed.DiscriminationAwareChannelPruning(samples=200, auxiliary_weight=0.0)
    gone = Chooser(method, session, graph, {})(graph.group("make"), 1)
    assert gone.tolist() == [0, 1, 2, 3, 5]


def test_the_rule_of_dcp_adapt() -> None:
    assert not stopped([4.0], 0.1)
    assert not stopped([4.0, 3.0], 0.1)
    assert stopped([4.0, 3.0, 2.7], 0.1)


def test_a_smaller_epsilon_never_selects_fewer() -> None:
    kept = []
    for epsilon in (0.1, 0.01, 0.001, 1e-9):
        torch.manual_seed(0)
        chooser, graph = chooser_of(net(), epsilon=epsilon, steps=2)
        kept.append(8 - len(chooser(graph.group("0"), 1)))
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


def test_trains_with_classifiers_prunes_and_reports() -> None:
    step = ed.DiscriminationAwareChannelPruning(losses=2, auxiliary_epochs=1, added=0.3, steps=2, samples=64)
    task = images_task()
    findings = ed.compress(net(), task, [step], quiet=True, latency=False).report.methods[0].findings
    assert findings["widths"] == {"0": [8, 4], "3": [6, 3]}
    assert findings["classifiers"] == ["0", "3"]
    for losses in findings["losses"].values():
        assert losses[-1] < losses[0]
    adapted = step.model_copy(update={"epsilon": 1e-9})
    findings = ed.compress(net(), task, [adapted], quiet=True, latency=False).report.methods[0].findings
    assert findings["widths"]["0"][1] > 4


def test_auxiliary_steps_train_classifiers_and_the_layers_before_them() -> None:
    model, task = net(), images_task()
    session = session_of(model, task)
    training = AuxiliaryTraining(session, {"0": 0.3})
    head = copy.deepcopy(training.heads["0"].state_dict())
    session.train([training], epochs=1, batch_size=16)
    assert not torch.equal(training.heads["0"].linear.weight, head["linear.weight"])
    assert not any(name.startswith("linear") for name in session.model.state_dict())
    again = AuxiliaryTraining(session, {"0": 0.3})
    again.load_state_dict(training.state_dict())
    assert torch.equal(again.heads["0"].linear.weight, training.heads["0"].linear.weight)


def test_meets_a_budget_and_refuses_what_is_no_classification() -> None:
    fields = ed.DiscriminationAwareChannelPruning.contract_fields
    step = ed.DiscriminationAwareChannelPruning(**fields)
    result = ed.compress(net(), images_task(), [step], budget="params=0.6", quiet=True, latency=False)
    assert result.budget[0].met
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    regression = ed.Task.from_tensors((x, y), (x, y), kind="regression")
    with pytest.raises(ed.DataError, match="tells classes apart"):
        ed.compress(Scaled(), regression, [ed.DiscriminationAwareChannelPruning()], quiet=True)
    for wrong in ({"epsilon": 0.0}, {"added": 2.0}, {"order": "worst"}):
        with pytest.raises(ed.ConfigurationError, match=next(iter(wrong))):
            ed.DiscriminationAwareChannelPruning(**wrong)
