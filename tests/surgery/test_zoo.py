"""Small members of the families that benchmarks/surgery.py measures: random removal is exact in each of them."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surgery_networks import check_exact, function_module
from torch import Tensor, nn

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "surgery.py"


def image(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def conv(inputs: int, outputs: int, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **options)


def lively(model: nn.Module) -> nn.Module:
    """Parameters that start out constant (zeros, the 1e-6 of layer scales) would hide what the channels do."""
    for parameter in model.parameters():
        if parameter.dim() and bool((parameter == parameter.flatten()[0]).all()):
            nn.init.normal_(parameter)
    return model


def torchvision_network(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    if name == "convnext":
        setting = models.convnext.CNBlockConfig
        return models.ConvNeXt([setting(8, 12, 1), setting(12, None, 1)], num_classes=5)
    if name == "swin":
        return models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=5)
    if name == "vit":
        return models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=5)
    if name == "efficientnet":
        setting = partial(models.efficientnet.MBConvConfig, expand_ratio=4, kernel=3)
        blocks = [
            setting(stride=s, input_channels=i, out_channels=o, num_layers=2) for s, i, o in ((1, 8, 8), (2, 8, 16))
        ]
        return models.EfficientNet(blocks, 0.0, num_classes=5, last_channel=32)
    return {
        "densenet": lambda: models.DenseNet(4, (2, 2), 8, num_classes=5),
        "mobilenet v2": lambda: models.MobileNetV2(5, 0.1, [[1, 8, 1, 1], [4, 16, 2, 2]]),
        "shufflenet": lambda: models.ShuffleNetV2([1, 2, 1], [8, 16, 24, 32, 32], num_classes=5),
        "squeezenet": lambda: models.squeezenet1_1(num_classes=5),
    }[name]()


def timm_network(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    if name == "mixer":
        size = {"num_classes": 5, "img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 16}
        return timm.models.mlp_mixer.MlpMixer(**size)
    if name == "poolformer":
        return timm.models.metaformer.MetaFormer(num_classes=5, depths=(1, 1), dims=(8, 16), use_mlp_head=False)
    sizes: dict[str, dict[str, Any]] = {
        "res2net50_26w_4s": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "num_classes": 5},
        "lcnet_035": {"num_classes": 5},
        "inception_next_atto": {"depths": (1, 1, 1, 1), "dims": (16, 16, 24, 24), "num_classes": 5},
    }
    return timm.create_model(name, **sizes[name])


@pytest.mark.parametrize(
    "name", ["convnext", "swin", "vit", "efficientnet", "densenet", "mobilenet v2", "shufflenet", "squeezenet"]
)
def test_torchvision(name: str) -> None:
    size = 16 if name in ("vit", "swin") else 32
    check_exact(lively(torchvision_network(name)), image(size))


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "lcnet_035", "mixer", "poolformer", "inception_next_atto"])
def test_timm(name: str) -> None:
    check_exact(lively(timm_network(name)), image(32))


def einsum_layer(self: nn.Module, x: Tensor) -> Tensor:
    return self.c(torch.einsum("bchw,cd->bdhw", self.a(x), self.b.weight.t()).relu())


def fold_and_unfold(self: nn.Module, x: Tensor) -> Tensor:
    y = F.unfold(self.a(x), 2, stride=2).relu()
    return self.c(F.fold(y, x.shape[2:], 2, stride=2))


def unshuffle(self: nn.Module, x: Tensor) -> Tensor:
    return self.c(F.pixel_shuffle(F.pixel_unshuffle(self.a(x), 2).relu(), 2))


def repeated(self: nn.Module, x: Tensor) -> Tensor:
    return self.c(self.a(x).repeat_interleave(2, dim=1).relu())


def shuffled(self: nn.Module, x: Tensor) -> Tensor:
    return self.c(F.channel_shuffle(self.a(x), 2).relu())


def largest(self: nn.Module, x: Tensor) -> Tensor:
    return self.c(self.a(x).max(2, keepdim=True)[0] + self.a(x).median(3, keepdim=True)[0])


def channels_last(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x).movedim(1, -1).relu()
    return self.c(torch.moveaxis(y, (3, 1), (1, 2)))


def windowed(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x).unfold(2, 3, 1).unfold(3, 3, 1)
    return self.c(y.amax((-1, -2)))


def bias_by_position(self: nn.Module, x: Tensor) -> Tensor:
    """A table of relative positions: its rows are picked by an index, its columns are channels."""
    rows, columns = torch.arange(4)[:, None], torch.arange(4)[None, :]
    table = self.e.weight[rows - columns + 3]
    return self.c((self.a(x)[..., :4, :4] + table.permute(2, 0, 1)).relu())


def resized(self: nn.Module, x: Tensor) -> Tensor:
    return self.c(F.interpolate(self.a(x), (5, 5), mode="bicubic", antialias=True).relu())


def picked(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.c(y.gather(3, y.argsort(3)[..., :3]))


LAYERS: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module]]] = {
    "einsum": (einsum_layer, {"a": conv(3, 6), "b": nn.Linear(6, 8, bias=False), "c": conv(8, 4)}),
    "fold and unfold": (fold_and_unfold, {"a": conv(3, 6), "c": conv(6, 4)}),
    "pixel unshuffle": (unshuffle, {"a": conv(3, 6), "c": conv(6, 4)}),
    "repeat interleave": (repeated, {"a": conv(3, 6), "c": conv(12, 4)}),
    "channel shuffle": (shuffled, {"a": conv(3, 8), "c": conv(8, 4)}),
    "max and median": (largest, {"a": conv(3, 6), "c": conv(6, 4)}),
    "movedim": (channels_last, {"a": conv(3, 6), "c": conv(6, 4)}),
    "windows": (windowed, {"a": conv(3, 6), "c": conv(6, 4)}),
    "positions": (bias_by_position, {"a": conv(3, 6), "e": nn.Embedding(7, 6), "c": conv(6, 4)}),
    "resized": (resized, {"a": conv(3, 6), "c": conv(6, 4)}),
    "gather": (picked, {"a": conv(3, 6), "c": conv(6, 4)}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_operation(name: str) -> None:
    forward, modules = LAYERS[name]
    graph, smaller = check_exact(function_module(forward, **modules), image(8))
    assert graph.groups_of("a")
    assert smaller.get_submodule("a").out_channels < modules["a"].out_channels


@pytest.mark.parametrize("how", ["split", "slice"])
def test_unequal_pieces_lose_their_own_channels(how: str) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.a(x)
        first = y.shape[1] - 3
        left, right = y.split([first, 3], 1) if how == "split" else (y[:, :first], y[:, first:])
        return self.c(left.relu()) + self.d(right)

    graph, _ = check_exact(function_module(forward, a=conv(3, 8), c=conv(5, 4), d=conv(3, 4)), image(8))
    assert graph.groups[0].size == 5
    assert graph.consumers(graph.groups[0]) == ["c"]


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("surgery_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_says_exact_and_wrong() -> None:
    module = benchmark()
    model, inputs = module.build("cifar/cifar-resnet20")
    module.enliven(model, inputs)
    limits = module.Limits(60, 8)
    found = module.ours("cifar/cifar-resnet20", limits, model, inputs)
    assert found["verdict"] == "exact"
    assert 0.2 < found["macs"] < 0.35
    assert limits.known["removable"] == 1
    other, original = copy.deepcopy(model), copy.deepcopy(model)
    next(original.parameters()).data.mul_(2)

    def reference(wide):
        return module.outputs(model.double(), wide)

    assert module.compare(reference, other, original, inputs)["verdict"] == "exact"
    next(other.parameters()).data.mul_(1.01)
    assert module.compare(reference, other, original, inputs)["verdict"] == "wrong"
    assert module.compare(reference, model, model, inputs)["verdict"] == "runs"


@pytest.mark.long
def test_every_family() -> None:
    """Ours on everything in the benchmark's list, each in a process of its own."""
    module = benchmark()
    options = module.arguments(["--skip-torch-pruning", "--limit", "100e6"])
    found = {name: module.measure(name, "ours", options) for name in module.architectures(options.limit)}
    assert {name: result for name, result in found.items() if result["verdict"] != "exact"} == {}
