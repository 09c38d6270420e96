"""DivNet: what fusing leaves unchanged, least squares, where activations are read, whole networks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.channel_activations import reader_inputs
from efficientdnns.parts.channel_merging import merge_outgoing
from efficientdnns.pruning.divnet import add_constants, fusing_coefficients, takes_constants
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph


def mlp(hidden: int = 24) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, hidden), nn.Sigmoid(), nn.Linear(hidden, 4))


def task(inputs: int = 6) -> ed.Task:
    x, y = torch.randn(200, inputs), torch.arange(200) % 4
    return ed.Task.from_tensors((x[:100], y[:100]), (x[100:120], y[100:120]), (x[120:], y[120:]))


def session(model: nn.Module, data: ed.Task, budget: str = "") -> Session:
    return Session(copy.deepcopy(model), data, model, ed.Budget.parse(budget), label="divnet")


def prune(model: nn.Module, data: ed.Task, budget: str = "", **fields) -> Session:
    work = session(model, data, budget)
    ed.DivNet(**fields).check(work)
    ed.DivNet(**fields).apply(work)
    return work


def test_fusing_is_least_squares() -> None:
    values = torch.rand(80, 12)
    gone, kept = torch.tensor([1, 4, 5]), torch.tensor([0, 2, 3, 6, 7, 8, 9, 10, 11])
    alpha, constant = fusing_coefficients(values, gone, kept)
    expected = np.linalg.lstsq(values[:, kept].double().numpy(), values[:, gone].double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(alpha.numpy(), expected, rtol=1e-7, atol=1e-9)
    assert not constant.any()
    with_one = torch.cat([values[:, kept], torch.ones(80, 1)], 1).double().numpy()
    expected = np.linalg.lstsq(with_one, values[:, gone].double().numpy(), rcond=None)[0].T
    alpha, constant = fusing_coefficients(values, gone, kept, intercept=True)
    np.testing.assert_allclose(torch.cat([alpha, constant[:, None]], 1).numpy(), expected, rtol=1e-6, atol=1e-8)


def test_activations_are_those_that_the_readers_see() -> None:
    model, data = mlp(), task()
    graph = ChannelGraph.trace(model, data.example_input)
    values = reader_inputs(session(model, data), model, graph.group("0"), 50)
    x = data.calibration.inputs[:50]
    torch.testing.assert_close(values, torch.sigmoid(model[0](x)))


def test_flattened_maps_give_a_row_for_each_place(digits) -> None:
    model = ed.models.build("lenet5").eval()
    graph = ChannelGraph.trace(model, digits.example_input)
    group = graph.group("conv2")
    values = reader_inputs(session(model, digits), model, group, 3, positions=16)
    x = digits.calibration.inputs[:3]
    maps = model.pool2(model.relu2(model.conv2(model.pool1(model.relu1(model.conv1(x))))))
    torch.testing.assert_close(values, maps.flatten(2).transpose(1, 2).reshape(-1, 50))
    assert reader_inputs(session(model, digits), model, group, 3, positions=4).shape == (12, 50)


def test_combinations_of_the_kept_leave_the_next_layer_unchanged() -> None:
    model, data = mlp(8).double(), task()
    graph = ChannelGraph.trace(model, data.example_input.double())
    values = torch.rand(60, 8, dtype=torch.float64)
    values[:, 7] = 2 * values[:, 0] - 0.5 * values[:, 3]
    values[:, 6] = values[:, 1]
    gone, kept = torch.tensor([6, 7]), torch.arange(6)
    before = values @ model[2].weight.T
    merge_outgoing(model, graph.group("0"), gone, kept, fusing_coefficients(values, gone, kept)[0])
    torch.testing.assert_close(values[:, :6] @ model[2].weight[:, :6].T, before, rtol=1e-6, atol=1e-9)


def test_constants_go_into_the_bias() -> None:
    model, data = mlp(8).double(), task()
    graph = ChannelGraph.trace(model, data.example_input.double())
    group = graph.group("0")
    values = torch.rand(60, 8, dtype=torch.float64)
    values[:, 7] = 1.0
    gone, kept = torch.tensor([7]), torch.arange(7)
    before = values @ model[2].weight.T + model[2].bias
    alpha, constants = fusing_coefficients(values, gone, kept, intercept=True)
    assert takes_constants(model, graph, group)
    add_constants(model, graph, group, gone, constants)
    merge_outgoing(model, group, gone, kept, alpha)
    torch.testing.assert_close(values[:, :7] @ model[2].weight[:, :7].T + model[2].bias, before)


def error_of(model: nn.Module, small: nn.Module, x: torch.Tensor) -> float:
    return float((model(x) - small(x)).square().mean())


@pytest.mark.parametrize("selection", ["dpp", "random", "importance"])
def test_fusing_never_makes_the_next_layer_worse(selection) -> None:
    model, data = mlp(), task()
    x = data.calibration.inputs
    fields = {"pruning_ratio": 0.75, "selection": selection}
    fused, plain, constant = (
        prune(model, data, **fields, **more).model for more in ({}, {"fuse": False}, {"intercept": True})
    )
    assert fused[0].out_features == plain[0].out_features == 6
    assert torch.equal(fused[0].weight, plain[0].weight)
    with torch.no_grad():
        assert error_of(model, constant, x) <= error_of(model, fused, x) * (1 + 1e-4)
        assert error_of(model, fused, x) < 0.5 * error_of(model, plain, x)


def test_the_process_chooses_the_width() -> None:
    model, data = mlp(), task()
    found = prune(model, data).findings["divnet"]
    assert abs(found["widths"]["0"][1] - found["kernels"]["0"]["expected_size"]) < 10
    assert 0 < found["kernels"]["0"]["mean_similarity"] < 1


def test_meets_a_budget() -> None:
    model = mlp(60)
    small = prune(model, task(), "params=0.5", scope="global").model
    assert 0.4 * count(model) < count(small) <= 0.5 * count(model)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_needs_calibration_inputs() -> None:
    with pytest.raises(ed.DataError, match="divnet needs calibration inputs"):
        prune(mlp(), task().with_(calibration=None))
