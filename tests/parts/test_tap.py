"""Taps read what flows, before it is overwritten, and find the ends of stages."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficientdnns.errors import ConfigurationError, ModelError
from efficientdnns.models import build
from efficientdnns.parts.tap import Tap, stage_ends, tap_once, weighted_layers


class PostActivation(nn.Module):
    """Two blocks with functional ReLU, the second at half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.block = Block()
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.block(F.relu(self.bn(self.conv(x)), inplace=True))
        x = torch.relu_(self.down(x))
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return F.relu(self.conv(x) + x)


def test_outputs_and_inputs_are_read_before_in_place_operations():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    x = torch.randn(16, 4)
    expected = model[0](x)
    with Tap(model, ["0"]) as outputs, Tap(model, ["1", "2"], "input") as inputs:
        model(x)
    assert (expected < 0).any()
    assert torch.equal(outputs["0"], expected)
    assert torch.equal(inputs["1"], expected)
    assert torch.equal(inputs["2"], expected.relu())


def test_keyword_inputs_are_read():
    model = nn.Linear(4, 5)
    x = torch.randn(2, 4)
    with Tap(model, [""], "input") as tap:
        model(input=x)
    assert torch.equal(tap[""], x)


def test_pre_activation_is_what_the_relu_sees():
    model = PostActivation()
    x = torch.randn(2, 1, 8, 8)
    with Tap(model, ["conv", "block", "down", "head", ""], "pre-activation") as tap:
        logits = model(x)
        stem = F.batch_norm(model.conv(x), None, None, model.bn.weight, model.bn.bias, True)
        assert torch.allclose(tap["conv"], stem, atol=1e-5)
        inner = stem.relu()
        assert torch.allclose(tap["block"], model.block.conv(inner) + inner, atol=1e-5)
        assert torch.allclose(tap["down"], model.down(model.block(inner)), atol=1e-5)
        assert (tap["down"] < 0).any()
        assert torch.equal(tap["head"], logits)
        assert torch.equal(tap[""], logits)
        tap["block"].sum().backward()
    assert model.conv.weight.grad is not None
    assert model.head.weight.grad is None


def test_pre_activation_block_is_read_through_the_next_batch_norm():
    model = build("wide-resnet", depth=10, width=1).eval()
    names = stage_ends(model, torch.randn(1, 3, 32, 32))
    assert len(names) == 3
    x = torch.randn(2, 3, 32, 32)
    values = tap_once(model, names, x)
    assert [tuple(value.shape[1:]) for value in values.values()] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    batch_norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad(), Tap(model, [*batch_norms, *names]) as tap:
        model(x)
    assert names[-1] == "bn"
    for name in names[:-1]:
        assert not torch.equal(values[name], tap[name]), "the block's own output has no boundary at zero"
        assert any(values[name].equal(tap[norm]) for norm in batch_norms)
    assert torch.equal(values["bn"], tap["bn"])


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("cifar-resnet20", (1, 3, 32, 32), [(16, 32, 32), (32, 16, 16), (64, 8, 8)]),
        ("small-resnet", (1, 1, 28, 28), [(16, 28, 28), (32, 14, 14)]),
        ("lenet5", (1, 1, 28, 28), [(20, 24, 24), (50, 8, 8), (500,)]),
        ("lenet-300-100", (1, 1, 28, 28), [(300,), (100,)]),
        ("vgg-small", (1, 3, 32, 32), [(128, 32, 32), (256, 16, 16), (512, 8, 8)]),
    ],
)
def test_stage_ends_are_the_last_responses_at_each_size(name, shape, sizes):
    model = build(name)
    names = stage_ends(model, torch.randn(shape))
    values = tap_once(model, names, torch.randn(shape))
    assert [tuple(value.shape[1:]) for value in values.values()] == sizes
    for value in values.values():
        assert (value < 0).any(), "features are read before the ReLU"


def test_stage_names_are_the_outermost_modules_before_the_activation():
    assert stage_ends(build("lenet5"), torch.randn(1, 1, 28, 28)) == ["conv1", "conv2", "fc1"]
    assert stage_ends(build("mlp", hidden=[9, 8]), torch.randn(1, 784)) == ["layers.1", "layers.3"]
    assert stage_ends(build("cifar-resnet20"), torch.randn(1, 3, 32, 32)) == ["layer1", "layer2", "layer3"]


def test_weighted_layers_are_in_the_order_of_execution():
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.first(x).relu())

    assert weighted_layers(Reversed(), torch.randn(1, 4)) == ["first", "last"]


def test_a_tap_leaves_no_trace():
    model = PostActivation()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    stage_ends(model, torch.randn(1, 1, 8, 8))
    tap = Tap(model, ["block"], "pre-activation")
    with tap:
        model.eval()(torch.randn(1, 1, 8, 8))
    model.train()
    read = tap["block"]
    model.eval()(torch.randn(1, 1, 8, 8))
    assert tap["block"] is read
    assert modes == [module.training for module in model.train().modules()]
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_failing_forward_does_not_leave_the_watch_on():
    model = PostActivation()
    with Tap(model, ["block"], "pre-activation") as tap, pytest.raises(RuntimeError):
        model(torch.randn(1, 7, 8, 8))
    assert tap._watch is None
    assert torch.relu(torch.tensor(-1.0)) == 0


def test_errors_name_the_module():
    with pytest.raises(ConfigurationError, match=r"no module 'blok' \(did you mean 'block'"):
        Tap(PostActivation(), ["blok"])
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="no activation"):
        stage_ends(model, torch.randn(1, 2))
    with pytest.raises(ModelError, match="did not run"):
        Tap(model, ["0"])["0"]
