"""Tracing: batches that stay open, nested inputs and outputs, reasons."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from efficientdnns.deployment.graph import Outputs, flatten, output_name, plain, trace, unflatten
from efficientdnns.errors import ModelError


@dataclass
class Named:
    logits: Tensor
    loss: Tensor | None
    states: tuple[Tensor, ...]


def test_nested_outputs_are_flattened_with_names_and_restored() -> None:
    a, b, c = (torch.full((1,), float(i)) for i in range(3))
    value = plain([{"boxes": a, "labels": b}, Named(c, None, (a, b))])
    places = [place for place, _ in flatten(value)]
    names = ["output.0.boxes", "output.0.labels", "output.1.logits", "output.1.states.0", "output.1.states.1"]
    assert [output_name(place) for place in places] == names
    again = unflatten(places, [tensor for _, tensor in flatten(value)])
    assert again[0]["boxes"] is a
    assert isinstance(again[1], Outputs)
    assert again[1].logits is c
    assert again[1].states[1] is b
    with pytest.raises(AttributeError, match="no output 'loss'"):
        _ = again[1].loss
    assert unflatten([()], [a]) is a
    assert output_name(()) == "output"
    assert output_name(("logits",)) == "logits"


def test_the_batch_stays_open() -> None:
    graph = trace(nn.Linear(3, 2), torch.randn(1, 3))
    assert graph.dynamic_batch
    assert graph.inputs == ("input",)
    assert graph.outputs == ("output",)
    assert graph.program.module()(torch.randn(7, 3)).shape == (7, 2)
    assert not trace(nn.Linear(3, 2), torch.randn(1, 3), dynamic_batch=False).dynamic_batch
    assert trace(nn.Linear(3, 2), torch.randn(1, 3), dynamic_batch=False, batch=4).batch == 4


def test_a_network_that_pins_its_batch_gets_a_note() -> None:
    class Pins(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(len(x))[:, None]

    graph = trace(Pins(), torch.randn(1, 3))
    assert not graph.dynamic_batch
    assert graph.batch == 1
    assert "size of its batch" in graph.note


def test_inputs_by_name_and_position() -> None:
    class Both(nn.Module):
        def forward(self, tokens: Tensor, mask: Tensor) -> Named:
            return Named(tokens * mask, None, (mask, mask + 1))

    mapping = {"tokens": torch.ones(1, 4), "mask": torch.ones(1, 4)}
    graph = trace(Both(), mapping)
    assert graph.inputs == ("tokens", "mask")
    assert graph.outputs == ("logits", "states.0", "states.1")
    assert graph.dynamic_batch
    assert trace(Both(), tuple(mapping.values())).inputs == ("input.0", "input.1")


def test_what_cannot_be_traced_is_said_in_one_line() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match=r"torch\.export cannot trace") as error:
        trace(Branches(), torch.randn(1, 3))
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="no tensor"):
        trace(type("Nothing", (nn.Module,), {"forward": lambda self, x: None})(), torch.randn(1, 3))


def test_training_flags_and_gradients_are_left_alone(trained) -> None:
    trained.train()
    trace(trained, torch.randn(1, 1, 28, 28))
    assert all(module.training for module in trained.modules())
    assert all(parameter.requires_grad for parameter in trained.parameters())
