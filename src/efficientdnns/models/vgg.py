"""VGG-like networks for 32 x 32 images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

SMALL = (128, 128, 0, 256, 256, 0, 512, 512, 0)
SIXTEEN = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Widths of the 3x3 convolutions; 0 is a 2x2 max-pool."""


class VGG(nn.Module):
    """3x3 convolutions with batch norm and ReLU, max-pools, and one linear layer; takes (B, ``in_channels``, 32, 32).

    ``final_size`` is the height and width that the linear layer reads; larger maps are average-pooled to it.
    """

    def __init__(
        self, layers: Sequence[int], num_classes: int, in_channels: int, width: float, final_size: int
    ) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels = in_channels
        for entry in layers:
            if entry == 0:
                features.append(nn.MaxPool2d(2))
                continue
            out = max(1, round(entry * width))
            features += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.features = nn.Sequential(*features)
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(final_size), nn.Flatten()
        self.linear = nn.Linear(channels * final_size**2, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(self.pool(self.features(x))))


def vgg_small(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> VGG:
    """VGG-Small of the quantization papers: convolutions 2 x 128, 2 x 256, 2 x 512 with a pool after each pair, linear
    from 4 x 4 x 512; 4.7 million parameters."""
    return VGG(SMALL, num_classes, in_channels, width, final_size=4)


def cifar_vgg16(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> VGG:
    """VGG-16 with batch norm as the pruning papers use it on CIFAR: 13 convolutions and one linear layer from 512;
    14.7 million parameters."""
    return VGG(SIXTEEN, num_classes, in_channels, width, final_size=1)


def small_vgg(num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> VGG:
    """Convolutions of 16, 32 and 32 channels with batch norm, a pool after each, linear from 3 x 3 x 32; takes 28 x 28."""
    return VGG((16, 0, 32, 0, 32, 0), num_classes, in_channels, width, final_size=3)
