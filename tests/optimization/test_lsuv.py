import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from efficientdnns.errors import ModelError
from efficientdnns.models import build
from efficientdnns.optimization.lsuv import LSUV, lsuv_init_, orthonormal_, orthonormal_init_
from efficientdnns.session import Session
from efficientdnns.task import Task


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.sampled_from([1, 3]))
def test_weights_are_orthonormal(outputs, inputs, kernel):
    matrix = orthonormal_(torch.empty(outputs, inputs, kernel, kernel)).flatten(1).double()
    gram = matrix @ matrix.T if outputs <= matrix.shape[1] else matrix.T @ matrix
    assert float((gram - torch.eye(len(gram))).abs().max()) < 1e-5


def maxout():
    return build("fitnet-mnist")


def variances(model, batch):
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, float(out.var(correction=0))))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model.eval()(batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("make", [maxout, lambda: build("mlp", depth=12, width=32, activation="tanh")])
def test_every_output_has_unit_variance_on_the_batch_and_nearly_on_another(make):
    torch.manual_seed(0)
    model = make()
    batch, fresh = torch.randn(2, 128, 1, 28, 28)
    report = lsuv_init_(model, batch, tolerance=0.05)
    assert all(abs(v - 1) <= 0.05 for v in variances(model, batch).values())
    assert all(abs(v - 1) <= 0.3 for v in variances(model, fresh).values())
    assert all(layer.converged and layer.trials <= 2 for layer in report)
    assert all(not module.bias.any() for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))


def test_only_one_positive_scalar_a_layer_separates_it_from_the_orthonormal_start():
    model, batch = build("mlp", depth=3, width=24), 3 * torch.randn(64, 784)
    torch.manual_seed(3)
    start = orthonormal_init_(copy.deepcopy(model))
    torch.manual_seed(3)
    lsuv_init_(model, batch)
    for before, after in zip(start.parameters(), model.parameters()):
        if before.dim() == 2:
            ratio = after / before
            assert bool((ratio > 0).all())
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)


def test_a_second_call_changes_nothing():
    model, batch = build("mlp", depth=3, width=24), torch.randn(64, 784)
    lsuv_init_(model, batch)
    before = copy.deepcopy(model.state_dict())
    report = lsuv_init_(model, batch, orthonormal=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {layer.trials for layer in report} == {0}


class Backwards(nn.Module):
    """Registered last to first, with a shared layer, a branch, dropout, batch norm and in-place activations."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4)
        self.unused = nn.Linear(16, 16)
        self.shared = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.stem = nn.Linear(8, 16)

    def forward(self, x):
        x = F.leaky_relu_(self.drop(self.norm(self.stem(x))), 0.3)
        x = x + F.relu_(self.shared(x))
        return self.head(self.shared(x))


def test_layers_are_treated_in_execution_order_and_nothing_else_changes():
    torch.manual_seed(0)
    model = Backwards()
    model.norm.eval()
    batch = torch.randn(256, 8) * 5
    kept = {name: value.clone() for name, value in model.state_dict().items() if "norm" in name}
    lsuv_random = torch.get_rng_state()
    report = lsuv_init_(model, batch, orthonormal=False, tolerance=0.02)
    assert [layer.name for layer in report] == ["stem", "shared", "head"]
    assert all(layer.converged for layer in report)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.items())
    assert model.training
    assert not model.norm.training
    assert torch.equal(lsuv_random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_scaling_the_input_scales_only_the_first_layer():
    torch.manual_seed(0)
    first = orthonormal_init_(build("mlp", depth=4, width=32, activation="leaky-relu"))
    second, batch = copy.deepcopy(first), torch.randn(64, 784)
    lsuv_init_(first, batch, orthonormal=False, tolerance=1e-6)
    lsuv_init_(second, 10 * batch, orthonormal=False, tolerance=1e-6)
    pairs = [(a, b) for a, b in zip(first.parameters(), second.parameters()) if a.dim() == 2]
    torch.testing.assert_close(pairs[0][0], 10 * pairs[0][1], rtol=1e-4, atol=1e-7)
    for a, b in pairs[1:]:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_dead_layer_is_reported_and_does_not_loop():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    report = lsuv_init_(model, torch.zeros(8, 4))
    assert [(layer.trials, layer.converged) for layer in report] == [(0, False)] * 2
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_network_without_layers_is_refused():
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        lsuv_init_(nn.Sequential(nn.ReLU()), torch.zeros(2, 2))


def test_a_deep_network_learns_only_with_unit_variance():
    """Thirty hidden layers: the signal of an orthonormal ReLU network dies, LSUV's does not."""
    torch.manual_seed(0)
    task = Task.from_name("digits")
    model = build("mlp", depth=30, width=32)
    session = Session(model=orthonormal_init_(copy.deepcopy(model)), task=task, original=model, label="lsuv")
    inputs = task.calibration.take(range(64)).inputs
    dead = float(session.model(inputs).var().detach())
    LSUV().apply(session)
    assert dead < 1e-6
    assert float(session.model(inputs).var().detach()) > 0.5
    assert len(session.findings["lsuv"]["layers"]) == 31
