"""The common course of structured methods: plan, choice in order of execution, cut, fine-tuning."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.measurement.macs import count_macs
from efficientdnns.parts.channel_pruning import (
    ChannelCallback,
    ChannelPruning,
    ChannelTraining,
    fine_tune,
    silence,
    sweep,
    switch_off,
)
from efficientdnns.parts.structured import Widths
from efficientdnns.session import Session
from efficientdnns.surgery import remove, zero_contributions


class Net(nn.Module):
    """A residual sum, a depthwise convolution, flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6 * 16, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = (x + self.conv(x)).relu()
        return self.fc(self.point(self.depthwise(x)).relu().flatten(1))


def session_of(model: nn.Module, **options: Any) -> Session:
    torch.manual_seed(0)
    x, y = torch.randn(48, 1, 6, 6), torch.randint(4, (48,))
    task = ed.Task.from_tensors((x, y), (x[:16], y[:16]), num_classes=4)
    settings = ed.training.TrainingSettings(batch_size=16, learning_rate=0.05)
    return Session(model=model, task=task, original=copy.deepcopy(model), settings=settings, **options)


class First(ChannelPruning):
    """Scores channels by their position."""

    name: ClassVar[str] = ""

    def scores(self, session, graph, groups):
        return {group.name: -torch.arange(float(group.size)) for group in groups}


class AtTheEnd(ChannelTraining):
    """The same after a run of training."""

    name: ClassVar[str] = ""

    def callback(self, session):
        return Positions(self, session)


class Positions(ChannelCallback):
    def scores(self, trainer):
        return {group.name: -torch.arange(float(group.size)) for group in self.groups}


@pytest.fixture
def session() -> Session:
    torch.manual_seed(0)
    return session_of(Net())


def test_a_score_is_a_method(session) -> None:
    First(pruning_ratio=0.5).apply(session)
    assert session.model.stem.out_channels == session.model.conv.out_channels == 4
    assert session.model.depthwise.groups == 4
    assert session.model.point.out_channels == 3
    assert session.model.fc.in_features == 3 * 16
    assert torch.equal(session.model.point.weight, session.original.point.weight[:3, :4])
    assert session.findings[session.label]["widths"] == {"stem": [8, 4], "point": [6, 3]}


def test_fields_that_decide_how_many_go(session) -> None:
    def widths(**fields):
        method = First(**fields)
        graph, groups = method.groups(session)
        return method.plan(session, graph, groups, method.scores(session, graph, groups))

    assert widths(pruning_ratio=0.9) == {"stem": 8 - 7, "point": 6 - 5}
    assert widths(pruning_ratio=0.5, round_to=4) == {"stem": 4, "point": 4}
    assert widths(pruning_ratio=0.5, ratios={"point": 0.0}) == {"stem": 4, "point": 6}
    assert widths(pruning_ratio=0.5, skip=("stem",)) == {"point": 3}
    with pytest.raises(ed.ConfigurationError, match=r"skip.*stemm.*did you mean 'stem'"):
        widths(skip=("stemm",))


def test_scores_of_groups_are_made_comparable_unless_they_are(session) -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    even = Widths.of(scores, scope="global").at(0.5)
    assert even == {"a": 2, "b": 2}
    assert Widths.of(scores, scope="global", comparable=True).at(0.5) == {"a": 1, "b": 4}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_budget_decides_instead_of_the_ratio(scope) -> None:
    torch.manual_seed(0)
    model = Net()
    result = ed.compress(
        model, session_of(model).task, First(scope=scope), budget="macs=0.5", quiet=True, latency=False
    )
    share = count_macs(result.model, torch.zeros(1, 1, 6, 6)).total / count_macs(model, torch.zeros(1, 1, 6, 6)).total
    assert 0.35 < share <= 0.5


def test_abstract_methods_say_so(session) -> None:
    class Nothing(ChannelPruning):
        name: ClassVar[str] = ""

    with pytest.raises(ed.ConfigurationError, match="Nothing is abstract"):
        Nothing().apply(session)


def test_training_methods_cut_at_the_end_and_fine_tune(session, monkeypatch) -> None:
    seen = []
    train = Session.train
    monkeypatch.setattr(
        Session,
        "train",
        lambda self, *a, **k: (seen.append((self.model.stem.out_channels, k)), train(self, *a, **k))[1],
    )
    AtTheEnd(epochs=1, retrain_epochs=2, pruning_ratio=0.25).apply(session)
    assert [width for width, _ in seen] == [8, 6]
    assert seen[1][1] == {"epochs": 2, "learning_rate": pytest.approx(0.005)}
    assert session.model.stem.out_channels == 6
    assert len(session.history) == 3


def test_no_fine_tuning_no_run(session) -> None:
    fine_tune(session, 0, None)
    assert session.runs == 0


def test_silence_is_what_surgery_compares_with(session) -> None:
    graph, _groups = First().groups(session)
    group, units = graph.group("stem"), torch.tensor([1, 5])
    silenced = copy.deepcopy(session.model).eval()
    silence(silenced, group, units)
    x = torch.randn(3, 1, 6, 6)
    expected = zero_contributions(session.model, {"stem": units}, graph).eval()(x)
    assert torch.equal(silenced(x), expected)
    assert torch.allclose(remove(silenced, x, {"stem": units}).eval()(x), expected, atol=1e-6)


def test_channels_that_are_switched_off_are_zero(session) -> None:
    graph, _ = First().groups(session)
    model = session.model.eval()
    model.bn.running_mean.normal_()
    switch_off(model, graph.group("stem"), torch.tensor([2, 3]))
    outputs = {}
    for name in ("bn", "conv", "depthwise"):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o}))
    model(torch.randn(2, 1, 6, 6))
    for name, value in outputs.items():
        assert not value[:, 2:4].any(), name
        assert value[:, [0, 1, 4, 5, 6, 7]].any(), name


def test_a_sweep_sees_what_went_before(session) -> None:
    graph, groups = First().groups(session)
    plan = {"stem": 5, "point": 6}
    seen = []

    def choose(group, keep):
        read = session.model.point.weight.detach().abs().sum((0, 2, 3))
        seen.append((group.name, keep, int((read == 0).sum())))
        return torch.tensor([0, 1, 2])[: group.size - keep]

    selection = sweep(session, groups, plan, choose)
    assert seen == [("stem", 5, 0)], "groups that stay whole are not asked for"
    assert selection["stem"].tolist() == [0, 1, 2]
    x = torch.randn(3, 1, 6, 6)
    expected = session.model.eval()(x)
    assert torch.allclose(remove(session.model, x, selection, graph).eval()(x), expected, atol=1e-6)
    plan["point"] = 4
    sweep(session, groups, plan, choose)
    assert seen[-1] == ("point", 4, 3)
