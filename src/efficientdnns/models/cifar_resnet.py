"""The CIFAR ResNets: [He et al., CVPR 2016](https://arxiv.org/abs/1512.03385), section 4.2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficientdnns.errors import ModelError
from efficientdnns.surgery.structure import rebuildable


@rebuildable
class PadShortcut(nn.Module):
    """Option-A shortcut: every ``stride``-th pixel, and channels by ``index``.

    ``index[j]`` is the input channel that output channel j repeats; the number of input channels, the place of one zero
    channel appended to the input, means zero. It has no parameters and no state.
    """

    index: Tensor

    def __init__(self, index: Sequence[int], stride: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.register_buffer("index", torch.tensor(list(index), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        zero = x.new_zeros(x.shape[0], 1, x.shape[2], x.shape[3])
        return torch.cat([x, zero], 1).index_select(1, self.index)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"index": self.index.tolist(), "stride": self.stride}


class BasicBlock(nn.Module):
    """conv3x3, batch norm, ReLU, conv3x3, batch norm, plus the shortcut, ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(channels), nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = _option_a(in_channels, channels, stride)
            if shortcut == "B":
                projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
                self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """conv3x3, stages of ``blocks`` basic blocks (halving the size from the second on), global average pool, linear.

    ``shortcut`` between stages is ``A`` (strided slice and zero channels, the paper's for CIFAR) or ``B`` (strided 1x1
    convolution and batch norm). Weights are drawn as He et al. (ICCV 2015) do. Takes (B, ``in_channels``, H, W).
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        shortcut: str = "A",
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ModelError(f"shortcut is '{shortcut}', expected 'A' (slice and pad) or 'B' (1x1 convolution)")
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(widths[0]), nn.ReLU()
        channels = widths[0]
        stages = []
        for number, width in enumerate(widths):
            strides = [1 if number == 0 else 2] + [1] * (blocks - 1)
            sources = [channels] + [width] * (blocks - 1)
            stages.append(nn.Sequential(*(BasicBlock(c, width, s, shortcut) for c, s in zip(sources, strides))))
            channels = width
        for number, stage in enumerate(stages, 1):
            self.add_module(f"layer{number}", stage)
        self.stages = len(stages)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.linear(self.flatten(self.pool(x)))


def cifar_resnet(
    depth: int, num_classes: int = 10, in_channels: int = 3, shortcut: str = "A", width: float = 1.0
) -> CifarResNet:
    """ResNet of ``depth`` = 6n + 2 layers: n blocks in each of three stages of 16, 32, 64 times ``width`` channels."""
    if depth < 8 or (depth - 2) % 6:
        raise ModelError(f"depth is {depth}, expected 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...)")
    widths = [max(1, round(channels * width)) for channels in (16, 32, 64)]
    return CifarResNet((depth - 2) // 6, num_classes, in_channels, widths, shortcut)


def small_resnet(
    num_classes: int = 10, in_channels: int = 1, blocks: int = 1, width: float = 1.0, shortcut: str = "A"
) -> CifarResNet:
    """Two stages of 16 and 32 channels times ``width`` with ``blocks`` blocks each, for the digits."""
    widths = [max(1, round(channels * width)) for channels in (16, 32)]
    return CifarResNet(blocks, num_classes, in_channels, widths, shortcut)


def _option_a(in_channels: int, channels: int, stride: int) -> PadShortcut:
    if channels < in_channels:
        raise ModelError(f"an option-A shortcut cannot go from {in_channels} to {channels} channels; use shortcut='B'")
    before = (channels - in_channels) // 2
    after = channels - in_channels - before
    return PadShortcut([in_channels] * before + list(range(in_channels)) + [in_channels] * after, stride)
