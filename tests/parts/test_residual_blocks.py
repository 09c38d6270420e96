"""Residual branches: found in whatever way the sum is written, and taken out without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.residual_blocks import residual_branches, scale_branch, without_branches
from efficientdnns.result import load
from efficientdnns.surgery import ChannelGraph


class InPlace(nn.Module):
    """A pre-activation block and one with a projection, summed in place, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv1, self.conv2 = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.wide, self.project = nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(6, 10, 1)
        self.after = nn.Conv2d(10, 10, 3, padding=1)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.conv2(torch.relu(self.conv1(torch.relu(self.bn(x)))))
        y += x
        z = self.after(torch.relu(self.wide(y)))
        z += self.project(y)
        return self.head(z.mean((2, 3)))


def disturbed(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
    return model.eval()


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (InPlace, ["", "#2"]),
        (lambda: ed.models.build("small-resnet", num_classes=4, in_channels=3), ["layer1.0", "layer2.0"]),
    ],
    ids=["in-place", "small-resnet"],
)
def test_without_branches_is_scaling_them_by_zero(make, names) -> None:
    model, x = disturbed(make()), torch.randn(3, 3, 16, 16)
    graph = ChannelGraph.trace(model, x[:1], verify=False)
    branches = residual_branches(model, graph)
    assert [branch.name for branch in branches] == names
    for gone in (branches[:1], branches[1:], branches):
        expected = copy.deepcopy(model)
        for branch in gone:
            scale_branch(expected, branch, 0.0)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        smaller = without_branches(model, graph, gone)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        with torch.inference_mode():
            torch.testing.assert_close(smaller(x), expected(x))
        alive = {name for name, _ in smaller.named_parameters()}
        assert not any(name.startswith(f"{layer}.") for b in gone for layer in b.layers for name in alive)


def test_a_network_without_a_block_can_be_saved_and_pruned_on(tmp_path) -> None:
    model = disturbed(ed.models.build("small-resnet", num_classes=4, in_channels=3))
    graph = ChannelGraph.trace(model, torch.zeros(1, 3, 16, 16), verify=False)
    smaller = without_branches(model, graph, residual_branches(model, graph)[1:])
    again = ChannelGraph.trace(smaller, torch.zeros(1, 3, 16, 16))
    assert any(group.name == "layer1.0.conv1" for group in again.groups)
    x, y = torch.randn(32, 3, 16, 16), torch.randint(4, (32,))
    task = ed.Task.from_tensors((x, y), (x, y), num_classes=4)
    ed.compress(smaller, task, [], quiet=True, latency=False).save(tmp_path)
    with torch.inference_mode():
        assert torch.equal(load(tmp_path)(x), smaller(x))


def test_a_plain_network_has_no_branches() -> None:
    model = ed.models.build("lenet5")
    assert residual_branches(model, ChannelGraph.trace(model, torch.zeros(1, 1, 28, 28), verify=False)) == []
