"""Wide residual networks: [Zagoruyko and Komodakis, BMVC 2016](https://arxiv.org/abs/1605.07146)."""

from __future__ import annotations

from torch import Tensor, nn

from efficientdnns.errors import ModelError


class WideBlock(nn.Module):
    """Pre-activation block: batch norm, ReLU, conv3x3, batch norm, ReLU, (dropout,) conv3x3, plus the shortcut.

    Where the number of channels or the size changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(in_channels), nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(channels), nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.projects = stride != 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if self.projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        out = self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(activated)))))
        return out + self.shortcut(activated if self.projects else x)


class WideResNet(nn.Module):
    """WRN-depth-width: conv3x3 16, three groups of (depth - 4) / 6 blocks of 16, 32 and 64 times ``width`` channels,
    batch norm, ReLU, global average pool, linear. Takes (B, ``in_channels``, H, W)."""

    def __init__(
        self, depth: int = 16, width: int = 1, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ModelError(f"depth is {depth}, expected 6n + 4 (10, 16, 22, 28, 40, ...)")
        blocks, channels = (depth - 4) // 6, 16
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        stages = []
        for base in (16, 32, 64):
            stage = []
            for block in range(blocks):
                stride = 2 if base > 16 and block == 0 else 1
                stage.append(WideBlock(channels, base * width, stride, dropout))
                channels = base * width
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(self.flatten(self.pool(self.relu(self.bn(x)))))
