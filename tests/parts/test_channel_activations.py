"""What readers see of a group's channels: the values themselves, at every kind of reader, without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.channel_activations import observing, reader_inputs
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph


class Net(nn.Module):
    """Channels read by two convolutions, then by a linear layer that sees flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(4 * 9, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.fc(F.max_pool2d(self.norm(self.left(x) + self.right(x)).relu(), 2).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.lstm(x)[0])


@pytest.fixture
def work() -> tuple[Session, ChannelGraph]:
    x, y = torch.randn(24, 2, 8, 8), torch.arange(24) % 3
    model = Net()
    task = ed.Task.from_tensors((x, y), (x, y), (x, y))
    return Session(model=model, task=task, original=copy.deepcopy(model)), ChannelGraph.trace(model, x[:1])


def test_rows_are_what_every_reader_is_given(work) -> None:
    session, graph = work
    model = session.model.train()
    x = session.task.calibration.inputs[:5]
    values = reader_inputs(session, model, graph.group("stem"), 5, positions=36)
    seen = model.stem(x).relu().movedim(1, -1).reshape(-1, 6)
    torch.testing.assert_close(values, torch.cat([seen, seen]), msg="one block for each of the two readers")
    assert model.training
    assert model.norm.num_batches_tracked == 0, "calibration runs in evaluation mode"
    assert not values.requires_grad


def test_flattened_maps_are_put_back_into_channels(work) -> None:
    session, graph = work
    model = session.model.eval()
    x = session.task.calibration.inputs[:4]
    values = reader_inputs(session, model, graph.group("left"), 4)
    assert values.shape == (4 * 9, 4)
    rebuilt = values.view(4, 9, 4).transpose(1, 2).flatten(1)
    torch.testing.assert_close(model.fc(rebuilt), model(x))


def test_places_are_the_same_for_all_samples_readers_and_calls(work) -> None:
    session, graph = work
    model = session.model
    x = session.task.calibration.inputs[:6]
    values = reader_inputs(session, model, graph.group("stem"), 6, positions=5)
    first, second = values.view(2, 6, 5, 6)
    assert torch.equal(first, second)
    maps = model.stem(x).relu().flatten(2).transpose(1, 2).detach()
    places = [(maps[0] == row).all(1).nonzero()[0].item() for row in first[0]]
    assert places == sorted(set(places))
    torch.testing.assert_close(first, maps[:, places])
    assert torch.equal(values, reader_inputs(session, model, graph.group("stem"), 6, positions=5))
    session.seed = 1
    assert not torch.equal(values, reader_inputs(session, model, graph.group("stem"), 6, positions=5))


def test_a_recurrent_layer_reads_what_it_returns() -> None:
    model, x = Recurrent(), torch.randn(3, 4, 5)
    graph = ChannelGraph.trace(model, x)
    group = next(group for group in graph.groups if group.size == 6)
    seen: list[torch.Tensor] = []
    with observing(model, [group], lambda name, values: seen.append(values)):
        model(x)
    expected = model.lstm(x)[0]
    assert len(seen) == len([member for member in group.members if member.role == "in"]) == 2
    for values in seen:
        torch.testing.assert_close(values, expected.detach())


def test_observing_leaves_nothing_behind(work) -> None:
    session, graph = work
    names: list[str] = []

    def interrupted() -> None:
        with observing(session.model, graph.groups, lambda name, values: names.append(name)):
            session.model(torch.randn(1, 2, 8, 8))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert sorted(names) == ["left", "stem", "stem"]
    session.model(torch.randn(1, 2, 8, 8))
    assert len(names) == 3


def test_readers_that_no_call_reaches_give_no_rows(work) -> None:
    session, graph = work

    class Functional(Net):
        def forward(self, x):
            y = self.stem(x).relu()
            y = F.conv2d(y, self.left.weight, self.left.bias) + F.conv2d(y, self.right.weight, self.right.bias)
            return self.fc(F.max_pool2d(self.norm(y).relu(), 2).flatten(1))

    session.model = Functional()
    assert reader_inputs(session, session.model, graph.group("stem"), 5).shape == (0, 6)
