"""Nonredundant feature clustering: representatives, what merging leaves unchanged, widths, sparse autoencoders."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.data.named import _reconstruction
from efficientdnns.data.source import Source
from efficientdnns.data.split import TensorSplit
from efficientdnns.pruning.nonredundant_feature_clustering import representatives
from efficientdnns.pruning.sparse_fit import SparseFit, bernoulli_divergence, negative_squares
from efficientdnns.session import Session


def autoencoder(hidden: int = 12) -> nn.Module:
    return ed.models.build("mlp", num_classes=784, hidden=[hidden], activation="sigmoid", output="sigmoid")


@pytest.fixture(scope="module")
def pixels() -> ed.Task:
    return ed.Task.from_name("digits", reconstruct=True, limit=200, evaluation_limit=50)


def prune(model: nn.Module, task: ed.Task, budget: str = "", **fields) -> Session:
    session = Session(copy.deepcopy(model), task, model, ed.Budget.parse(budget), label="clusters")
    ed.NonredundantFeatureClustering(**fields).apply(session)
    return session


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_task_reconstructs_its_inputs(pixels) -> None:
    batch = next(iter(pixels.train.batches(8)))
    assert torch.equal(batch.targets, batch.inputs.flatten(1))
    assert 0 <= batch.inputs.min() <= batch.inputs.max() <= 1
    assert pixels.kind == "regression"
    with pytest.raises(ed.ConfigurationError, match="reconstruct is for images of numbers"):
        _reconstruction(Source("bytes", TensorSplit(torch.arange(4).byte()), TensorSplit(torch.arange(2).byte())))


def test_equal_units_are_merged_without_a_change(pixels) -> None:
    model = autoencoder()
    encoder = model.layers[1]
    with torch.no_grad():
        encoder.weight[7], encoder.bias[7] = encoder.weight[2], encoder.bias[2]
        encoder.weight[9], encoder.bias[9] = encoder.weight[2], encoder.bias[2]
        encoder.weight[4] = -encoder.weight[3]
    result = prune(model, pixels, tau=0.95)
    assert result.findings["clusters"]["widths"]["layers.1"] == [12, 10]
    x = next(iter(pixels.evaluation.batches(20))).inputs
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-6)


def test_scaled_compensation_is_exact_for_relu() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 3 * model[0].weight[1], 3 * model[0].bias[1]
    x = torch.randn(40, 6)
    task = ed.Task.from_tensors((x, torch.arange(40) % 3), (x, torch.arange(40) % 3))
    result = prune(model, task, tau=0.9, bias=True, compensate="scaled")
    assert result.model[0].out_features == 4
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-6)


def test_representatives() -> None:
    cosines = torch.tensor([[1.0, 0.9, 0.8, 0.0], [0.9, 1.0, 0.95, 0.0], [0.8, 0.95, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    labels = torch.tensor([0, 0, 0, 1])
    assert representatives(labels, cosines).tolist() == [1, 3]
    assert representatives(labels, cosines, "last").tolist() == [2, 3]
    drawn = {int(representatives(labels, cosines, "random", torch.Generator().manual_seed(i))[0]) for i in range(20)}
    assert drawn == {0, 1, 2}


def test_tau_decides_the_width_unless_a_ratio_does(pixels) -> None:
    model = autoencoder(30)
    one = prune(model, pixels, tau=-1).findings["clusters"]
    assert one["widths"]["layers.1"] == [30, 1]
    assert one["distinct"]["layers.1"]["0.9"] == 30
    assert prune(model, pixels, pruning_ratio=0.5).model.layers[1].out_features == 15


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_meets_a_budget(scope, pixels) -> None:
    model = autoencoder(40)
    small = prune(model, pixels, "params=0.5", scope=scope).model
    assert 0.45 * count(model) < count(small) <= 0.5 * count(model)


def test_penalties() -> None:
    w = torch.tensor([-2.0, -0.5, 0.0, 1.0], requires_grad=True)
    negative_squares(w).backward()
    assert w.grad.tolist() == [-4.0, -1.0, 0.0, 0.0]
    assert float(bernoulli_divergence(0.05, torch.full((7,), 0.05))) == pytest.approx(0.0, abs=1e-6)
    assert float(bernoulli_divergence(0.05, torch.tensor([0.0, 1.0]))) > 1


def test_sparse_fit_lowers_the_activity(pixels) -> None:
    x = next(iter(pixels.evaluation.batches(50))).inputs

    def activity(beta: float) -> float:
        model = autoencoder(20)
        steps = [
            ed.registered()["sparse-fit"](epochs=8, beta=beta, learning_rate=0.01, optimizer="adam", batch_size=20)
        ]
        result = ed.compress(model, pixels, steps, quiet=True, latency=False)
        layers = result.model.layers
        return float(layers[2](layers[1](layers[0](x))).detach().mean())

    assert activity(3.0) < 0.6 * activity(0.0)


def test_sparse_fit_needs_a_regression(digits) -> None:
    with pytest.raises(ed.ConfigurationError, match="needs a task of kind regression"):
        SparseFit().check(Session(autoencoder(), digits, autoencoder()))
