"""Gates on channels: zero is removal, folding is exact, straight-through gradients reach what is hidden."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.channel_gates import ChannelGates, fold_gates, gateable
from efficientdnns.surgery import ChannelGraph, zero_contributions


class Depthwise(nn.Module):
    """A pointwise, a depthwise and a pointwise convolution, whose maps are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn = nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6)
        self.depthwise, self.project = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 5, 1)
        self.fc = nn.Linear(5 * 36, 3)

    def forward(self, x):
        return self.fc(self.project(self.depthwise(self.bn(self.expand(x)).relu()).relu()).relu().flatten(1))


class Upsampling(nn.Module):
    """Two branches side by side in front of a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.up = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(7, 5, 2, stride=2)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        both = torch.cat([self.a(x).relu(), self.b(x).relu()], 1)
        return self.fc(self.up(both).relu().mean((2, 3)))


class Attention(nn.Module):
    """One pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.fc = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x.squeeze(1))
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.fc((x + self.down(self.up(x).relu())).mean(1))


NETWORKS = {
    "residual": lambda: ed.models.build("small-resnet", width=0.5),
    "depthwise": Depthwise,
    "upsampling": Upsampling,
    "attention": Attention,
}


@pytest.fixture(scope="module", params=NETWORKS)
def traced(request):
    torch.manual_seed(0)
    model = NETWORKS[request.param]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.normal_()
            module.running_mean.normal_()
    x = torch.randn(3, 1, 6, 6)
    graph = ChannelGraph.trace(model, x[:1])
    return model, graph, x


def test_a_gate_of_zero_is_a_channel_that_nothing_reads(traced) -> None:
    model, graph, x = traced
    groups = gateable(model, graph.groups)
    assert groups
    before = model(x)
    gone = {group.name: torch.arange(0, group.size, 2) for group in groups}
    gates = {group.name: torch.ones(group.size).index_fill(0, gone[group.name], 0.0) for group in groups}
    with torch.no_grad():
        scaler = ChannelGates(model, groups, gates).attach()
        got = model(x)
        scaler.detach()
    assert torch.allclose(got, zero_contributions(model, gone, graph)(x), atol=1e-5)
    assert not torch.allclose(got, before, atol=1e-3)
    assert torch.equal(model(x), before)


def test_folding_changes_nothing(traced) -> None:
    model, graph, x = traced
    model = copy.deepcopy(model)
    groups = gateable(model, graph.groups)
    gates = {group.name: torch.rand(group.size) * 2 - 0.5 for group in groups}
    with torch.no_grad():
        scaler = ChannelGates(model, groups, gates).attach()
        expected = model(x)
        scaler.detach()
        fold_gates(model, graph, groups, gates)
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_trained_gates_get_gradients(traced) -> None:
    model, graph, x = traced
    groups = gateable(model, graph.groups)
    gates = {group.name: torch.ones(group.size, requires_grad=True) for group in groups}
    scaler = ChannelGates(model, groups, gates).attach()
    model(x).square().sum().backward()
    scaler.detach()
    model.zero_grad()
    assert all(gate.grad is not None and gate.grad.shape == gate.shape for gate in gates.values())
    assert all(gate.grad.abs().sum() > 0 for gate in gates.values())


def test_straight_through_gradients_are_those_of_an_open_gate_at_the_masked_point() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    graph = ChannelGraph.trace(model, torch.randn(1, 4))
    x, gate = torch.randn(16, 4), torch.tensor([1.0, 0.0, 1.0])
    gates = ChannelGates(model, graph.groups, {"0": gate}, straight_through=True).attach()
    outputs = model(x)
    outputs.square().sum().backward()
    gates.detach()
    # By hand: the error at the outputs of the masked network flows back as if nothing had been masked.
    hidden = torch.relu(model[0](x)).detach()
    error = 2 * ((hidden * gate) @ model[2].weight.T + model[2].bias).detach()
    back = (error @ model[2].weight.detach()) * (hidden > 0)
    assert torch.allclose(model[0].weight.grad, back.T @ x, atol=1e-4)
    assert model[0].weight.grad[1].abs().sum() > 0, "the hidden channel is trained on"
    assert torch.allclose(model[2].weight.grad[:, 1], torch.zeros(2))


def test_groups_that_gates_cannot_reach_are_named_by_leaving_them_out() -> None:
    model = ed.models.build("char-lstm", vocabulary=7, hidden=6)
    graph = ChannelGraph.trace(model, torch.zeros(1, 4, dtype=torch.long))
    left = {group.name for group in gateable(model, graph.groups)}
    assert "embedding" not in left, "an LSTM reads it"
    attention = Attention()
    graph = ChannelGraph.trace(attention, torch.randn(1, 1, 6, 6))
    names = {group.name for group in gateable(attention, graph.groups)}
    assert "up" in names
    assert not any(name.startswith("attention") for name in names)
