"""Auxiliary classifiers: where they sit, what they compute, how they are trained beside the network."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.auxiliary_heads import (
    AuxiliaryHead,
    AuxiliaryTraining,
    auxiliary_layers,
    listen,
    output_shapes,
)
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph


def net() -> nn.Sequential:
    body = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.ReLU()]
    return nn.Sequential(*body, nn.Linear(8, 3))


@pytest.fixture
def session() -> Session:
    x, y = torch.randn(24, 1, 6, 6), torch.arange(24) % 3
    model, settings = net(), ed.training.TrainingSettings(batch_size=8, learning_rate=0.1)
    task = ed.Task.from_tensors((x, y), (x, y), num_classes=3)
    return Session(model=model, task=task, original=copy.deepcopy(model), settings=settings)


def test_features_are_averages_of_rectified_normalised_maps() -> None:
    maps = torch.randn(9, 4, 5, 3)
    head, last = AuxiliaryHead(4, 3), AuxiliaryHead(4, 3, last=True)
    last.load_state_dict(head.state_dict())
    deviations = maps.var((0, 2, 3), unbiased=False, keepdim=True).add(1e-5).sqrt()
    expected = ((maps - maps.mean((0, 2, 3), keepdim=True)) / deviations).relu().mean((2, 3))
    torch.testing.assert_close(head.features(maps), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last.features(maps.movedim(1, -1)), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head(maps), head.linear(expected), atol=1e-5, rtol=1e-4)
    vectors = torch.randn(9, 4)
    torch.testing.assert_close(head.features(vectors), last.features(vectors))


def test_layers_are_spread_over_the_depth() -> None:
    model = net()
    graph = ChannelGraph.trace(model, torch.zeros(1, 1, 6, 6))
    assert auxiliary_layers(model, graph, 0) == {}
    assert auxiliary_layers(model, graph, 1) == {"2": 0.5}
    assert auxiliary_layers(model, graph, 3) == auxiliary_layers(model, graph, 99) == {"0": 0.25, "2": 0.5, "5": 0.75}
    single = nn.Sequential(nn.Linear(4, 2))
    assert auxiliary_layers(single, ChannelGraph.trace(single, torch.zeros(1, 4)), 2) == {}


def test_shapes_say_where_channels_are(session) -> None:
    shapes, last = output_shapes(session, ["0", "5"])
    batch = len(session.example_input)
    assert shapes == {"0": (batch, 4, 4, 4), "5": (batch, 8)}
    assert last == {"0": False, "5": True}
    assert not any(module._forward_hooks for module in session.model.modules())
    heads = AuxiliaryTraining(session, {"0": 0.25, "5": 0.75}).heads
    assert {name: (head.norm.num_features, head.last) for name, head in heads.items()} == {
        "0": (4, False),
        "5": (8, True),
    }


def test_listening_keeps_the_last_output_with_its_gradient(session) -> None:
    into: dict[str, torch.Tensor] = {}
    handle = listen(session.model, "2", into)
    session.model(torch.randn(2, 1, 6, 6))
    assert into["2"].shape == (2, 6, 2, 2)
    assert into["2"].requires_grad
    handle.remove()
    seen = into.pop("2")
    session.model(seen.new_zeros(1, 1, 6, 6))
    assert not into


def test_every_batch_has_a_step_for_the_classifiers_weighted_by_depth(session) -> None:
    training = AuxiliaryTraining(session, {"0": 0.05, "5": 0.8})
    batch = next(iter(session.task.train.batches(8)))
    steps: list[object] = []
    trainer = SimpleNamespace(
        model=session.model,
        task=session.task,
        forward=lambda batch: session.model(batch.inputs),
        update=steps.append,
        training_step=lambda batch: steps.append("own") or torch.tensor(0.0),
    )
    training.setup(trainer)
    training.training_step(trainer, batch)
    losses = {
        name: session.task.loss(head(training.seen[name]), batch.targets).item()
        for name, head in training.heads.items()
    }
    assert steps[1:] == ["own"]
    assert steps[0].item() == pytest.approx(0.01 * losses["0"] + 0.8**2 * losses["5"], rel=1e-5)
    training.finish(trainer)
    assert not training.seen
    assert not any(module._forward_hooks for module in session.model.modules())


def test_classifiers_learn_and_are_restored(session) -> None:
    training = AuxiliaryTraining(session, {"2": 0.5})
    owned = [id(p) for group in training.parameter_groups(None) for p in group["params"]]
    assert owned == [id(p) for p in training.heads["2"].parameters()]
    names, start = list(session.model.state_dict()), copy.deepcopy(training.state_dict())
    session.train([training], epochs=1)
    assert list(session.model.state_dict()) == names, "classifiers are no part of the network"
    for name in ("linear.weight", "norm.weight", "norm.running_mean"):
        assert not torch.equal(training.state_dict()["2"][name], start["2"][name])
    again = AuxiliaryTraining(session, {"2": 0.5})
    again.load_state_dict(training.state_dict())
    x = torch.randn(5, 6, 2, 2)
    torch.testing.assert_close(again.heads["2"].eval()(x), training.heads["2"].eval()(x))
