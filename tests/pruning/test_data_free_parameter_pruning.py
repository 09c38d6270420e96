"""Data-free parameter pruning: saliencies, merges, what they leave unchanged, the cut-off, whole networks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.weight_sets import WeightSets, squared_distances, weight_sets
from efficientdnns.pruning.data_free_parameter_pruning import Merging, differences, mode_of_saliencies
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph


def sets(n: int = 30, d: int = 8) -> WeightSets:
    return WeightSets(torch.randn(n, d, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64), True)


class Net(nn.Module):
    def __init__(self, hidden: int = 6, activation=F.relu) -> None:
        super().__init__()
        self.a, self.b, self.activation = nn.Linear(5, hidden), nn.Linear(hidden, 3), activation

    def forward(self, x):
        return self.b(self.activation(self.a(x)))


def task(inputs: int = 5, classes: int = 3) -> ed.Task:
    x = torch.randn(60, inputs)
    return ed.Task.from_tensors((x, torch.arange(60) % classes), (x[:20], torch.arange(20) % classes))


def prune(model: nn.Module, budget: str = "", **fields) -> Session:
    method = ed.DataFreeParameterPruning(**fields)
    session = Session(copy.deepcopy(model), task(), model, ed.Budget.parse(budget), label="merging")
    method.check_network(session)
    method.apply(session)
    return session


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def with_copy(scale: float) -> Net:
    """Neuron 5 is neuron 1 times ``scale``, and reads out differently."""
    model = Net()
    with torch.no_grad():
        model.a.weight[5], model.a.bias[5] = scale * model.a.weight[1], scale * model.a.bias[1]
    return model


@pytest.mark.parametrize(("similarity", "scale"), [("euclidean", 1.0), ("normalized", 2.5), ("ratio", 0.3)])
def test_a_copy_is_merged_first_and_nothing_changes(similarity, scale) -> None:
    model = with_copy(scale)
    result = prune(model, pruning_ratio=1 / 6, similarity=similarity)
    assert {*result.findings["merging"]["first_pairs"]["a"][0]} == {1, 5}
    x = torch.randn(40, 5)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-6)
    assert (result.model.a.out_features, result.model.b.in_features) == (5, 5)
    assert count(model) - count(result.model) == 5 + 1 + 3


def test_the_saliency_is_not_symmetric_and_its_column_is_repaired() -> None:
    squares, alpha = differences(sets(), "euclidean")
    outgoing = torch.randn(30, 7, dtype=torch.float64)
    merging = Merging(squares, outgoing)
    assert not torch.allclose(merging.saliency.nan_to_num(posinf=0), merging.saliency.T.nan_to_num(posinf=0))
    assert (alpha == 1).all()
    rows = outgoing.clone()
    for _ in range(20):
        expected = rows.square().mean(1)[None, :] * squares
        alive = merging.alive
        got = merging.saliency
        off = alive[:, None] & alive[None, :] & ~torch.eye(30, dtype=torch.bool)
        torch.testing.assert_close(got[off], expected[off])
        assert got[~off].isinf().all()
        least = got.min()
        assert merging.least == pytest.approx(float(least), rel=1e-9)
        kept, gone = merging.merge()
        assert float(got[kept, gone]) == pytest.approx(float(least), rel=1e-9)
        rows[kept] += rows[gone]
        rows[gone] = 0
    torch.testing.assert_close(merging.outgoing[merging.alive].sum(0), outgoing.sum(0))


def test_coefficients_follow_chains_of_merges() -> None:
    merging = Merging(torch.rand(4, 4, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64))
    merging.pairs = [(1, 0), (3, 1)]
    merging.alive[[0, 1]] = False
    gone, kept, alpha = merging.coefficients(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert (gone.tolist(), kept.tolist()) == ([0, 1], [2, 3])
    assert alpha.tolist() == [[0.0, 0.25], [0.0, 0.5]]


def test_one_merge_stays_within_the_bound() -> None:
    model = Net(12).double()
    w = torch.cat([model.a.weight, model.a.bias[:, None]], 1)
    x = torch.randn(200, 5, dtype=torch.float64)
    squares = squared_distances(w)
    merging = Merging(squares, model.b.weight.T)
    before = model(x)
    column = model.b.weight.detach().clone()
    kept, gone = merging.merge()
    with torch.no_grad():
        model.b.weight[:, kept] += model.b.weight[:, gone]
        model.b.weight[:, gone] = 0
    change = (model(x) - before).square()
    norms = x.square().sum(1) + 1
    bound = column[:, gone].square()[None, :] * squares[kept, gone] * norms[:, None]
    assert (change <= bound + 1e-12).all()


def test_the_ratio_is_that_of_the_cosine() -> None:
    given = sets()
    squares, alpha = differences(given._replace(biases=torch.zeros_like(given.biases)), "ratio")
    cosine = F.cosine_similarity(given.weights[3], given.weights[8], dim=0)
    torch.testing.assert_close(squares[3, 8], (1 - cosine) / (1 + cosine))
    torch.testing.assert_close(alpha, given.weights.norm(dim=1))


def test_the_mode_says_how_many_and_one_always_stays() -> None:
    model = Net(40)
    widths = [prune(model).findings["merging"]["widths"]["a"] for _ in range(2)]
    assert widths[0] == widths[1]
    assert 0 < widths[0][1] < 40
    fewer = prune(model, cutoff_fraction=0.25).findings["merging"]["widths"]["a"]
    assert widths[0][1] < fewer[1] < 40
    assert mode_of_saliencies(torch.tensor([1.0, 1.1, 1.05, 5.0, torch.inf]), 4) == pytest.approx(1.0, abs=0.8)


def test_constant_neurons_go_into_the_bias() -> None:
    model = Net()
    with torch.no_grad():
        model.a.weight[2], model.a.bias[2] = 0.0, 1.5
        model.a.weight[4], model.a.bias[4] = 0.0, -1.0
    result = prune(model, pruning_ratio=0.0)
    x = torch.randn(20, 5)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-6)
    assert result.model.a.out_features == 4


def test_sigmoids_are_compared_as_they_are() -> None:
    model = Net(activation=torch.sigmoid)
    found = prune(model, pruning_ratio=0.5).findings["merging"]
    assert found["compared_as_they_are"] == ["a"]
    with pytest.raises(ed.ConfigurationError, match="write similarity: euclidean"):
        prune(model, pruning_ratio=0.5, similarity="normalized")


def test_batch_norm_is_folded_and_what_does_not_scale_is_seen(digits) -> None:
    model = ed.models.build("small-resnet", in_channels=1)
    graph = ChannelGraph.trace(model, digits.example_input)
    inner = graph.group("layer1.0.conv1")
    assert weight_sets(model, graph, inner).scalable
    assert weight_sets(model, graph, inner).weights.shape[0] == inner.size


def test_without_surgery_the_same_neurons_go() -> None:
    model = Net(20)
    left, right = (prune(model, pruning_ratio=0.5, surgery=s) for s in (True, False))
    assert torch.equal(left.model.a.weight, right.model.a.weight)
    assert not torch.equal(left.model.b.weight, right.model.b.weight)


def test_meets_a_budget() -> None:
    model = Net(40)
    small = prune(model, "params=0.5", scope="global").model
    assert 0.45 * count(model) < count(small) <= 0.5 * count(model)
