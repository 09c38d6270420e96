from __future__ import annotations

import pytest
import torch
from surgery_networks import ResNet, function_module, randomise
from torch import Tensor, nn

from efficientdnns.surgery import fold_batch_norm


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.mark.parametrize("option", ["A", "B"])
def test_resnet_folds_completely(option: str) -> None:
    model, x = randomise(ResNet(option)), torch.randn(2, 3, 16, 16).double()
    before = model(x)
    folded = fold_batch_norm(model, x)
    assert norms(folded) == 0
    assert norms(model) > 0
    assert (folded(x) - before).abs().max() < 1e-9
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_grouped_and_linear(groups: int) -> None:
    layers = [nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    layers += [nn.Conv2d(6, 6, 3, groups=groups), nn.BatchNorm2d(6, affine=False), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(6 * 16, 5), nn.BatchNorm1d(5)).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 4, 4, 4).double()
    folded = fold_batch_norm(model, x)
    assert norms(folded) == 0
    assert (folded(x) - model(x)).abs().max() < 1e-9


def test_a_layer_with_two_readers_is_left_alone() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.n(y) + y

    model = randomise(function_module(forward, a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4)))
    assert norms(fold_batch_norm(model, torch.randn(1, 3, 5, 5).double())) == 1


def test_a_layer_called_twice_is_left_alone() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.n(self.a(self.a(x)))

    model = randomise(function_module(forward, a=nn.Conv2d(3, 3, 3), n=nn.BatchNorm2d(3)))
    assert norms(fold_batch_norm(model, torch.randn(1, 3, 7, 7).double())) == 1
