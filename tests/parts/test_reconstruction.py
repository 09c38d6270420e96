"""Reconstruction: patches are what layers really read, errors, greedy scores and the fit of what stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.reconstruction import (
    Reading,
    Response,
    descend,
    gather,
    least_squares,
    readable,
    removal_errors,
    response_after,
    start_from_least_squares,
    total_error,
    write_back,
)
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Member


def made_up(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, relu: bool = True) -> Reading:
    """x (n, size, k), w (size, k, out): before is what all channels give."""
    member = Member("l.weight", "l", "weight", 1, "in", torch.arange(x.shape[1])[:, None])
    before = x.flatten(1) @ w.flatten(0, 1) + b
    response = Response(activation=torch.relu if relu else None)
    return Reading(member, x, w.clone(), b.expand_as(before).clone(), torch.zeros_like(b), True, before, response)


def random_reading(n: int = 400, size: int = 8, k: int = 2, out: int = 5, relu: bool = True) -> Reading:
    return made_up(*(torch.randn(*s).double() for s in ((n, size, k), (size, k, out), (out,))), relu)


def test_removal_errors_are_those_of_removing() -> None:
    readings = [random_reading(), random_reading(out=3)]
    kept = torch.tensor([0, 2, 3, 5, 7])
    expected = [total_error(readings, kept[kept != j]) for j in kept]
    assert removal_errors(readings, kept).tolist() == pytest.approx(expected)
    assert removal_errors(readings, kept, entries=1).tolist() == pytest.approx(expected)


def test_a_dead_channel_costs_nothing() -> None:
    reading = random_reading()
    reading.inputs[:, 3] = 0
    reading.before = reading.linear(torch.arange(8))
    errors = removal_errors([reading], torch.arange(8))
    assert errors[3] == 0
    assert errors.argmin() == 3
    few = torch.tensor([1, 3, 4])
    assert removal_errors([reading], few)[1] == pytest.approx(total_error([reading], few))


def test_what_stays_below_zero_counts_only_linearly() -> None:
    x, w, b = (
        torch.rand(100, 2, 1).double(),
        torch.tensor([[[1.0, -1.0]], [[0.0, -1.0]]]).double(),
        torch.zeros(2).double(),
    )
    reading = made_up(x, w, b)  # the second channel only lowers what is negative already
    everything = torch.arange(2)
    assert removal_errors([reading], everything)[1] == 0
    assert removal_errors([reading.without_activation()], everything)[1] > 0


def test_least_squares_is_the_optimum_and_descent_comes_to_it() -> None:
    reading, kept = random_reading(relu=False), torch.tensor([0, 1, 4, 6, 7])
    x = torch.cat([reading.inputs[:, kept].flatten(1), torch.ones(400, 1).double()], 1)
    best = torch.linalg.lstsq(x, reading.before).solution
    optimum = float((reading.before - x @ best).square().sum() / 800)
    weight, bias = least_squares(reading, kept)
    fitted = copy.deepcopy(reading)
    fitted.weight[kept], fitted.bias = weight, bias
    assert total_error([fitted], kept) == pytest.approx(optimum, rel=1e-6)
    errors = descend(reading, kept, 300)
    assert errors[-1] <= (1 + 1e-3) * optimum
    assert total_error([reading], kept) == pytest.approx(errors[-1])


def test_a_copy_makes_up_for_its_original() -> None:
    x = torch.randn(300, 6, 1).double()
    x[:, 4] = x[:, 1]
    reading = made_up(x, torch.randn(6, 1, 5).double(), torch.randn(5).double())
    kept = torch.tensor([0, 1, 2, 3, 5])
    assert total_error([reading], kept) > 0.01
    start_from_least_squares([reading], kept)
    descend(reading, kept, 50)
    assert total_error([reading], kept) < 1e-6


def test_descent_never_raises_the_error() -> None:
    reading, kept = random_reading(), torch.tensor([1, 2, 6])
    errors = descend(reading, kept, 60, rate=100.0)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


class Various(nn.Module):
    """Strided and dilated patches, a pool before the activation, several readers of a stream, a flattened one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3, padding="same", padding_mode="reflect")
        self.b, self.norm = nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.c = nn.Conv2d(6, 5, (3, 1), dilation=2, padding=(2, 0))
        self.head = nn.Linear(6 * 16 + 5 * 16, 4)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = torch.relu(torch.max_pool2d(x, 1) + 0)
        y = torch.relu(torch.nn.functional.max_pool2d(self.norm(self.b(x)), 1))
        return self.head(torch.cat([y.flatten(1), self.c(y).flatten(1)], 1))


def session_of(model: nn.Module) -> Session:
    torch.manual_seed(0)
    x, y = torch.randn(40, 2, 8, 8), torch.randint(4, (40,))
    task = ed.Task.from_tensors((x, y), (x[:16], y[:16]), calibration=(x[:12], y[:12]), num_classes=4)
    return Session(model=model, task=task, original=copy.deepcopy(model))


@pytest.mark.parametrize("points", [3, 1000])
def test_readings_are_what_the_layers_compute(points) -> None:
    model = Various().eval()
    model.norm.weight.data.uniform_(0.5, 1.5)
    model.norm.running_mean.normal_()
    session = session_of(model)
    graph = ChannelGraph.trace(model, session.example_input)
    groups = readable(model, graph.groups)
    assert [(group.name, group.size) for group in groups] == [("a", 6), ("b", 6), ("c", 5)]
    for group in groups:
        for reading in gather(session, copy.deepcopy(model), model, graph, group, 12, points):
            # Linear responses to all channels, and what else there is, are the layer's outputs.
            everything = reading.linear(torch.arange(group.size))
            torch.testing.assert_close(everything, reading.before, atol=1e-5, rtol=1e-5)
            others = 0 if group.name in ("a",) or reading.member.module == "c" else 1
            layer = model.get_submodule(reading.member.module)
            bias = 0 if layer.bias is None else layer.bias
            if not others:
                torch.testing.assert_close(reading.rest, reading.rest * 0 + bias, atol=1e-5, rtol=1e-5)
            assert total_error([reading], torch.arange(group.size)) < 1e-8


def test_what_follows_a_layer() -> None:
    model = Various().eval()
    model.norm.weight.data.uniform_(0.5, 1.5)
    graph = ChannelGraph.trace(model, torch.zeros(1, 2, 8, 8))
    follows = response_after(model, graph, "b")
    x = torch.randn(7, 6)
    with torch.inference_mode():
        torch.testing.assert_close(follows(x), torch.relu(model.norm(x[..., None, None]))[..., 0, 0])
    assert response_after(model, graph, "head").activation is None
    assert response_after(model, graph, "c").activation is None


def test_weights_come_back_where_they_were_read() -> None:
    model = Various().eval()
    session = session_of(model)
    graph = ChannelGraph.trace(model, session.example_input)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for group in readable(model, graph.groups):
        readings = gather(session, copy.deepcopy(model), model, graph, group, 8)
        write_back(model, readings)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
    readings[0].weight += 1
    write_back(model, readings)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight"}
    assert (model.head.weight != before["head.weight"]).sum() == 5 * 16 * 4
