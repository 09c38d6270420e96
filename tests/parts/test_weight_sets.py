"""Weight-sets: they decide the channel, scaling them scales it where that is said, and their distances."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from efficientdnns.parts.weight_sets import squared_distances, weight_sets
from efficientdnns.surgery import ChannelGraph


class Net(nn.Module):
    """A convolution with batch norm, ``between``, a convolution that reads it."""

    def __init__(self, between=F.relu) -> None:
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)
        self.between = between
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.normal_(self.norm.bias)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        return self.read(self.between(self.norm(self.conv(x))))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.each, self.read = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        return self.read(self.each(self.conv(x).relu()))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.norm = nn.Linear(4, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.read = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.read(x + self.block(x).relu())


X = (1, 2, 7, 7)


def sets_of(model: nn.Module, name: str, shape=X):
    graph = ChannelGraph.trace(model.eval(), torch.randn(shape))
    return weight_sets(model, graph, graph.group(name))


def test_batch_norm_is_folded_in() -> None:
    model = Net().eval()
    found = sets_of(model, "conv")
    assert found.weights.shape == (6, 18)
    assert found.biases.shape == (6, 1)
    assert found.weights.dtype == found.biases.dtype == torch.float64
    x = torch.randn(X)
    got = F.conv2d(x.double(), found.weights.view(6, 2, 3, 3), found.biases[:, 0])
    torch.testing.assert_close(got.float(), model.norm(model.conv(x)))


@pytest.mark.parametrize(
    ("between", "scalable"),
    [
        (F.relu, True),
        (lambda x: F.max_pool2d(F.leaky_relu(x), 2), True),
        (lambda x: F.avg_pool2d(x, 3), True),
        (lambda x: F.pad(x, (1, 1, 1, 1), value=2.0), False),
        (lambda x: x.relu() + 1, False),
        (lambda x: x.relu() + x, True),
        (torch.sigmoid, False),
        (F.gelu, False),
        (lambda x: F.relu6(x), False),
        (lambda x: x.relu() + torch.ones(()), False),
        (lambda x: x * x, False),
    ],
)
def test_scalable_says_whether_scaling_a_weight_set_scales_the_channel(between, scalable) -> None:
    model = Net(between).eval()
    assert sets_of(model, "conv").scalable is scalable
    x, seen = 5 * torch.randn(4, 2, 7, 7), []
    model.read.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        model.norm.weight[1] *= 3
        model.norm.bias[1] *= 3
        model(x)
    scale = torch.ones(6).index_fill(0, torch.tensor([1]), 3.0)[:, None, None]
    assert torch.allclose(seen[1], seen[0] * scale, rtol=1e-4, atol=1e-5) is scalable


def test_parameters_of_single_channels_on_the_way_belong_to_the_set() -> None:
    model = Depthwise()
    found = sets_of(model, "conv")
    assert found.weights.shape == (6, 2 + 9 + 1)
    assert not found.scalable
    with torch.no_grad():
        model.conv.weight[4], model.conv.bias[4] = model.conv.weight[1], model.conv.bias[1]
        different = sets_of(model, "conv")
        assert squared_distances(different.weights)[1, 4] > 1e-4
        model.each.weight[4], model.each.bias[4] = model.each.weight[1], model.each.bias[1]
    alike = sets_of(model, "conv")
    assert squared_distances(alike.weights)[1, 4] == 0
    x = model.each(model.conv(torch.randn(X)).relu())
    torch.testing.assert_close(x[:, 1], x[:, 4])


def test_all_layers_that_write_a_stream_are_in_the_set() -> None:
    model = Residual()
    found = sets_of(model, "stem", (1, 4))
    assert found.weights.shape == (6, 4 + 6)
    assert found.biases.shape == (6, 2)
    expected = torch.cat([model.stem.weight, model.block.weight], 1).double()
    torch.testing.assert_close(found.weights, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 1000))
def test_distances_are_euclidean(n, d, seed) -> None:
    vectors = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    vectors[n // 2] = vectors[0]
    found = squared_distances(vectors)
    assert found.dtype == torch.float64
    assert (found >= 0).all()
    assert not found.diagonal().any()
    expected = (vectors[:, None] - vectors[None]).double().square().sum(2)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-5)
