"""Thin maxout networks: [FitNets, Romero et al., ICLR 2015](https://arxiv.org/abs/1412.6550)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaxoutConv2d(nn.Module):
    """Elementwise maximum of ``pieces`` parallel 3x3 convolutions (padding 1)."""

    def __init__(self, in_channels: int, out_channels: int, pieces: int = 2) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(in_channels, out_channels, 3, padding=1) for _ in range(pieces))

    def forward(self, x: Tensor) -> Tensor:
        out = self.convs[0](x)
        for conv in self.convs[1:]:
            out = torch.maximum(out, conv(x))
        return out


class FitNetMNIST(nn.Module):
    """FitNet for MNIST as LSUV trains it: six maxout convolutions (16, 16, pool, 16, 16, pool, 12, 12, pool), dropout
    0.3, linear; 21,426 parameters. Takes (B, ``in_channels``, 28, 28). Pools round sizes up, as Caffe does."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            MaxoutConv2d(in_channels, 16),
            MaxoutConv2d(16, 16),
            nn.MaxPool2d(4, 2, ceil_mode=True),
            MaxoutConv2d(16, 16),
            MaxoutConv2d(16, 16),
            nn.MaxPool2d(4, 2, ceil_mode=True),
            MaxoutConv2d(16, 12),
            MaxoutConv2d(12, 12),
            nn.MaxPool2d(2, 2, ceil_mode=True),
        )
        self.flatten, self.dropout = nn.Flatten(), nn.Dropout(dropout)
        self.linear = nn.Linear(12 * 3 * 3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(self.flatten(self.features(x))))
