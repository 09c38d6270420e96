"""DepGraph: what a group holds, how important its channels are, the decay, and the cut."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.measurement.macs import count_macs
from efficientdnns.parts.criteria import group_importance
from efficientdnns.pruning.depgraph import GroupSparsity, decay_factors, importances, regularised
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, remove, zero_contributions


def parts(group) -> set[tuple[str, str]]:
    """(module, what of it) of everything in a group, without statistics."""
    return {(m.module, m.role) for m in group.members if "running" not in m.attribute}


class Residual(nn.Module):
    """y = BN2(conv2(x)) + BNs(convs(x)), read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.bn2 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.convs, self.bns = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc((self.bn2(self.conv2(x)) + self.bns(self.convs(x))).relu().mean((2, 3)))


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4)
    )


def session_of(model: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> Session:
    torch.manual_seed(0)
    x, y = torch.randn(48, *shape), torch.randint(4, (48,))
    task = ed.Task.from_tensors((x, y), (x[:16], y[:16]), (x[:16], y[:16]), num_classes=4)
    settings = ed.training.TrainingSettings(batch_size=16, learning_rate=0.05)
    return Session(model=model, task=task, original=copy.deepcopy(model), settings=settings)


def test_a_chain_ends_at_the_next_layer() -> None:
    graph = ChannelGraph.trace(chain(), torch.zeros(1, 3, 8, 8))
    assert parts(graph.group("0")) == {("0", "out"), ("0", "vector"), ("1", "vector"), ("3", "in")}
    small = remove(chain(), torch.zeros(1, 3, 8, 8), {"0": [2, 6]})
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels, small[3].out_channels) == (6, 6, 6, 5)


def test_flattened_maps_go_with_their_channel() -> None:
    graph = ChannelGraph.trace(chain(), torch.zeros(1, 3, 8, 8))
    (reader,) = (m for m in graph.group("3").members if m.role == "in")
    assert reader.index.tolist() == [list(range(16 * i, 16 * i + 16)) for i in range(5)]


def test_summed_layers_are_one_group_from_either_side() -> None:
    graph = ChannelGraph.trace(Residual(), torch.zeros(1, 3, 6, 6))
    (group,) = graph.groups
    assert graph.groups_of("conv2") == graph.groups_of("convs") == [group]
    assert {m for m, _ in parts(group)} == {"conv2", "bn2", "convs", "bns", "fc"}
    assert all(torch.equal(m.index[:, 0], group.members[0].index[:, 0]) for m in group.members)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_groups_of_a_cifar_resnet(shortcut) -> None:
    model = ed.models.build("cifar-resnet20", shortcut=shortcut)
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 16, 16), verify=False)
    inner = {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)}
    groups = {group.name: group for group in graph.groups}
    assert inner <= groups.keys()
    for name in inner:
        assert graph.producers(groups[name]) == [name]
        assert graph.consumers(groups[name]) == [name.replace("conv1", "conv2")]
    first = {"conv1", *(f"layer1.{block}.conv2" for block in range(3))}
    assert set(graph.producers(groups["conv1"])) >= first
    if shortcut == "B":
        assert set(graph.producers(groups["conv1"])) == first
        assert "layer2.0.shortcut.0" in graph.consumers(groups["conv1"])
        second = {"layer2.0.shortcut.0", *(f"layer2.{block}.conv2" for block in range(3))}
        (stream,) = graph.groups_of("layer2.0.shortcut.0")
        assert set(graph.producers(stream)) == second
    else:  # without a projection the streams of the stages are one, with an offset
        stage2 = {name for group in graph.groups_of("layer2.0.conv2") for name in graph.producers(group)}
        assert "conv1" in stage2


def test_importance_is_all_squares_that_belong_to_a_channel() -> None:
    torch.manual_seed(0)
    model = chain()
    model[1].weight.data.normal_()
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8))
    values = {name: p.detach() for name, p in model.named_parameters()}
    expected = (
        values["0.weight"].square().sum((1, 2, 3))
        + values["1.weight"].square()
        + values["3.weight"].square().sum((0, 2, 3))
    )
    assert torch.allclose(group_importance(graph.group("0"), values), expected)
    assert torch.allclose(group_importance(graph.group("0"), values, "mean"), expected / 3)


def test_decay_factors() -> None:
    factors = decay_factors(torch.tensor([1.0, 3.0, 5.0]), 4.0)
    assert factors.tolist() == [16.0, 4.0, 1.0]
    assert decay_factors(torch.full((4,), 7.0)).tolist() == [1, 1, 1, 1], "no division by zero"
    assert decay_factors(torch.rand(9), 0.0).tolist() == [1.0] * 9


class Steps:
    """What a callback sees of a trainer."""

    def __init__(self, model) -> None:
        self.model, self.step, self.total_steps, self.epochs = model, 0, 1, 1


@pytest.mark.parametrize("build", [chain, Residual], ids=["chain", "residual"])
def test_the_gradient_is_that_of_the_regulariser(build) -> None:
    torch.manual_seed(0)
    session = session_of(build())
    callback = GroupSparsity(ed.DepGraph(reg=0.3), session)
    trainer = Steps(session.model)
    callback.setup(trainer)
    parameters = dict(session.model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    callback.after_backward(trainer)
    loss = torch.zeros(())
    for group in callback.groups:
        values = {name: p.detach() for name, p in parameters.items()}
        gamma = decay_factors(group_importance(group, values, "mean").sqrt())
        squares = {m.tensor: parameters[m.tensor].square() for m in regularised(group) if m.tensor in parameters}
        loss = loss + 0.3 / 2 * (gamma * group.reduce(squares, ("out", "in", "vector"))).sum()
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for (name, parameter), gradient in zip(parameters.items(), expected):
        assert torch.allclose(parameter.grad, torch.zeros_like(parameter) if gradient is None else gradient), name
    assert not session.model.fc.bias.grad.any() if build is Residual else not session.model[0].bias.grad.any()


def test_decay_factors_are_measured_anew_every_few_steps() -> None:
    session = session_of(chain())
    callback = GroupSparsity(ed.DepGraph(every=3), session)
    trainer = Steps(session.model)
    callback.setup(trainer)
    seen = []
    for trainer.step in range(7):
        callback.after_backward(trainer)
        seen.append(callback.decays)
        with torch.no_grad():
            session.model[0].weight[0] *= 0.5
    assert [a is b for a, b in itertools.pairwise(seen)] == [True, True, False, True, True, False]


def test_sparse_training_pushes_the_unimportant_down_together() -> None:
    session = session_of(Residual())
    before = importances(session.model, ChannelGraph.trace(session.model, session.example_input).groups, {})["conv2"]
    weakest, strongest = int(before.argmin()), int(before.argmax())

    def ratio(model: nn.Module, module: str) -> float:
        norms = model.get_submodule(module).weight.detach().view(6, -1).norm(dim=1)
        return float(norms[weakest] / norms[strongest])

    callback = GroupSparsity(ed.DepGraph(reg=0.02), session)
    callback.finish = lambda trainer: None
    session.train([callback], epochs=10, weight_decay=0.0)
    for module in ("conv2", "convs", "bn2", "bns"):
        assert ratio(session.model, module) < 0.9 * ratio(session.original, module), module


def test_what_is_gone_no_longer_counts() -> None:
    torch.manual_seed(0)
    session = session_of(chain())
    graph = ChannelGraph.trace(session.model, session.example_input)
    gone = {"3": torch.tensor([1, 4]), "0": torch.tensor([3])}
    scores = importances(session.model, graph.groups, gone, "none")
    small = remove(session.model, session.example_input, gone, graph)
    after = importances(small, ChannelGraph.trace(small, session.example_input).groups, {}, "none")
    for name, units in gone.items():
        assert (scores[name][units] < 0).all()
        stay = [i for i in range(len(scores[name])) if i not in units.tolist()]
        assert torch.allclose(scores[name][stay], after[name])


@pytest.mark.parametrize("steps", [1, 3])
def test_the_cut_computes_what_the_masked_network_does(steps) -> None:
    torch.manual_seed(0)
    session = session_of(Residual())
    dense = copy.deepcopy(session.model)
    graph = ChannelGraph.trace(dense, session.example_input)
    importance = importances(dense, graph.groups, {})["conv2"]
    ed.DepGraph(epochs=0, pruning_ratio=0.5, iterative_steps=steps).apply(session)
    weakest = importance.argsort()[:3]
    x = torch.randn(5, 3, 6, 6)
    expected = zero_contributions(dense, {"conv2": weakest}, graph).eval()(x)
    assert torch.allclose(session.model.eval()(x), expected, atol=1e-5)
    session.model(x).sum().backward()


def test_the_normaliser_decides_what_groups_are_worth_globally() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 4))
    with torch.no_grad():
        model[2].weight *= 5
    plans = {}
    for normalize in ("none", "mean", "max"):
        method = ed.DepGraph(epochs=0, scope="global", normalize=normalize, pruning_ratio=0.4)
        session = session_of(copy.deepcopy(model), (6,))
        graph, groups = method.groups(session)
        plans[normalize] = method.plan(session, graph, groups, importances(model, groups, {}, normalize))
        assert sum(plans[normalize].values()) == 12
        assert min(plans[normalize].values()) >= 1
    assert len({tuple(plan.values()) for plan in plans.values()}) > 1


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_macs_end_within_one_step_of_the_target(scope) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 4)
    )
    method = ed.DepGraph(epochs=0, scope=scope)
    result = ed.compress(model, session_of(model).task, method, budget="macs=0.5", quiet=True, latency=False)
    example = torch.zeros(1, 3, 8, 8)
    before, after = count_macs(model, example).total, count_macs(result.model, example).total
    channel = before / 20
    assert 0.5 * before - channel < after <= 0.5 * before
    rounded = ed.compress(
        model, session_of(model).task, ed.DepGraph(epochs=0, scope=scope, round_to=8, pruning_ratio=0.4),
        quiet=True, latency=False,
    )  # fmt: skip
    assert rounded.model[0].out_channels % 8 == rounded.model[2].out_channels % 8 == 0


def test_parameters_meet_a_budget_after_sparse_training() -> None:
    session = session_of(chain())
    method = ed.DepGraph(epochs=1, learning_rate=0.01)
    result = ed.compress(session.model, session.task, method, budget="params=0.5", quiet=True, latency=False)
    assert all(line.met for line in result.budget)


def test_weight_decay_is_off_unless_asked_for() -> None:
    assert ed.DepGraph().settings()["weight_decay"] == 0
    assert ed.DepGraph(weight_decay=1e-4).settings()["weight_decay"] == 1e-4


def test_errors_are_typed() -> None:
    with pytest.raises(ed.ConfigurationError, match="normalize"):
        ed.DepGraph(normalize="median")
    with pytest.raises(ed.ConfigurationError, match="reg"):
        ed.DepGraph(reg=-1)
    with pytest.raises(ed.SurgeryError, match="no channels of Linear can be removed"):
        ed.DepGraph(epochs=0).apply(session_of(nn.Linear(6, 4), (6,)))
