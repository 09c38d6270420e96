"""Cardinality: whole groups of grouped convolutions go, with all that makes and reads them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from efficientdnns.parts.cardinality import cardinality_groups, without_groups
from efficientdnns.surgery import ChannelGraph


class ResNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 24, 3, padding=1, groups=4), nn.BatchNorm2d(24)
        self.conv3, self.bn3 = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.last, self.head = nn.Conv2d(8, 6, 3, groups=2), nn.Linear(6 * 16, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        x = torch.relu(x + self.bn3(self.conv3(y)))
        return self.head(torch.relu(self.last(self.depthwise(x))).flatten(1))


def test_groups_of_a_grouped_convolution_go_exactly() -> None:
    model = ResNeXtBlock().eval()
    for norm in (model.bn1, model.bn2, model.bn3):
        norm.running_mean.normal_()
        norm.bias.data.normal_()
    x = torch.randn(3, 3, 8, 8)
    groups = cardinality_groups(model, ChannelGraph.trace(model, x[:1]))
    assert [(group.name, group.size) for group in groups] == [("conv2", 4)], (
        "not the depthwise one, nor those on the stream"
    )
    expected = copy.deepcopy(model)
    expected.conv3.weight.data[:, 6:12] = 0
    expected.conv3.weight.data[:, 18:] = 0
    smaller = without_groups(model, groups, {"conv2": torch.tensor([1, 3])})
    with torch.inference_mode():
        torch.testing.assert_close(smaller(x), expected(x))
    assert (smaller.conv1.out_channels, smaller.conv2.groups, smaller.conv2.in_channels) == (6, 2, 6)
    assert (smaller.conv2.out_channels, smaller.bn2.num_features, smaller.conv3.in_channels) == (12, 12, 12)
    assert model.conv2.groups == 4
