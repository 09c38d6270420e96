"""Criteria: every score is what its formula says, and gradients leave the model alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.criteria import channel_scores, group_importance, loss_gradients, unit_rows, weight_scores
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4)
    )
    model[1].weight.data.uniform_(-1.5, 1.5)
    return model, ChannelGraph.trace(model, torch.zeros(1, 3, 8, 8))


def test_weight_scores() -> None:
    weights = {"a": torch.tensor([[1.0, -2.0], [0.0, 3.0]])}
    gradients = {"a": torch.tensor([[-3.0, 0.5], [7.0, 0.0]])}
    assert weight_scores(weights)["a"].tolist() == [[1, 2], [0, 3]]
    assert weight_scores(weights, "taylor", gradients)["a"].tolist() == [[3, 1], [0, 0]]
    draws = [weight_scores(weights, "random", None, torch.Generator().manual_seed(seed))["a"] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with pytest.raises(ed.ConfigurationError, match="needs gradients of 'a'"):
        weight_scores(weights, "taylor")


def test_norms_count_the_weights_that_make_a_channel(network) -> None:
    model, graph = network
    for criterion, order in (("l1", 1), ("l2", 2)):
        scores = channel_scores(model, graph.groups, criterion)
        assert torch.allclose(scores["0"], model[0].weight.detach().flatten(1).norm(p=order, dim=1))
        assert torch.allclose(scores["3"], model[3].weight.detach().flatten(1).norm(p=order, dim=1))


def test_group_norm_counts_all_that_goes_with_a_channel(network) -> None:
    model, graph = network
    w0, gamma, w3, w6 = (model[i].weight.detach() for i in (0, 1, 3, 6))
    scores = channel_scores(model, graph.groups, "group-norm")
    assert torch.allclose(scores["0"], w0.square().sum((1, 2, 3)) + gamma.square() + w3.square().sum((0, 2, 3)))
    flat = w6.square().sum(0).view(5, 16).sum(1)
    assert torch.allclose(scores["3"], w3.square().sum((1, 2, 3)) + flat)


@pytest.mark.parametrize("normalize", ["none", "mean", "max", "top"])
def test_normalised_importance_keeps_the_order(network, normalize) -> None:
    model, graph = network
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    plain = group_importance(graph.group("0"), parameters, "mean")
    assert torch.allclose(plain * 3, group_importance(graph.group("0"), parameters))
    normal = group_importance(graph.group("0"), parameters, "mean", normalize)
    assert torch.equal(normal.argsort(), plain.argsort())
    unit = {"none": plain.max(), "mean": plain.mean(), "max": plain.max(), "top": plain.sort().values[3:].mean()}
    assert torch.allclose(normal * (1 if normalize == "none" else unit[normalize]), plain)


def test_biases_of_attention_do_not_count() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))

    model = Attention().eval()
    graph = ChannelGraph.trace(model, torch.randn(1, 4, 8))
    assert graph.groups
    before = channel_scores(model, graph.groups, "group-norm")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.add_(100.0)
    after = channel_scores(model, graph.groups, "group-norm")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_geometric_median_takes_what_is_most_like_the_others() -> None:
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 5.0]])
    graph = ChannelGraph.trace(model, torch.zeros(1, 2))
    scores = channel_scores(model, graph.groups, "geometric-median")["0"]
    assert scores[0] == 1 + 1 + 5
    assert scores.argmin() == 0  # the zero vector lies in the middle, though its norm is smallest too
    assert scores[1] == pytest.approx(1 + 2 + 26**0.5)


def test_batch_norm_scales_and_norms_where_there_are_none(network) -> None:
    model, graph = network
    scores = channel_scores(model, graph.groups, "batch-norm")
    assert torch.allclose(scores["0"], model[1].weight.detach().abs())
    assert torch.allclose(scores["3"], channel_scores(model, graph.groups, "l1")["3"])


def test_batch_norm_scales_of_a_residual_stream_are_averaged() -> None:
    model = ed.models.build("small-resnet", shortcut="B")
    graph = ChannelGraph.trace(model, torch.zeros(1, 1, 8, 8), verify=False)
    with torch.no_grad():
        model.bn1.weight.fill_(1.0)
        model.layer1[0].bn2.weight.fill_(4.0)
    assert torch.allclose(channel_scores(model, graph.groups, "batch-norm")["conv1"], torch.tensor(2.5))


def test_taylor_sums_magnitudes_of_products(network) -> None:
    model, graph = network
    torch.manual_seed(1)
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    scores = channel_scores(model, graph.groups, "taylor", gradients)
    assert torch.allclose(scores["0"], (gradients["0.weight"] * model[0].weight.detach()).abs().sum((1, 2, 3)))
    with pytest.raises(ed.ConfigurationError, match="needs gradients"):
        channel_scores(model, graph.groups, "taylor")


def test_chance_is_reproducible(network) -> None:
    model, graph = network
    a, b = (channel_scores(model, graph.groups, "random", None, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_unit_rows_stand_side_by_side(network) -> None:
    model, graph = network
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    assert torch.equal(unit_rows(graph.group("0"), parameters), model[0].weight.detach().flatten(1))
    readers = unit_rows(graph.group("3"), parameters, ("in",))
    assert torch.equal(readers[1].sort().values, model[6].weight.detach()[:, 16:32].flatten().sort().values)
    assert unit_rows(graph.group("0"), {}).shape == (6, 0)


def test_gradients_are_the_mean_over_samples_and_leave_the_model_alone() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(24, 5), torch.randint(3, (24,))
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).train()
    session = Session(model=model, task=ed.Task.from_tensors((x, y), (x, y)), original=copy.deepcopy(model))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    # All samples that training has: the order does not matter.
    train = next(iter(session.task.train.batches(1000)))
    inputs, targets = train.inputs, train.targets
    gradients = loss_gradients(session, model, len(targets), batch_size=7)
    expected = torch.autograd.grad(session.task.loss(model(inputs), targets), list(model.parameters()))
    for value, name in zip(expected, gradients, strict=True):
        assert torch.allclose(gradients[name], value, atol=1e-6)
    assert (model[0].weight.grad == 1).all()
    assert model.training
    larger = loss_gradients(session, model, len(targets), absolute=True, batch_size=7)
    assert all((larger[name] >= gradients[name].abs() - 1e-6).all() for name in gradients)


def test_gradients_need_labels() -> None:
    x = torch.randn(8, 5)
    session = Session(model=nn.Linear(5, 2), task=ed.Task.from_tensors(x), original=nn.Linear(5, 2), label="x")
    with pytest.raises(ed.DataError, match="gradients need labelled training data"):
        loss_gradients(session, session.model, 8)
