"""A network computes in float64 without having been converted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficientdnns.surgery import ChannelGraph, remove
from efficientdnns.surgery.precision import computing_in


class Stubborn(nn.Module):
    """Its code names float32 where it can: casts, new tensors, a region without autocast, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.rand(8))
        self.constant = torch.rand(1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = F.relu(self.first(x.float())) * self.scale.to(torch.float32)
        y = y + torch.arange(len(x), dtype=torch.float32)[:, None] + torch.ones(1) * self.constant
        return self.second(y.to(self.first.weight.dtype))


NETWORKS = [
    (Stubborn, (4, 6)),
    (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(144, 3)),
        (2, 2, 8, 8),
    ),
    (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
    (lambda: nn.LSTM(4, 5, batch_first=True), (2, 3, 4)),
]


@pytest.mark.parametrize(("make", "shape"), NETWORKS, ids=["stubborn", "convolution", "attention", "lstm"])
@torch.no_grad()
def test_outputs_are_those_of_the_converted_network(make, shape) -> None:
    model, x = make().eval(), torch.randn(shape)
    wide = copy.deepcopy(model).double()
    if isinstance(wide, Stubborn):
        wide.constant = wide.constant.double()
        y = F.relu(wide.first(x.double())) * wide.scale
        expected = wide.second(y + torch.arange(4, dtype=torch.float64)[:, None] + wide.constant)
    else:
        expected = wide(x.double())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with computing_in(torch.float64):
        got = model(x)
    first, second = (z[0] if isinstance(z, tuple) else z for z in (expected, got))
    assert second.dtype == torch.float64
    torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-12)
    assert torch.get_default_dtype() == torch.float32
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_the_default_comes_back_after_an_error() -> None:
    with pytest.raises(RuntimeError), computing_in(torch.float64):
        nn.Linear(3, 2)(torch.randn(1, 4))
    assert torch.get_default_dtype() == torch.float32


def test_channels_are_removed_from_a_network_that_names_its_types() -> None:
    model, x = Stubborn().eval(), torch.randn(4, 6)
    graph = ChannelGraph.trace(model, x)
    assert [(group.name, group.size) for group in graph.groups] == [("first", 8)], graph.kept_whole
    assert all(node.operation != "wrap_with_autocast" for node in graph.nodes)
    smaller = remove(model, x, {"first": [1, 4, 5]}, graph)
    assert smaller.first.out_features == 5
