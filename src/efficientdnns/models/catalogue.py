"""The built-in networks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from efficientdnns.models.cifar_resnet import cifar_resnet, small_resnet
from efficientdnns.models.fitnet import FitNetMNIST
from efficientdnns.models.lenet import LeNet5, LeNet5Original, LeNet300, lenet5_caffe
from efficientdnns.models.perceptron import MLP
from efficientdnns.models.recurrent import CharLSTM
from efficientdnns.models.transformer import SIZES, Transformer
from efficientdnns.models.vgg import cifar_vgg16, small_vgg, vgg_small
from efficientdnns.models.wide_resnet import WideResNet


class Entry(NamedTuple):
    """A network: the function that makes it, what it is, and the option that ``num_classes`` sets."""

    factory: Callable[..., nn.Module]
    summary: str
    classes: str = "num_classes"


CATALOGUE: dict[str, Entry] = {
    "lenet-300-100": Entry(LeNet300, "784-300-100-10 with ReLU"),
    "lenet5": Entry(LeNet5, "Caffe's sizes 20-50-500 with ReLU after every layer, 28 x 28"),
    "lenet5-caffe": Entry(lenet5_caffe, "Caffe's LeNet-5: 20-50-500, no ReLU after the convolutions"),
    "lenet5-32": Entry(LeNet5Original, "6-16-120-84 with ReLU, 32 x 32 (28 x 28 is padded)"),
    "mlp": Entry(MLP, "multilayer perceptron of any width, depth, activation and initialisation"),
    "small-resnet": Entry(small_resnet, "two stages of 16 and 32 channels, for the digits"),
    **{
        f"cifar-resnet{depth}": Entry(partial(cifar_resnet, depth), f"ResNet-{depth} for CIFAR, 16-32-64 channels")
        for depth in (20, 32, 44, 56, 110)
    },
    "small-vgg": Entry(small_vgg, "convolutions 16, 32, 32 with batch norm, one linear layer, 28 x 28"),
    "vgg-small": Entry(vgg_small, "convolutions 2 x 128, 2 x 256, 2 x 512 with batch norm, one linear layer, 32 x 32"),
    "cifar-vgg16": Entry(cifar_vgg16, "VGG-16 with batch norm for CIFAR: 13 convolutions, one linear layer"),
    "wide-resnet": Entry(WideResNet, "pre-activation wide ResNet of depth 6n + 4"),
    **{
        f"wrn-{depth}-{width}": Entry(
            partial(WideResNet, depth, width), f"wide ResNet of depth {depth}, {width} times the width"
        )
        for depth, width in ((10, 4), (16, 1), (16, 2), (16, 4), (22, 4), (28, 2), (28, 10), (40, 1), (40, 2), (40, 10))
    },
    "fitnet-mnist": Entry(FitNetMNIST, "thin maxout network for 28 x 28"),
    "char-lstm": Entry(CharLSTM, "embedding, LSTM of 256, linear: a character language model", "vocabulary"),
    "transformer": Entry(Transformer, "pre-norm transformer of any width and depth over token ids", "vocabulary"),
    **{
        f"transformer-{name}": Entry(
            partial(Transformer, width=size.width, depth=size.depth),
            f"transformer of width {size.width} and depth {size.depth}",
            "vocabulary",
        )
        for name, size in SIZES.items()
    },
}
