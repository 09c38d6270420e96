"""The LeNets that pruning papers report on, for 28 x 28 images (MNIST), and the 32 x 32 original."""

from __future__ import annotations

from torch import Tensor, nn


class LeNet300(nn.Module):
    """LeNet-300-100: fully connected 784-300-100-10 with ReLU; 266,610 parameters.

    Takes anything that flattens to ``in_features`` values a sample.
    """

    def __init__(self, num_classes: int = 10, in_features: int = 784) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1, self.relu1 = nn.Linear(in_features, 300), nn.ReLU()
        self.fc2, self.relu2 = nn.Linear(300, 100), nn.ReLU()
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.fc1(self.flatten(x)))
        return self.fc3(self.relu2(self.fc2(x)))


class LeNet5(nn.Module):
    """LeNet-5 as Caffe has it: conv5x5 20, pool, conv5x5 50, pool, 500, classes; 431,080 parameters.

    Takes (B, ``in_channels``, 28, 28). ``relu_after_conv`` puts a ReLU after each convolution; Caffe's has none there,
    only after the first fully connected layer.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, relu_after_conv: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.relu1 = nn.ReLU() if relu_after_conv else nn.Identity()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.relu2 = nn.ReLU() if relu_after_conv else nn.Identity()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1, self.relu3 = nn.Linear(50 * 4 * 4, 500), nn.ReLU()
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return self.fc2(self.relu3(self.fc1(self.flatten(x))))


def lenet5_caffe(num_classes: int = 10, in_channels: int = 1) -> LeNet5:
    """`LeNet5` without ReLU after the convolutions."""
    return LeNet5(num_classes, in_channels, relu_after_conv=False)


class LeNet5Original(nn.Module):
    """LeNet-5 for (B, ``in_channels``, 32, 32): conv5x5 6, pool, conv5x5 16, pool, 120, 84, classes, with ReLU.

    28 x 28 images are padded by 2. ``width`` scales the two convolutions (0.5: LeNet-5-half with 3 and 8 filters).
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        first, second = max(1, round(6 * width)), max(1, round(16 * width))
        self.conv1, self.relu1, self.pool1 = nn.Conv2d(in_channels, first, 5), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.relu2, self.pool2 = nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1, self.relu3 = nn.Linear(second * 5 * 5, 120), nn.ReLU()
        self.fc2, self.relu4 = nn.Linear(120, 84), nn.ReLU()
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 28:
            x = nn.functional.pad(x, (2, 2, 2, 2))
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return self.fc3(self.relu4(self.fc2(self.relu3(self.fc1(self.flatten(x))))))
