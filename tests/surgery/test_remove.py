from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from surgery_networks import CharModel, LeNet5, ResNet, check_exact, function_module, randomise
from torch import Tensor, nn

from efficientdnns.errors import SurgeryError
from efficientdnns.surgery import ChannelGraph, ScatterChannels, SelectChannels, remove

IMAGE = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(14).reshape(2, 7) % 20


@pytest.mark.parametrize("batch", [1, 3])
def test_lenet5(batch: int) -> None:
    check_exact(LeNet5(), torch.randn(batch, 1, 28, 28).double())


def test_lenet_300_100() -> None:
    layers = [nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    _, smaller = check_exact(nn.Sequential(*layers), torch.randn(2, 1, 28, 28).double())
    assert (smaller[1].out_features, smaller[3].in_features) == (180, 180)


@pytest.mark.parametrize("option", ["A", "B"])
def test_cifar_resnet(option: str) -> None:
    graph, smaller = check_exact(ResNet(option), IMAGE)
    assert smaller.conv1.out_channels == smaller.bn1.num_features == 5
    assert all(graph.groups_of(name) for name in ("conv1", "layers.1.conv2", "layers.3.conv2"))


def test_vgg_with_batch_norm() -> None:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 12), (12, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    check_exact(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.Linear(20, 5)), IMAGE)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, False), (3, False), (2, True)])
def test_recurrent(cell: type[nn.RNNBase], layers: int, both: bool) -> None:
    _, smaller = check_exact(CharModel(cell, layers, both), TOKENS)
    assert (smaller.rnn.hidden_size, smaller.rnn.input_size, smaller.embedding.embedding_dim) == (5, 5, 5)


def test_tied_parameters_stay_one() -> None:
    _, smaller = check_exact(CharModel(tied=True), TOKENS)
    assert smaller.head.weight is smaller.embedding.weight


def conv(inputs: int, outputs: int, size: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **options)  # type: ignore[arg-type]


def chain(self: nn.Module, x: Tensor) -> Tensor:
    return self.c(self.b(self.a(x).relu()).relu())


def concat(self: nn.Module, x: Tensor) -> Tensor:
    return self.c(self.n(torch.cat([self.a(x), self.b(x)], 1)).relu())


def dense(self: nn.Module, x: Tensor) -> Tensor:
    a = self.a(x)
    b = self.b(a.relu())
    return self.c(torch.cat([a, b, x], 1).mean((2, 3)))


def squeeze_excite(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.c(y * self.e(self.d(y.mean((2, 3), keepdim=True)).relu()).sigmoid())


def channel_shuffle(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    n, c, h, w = y.shape
    left, right = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).chunk(2, 1)
    return self.c(torch.cat([self.b(left), right], 1).relu())


def twice(self: nn.Module, x: Tensor) -> Tensor:
    return self.c(self.b(self.b(self.a(x)).relu()))


def gated(self: nn.Module, x: Tensor) -> Tensor:
    return self.c(F.glu(self.a(x), 1))


def padded(self: nn.Module, x: Tensor) -> Tensor:
    return self.c(F.pad(self.a(x), (1, 1, 1, 1, 0, 3), value=0.5).relu())


CASES = {
    "concat": (concat, {"a": conv(3, 6), "b": conv(3, 4), "n": nn.BatchNorm2d(10), "c": conv(10, 5)}),
    "dense": (dense, {"a": conv(3, 6, padding=1), "b": conv(6, 4, padding=1), "c": nn.Linear(13, 5)}),
    "depthwise": (chain, {"a": conv(3, 8), "b": conv(8, 8, groups=8), "c": conv(8, 5)}),
    "depthwise multiplier": (chain, {"a": conv(3, 8), "b": conv(8, 16, groups=8), "c": conv(16, 5)}),
    "grouped": (chain, {"a": conv(3, 8), "b": conv(8, 12, groups=4), "c": conv(12, 5)}),
    "transposed": (
        chain,
        {
            "a": nn.ConvTranspose2d(3, 8, 3),
            "b": nn.ConvTranspose2d(8, 12, 3, groups=4),
            "c": nn.ConvTranspose2d(12, 5, 1),
        },
    ),
    "transposed depthwise": (chain, {"a": conv(3, 8), "b": nn.ConvTranspose2d(8, 16, 3, groups=8), "c": conv(16, 5)}),
    "squeeze excite": (squeeze_excite, {"a": conv(3, 8), "d": conv(8, 4, 1), "e": conv(4, 8, 1), "c": conv(8, 5)}),
    "channel shuffle": (channel_shuffle, {"a": conv(3, 8), "b": conv(4, 4, 1), "c": conv(8, 5)}),
    "called twice": (twice, {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 5)}),
    "glu": (gated, {"a": conv(3, 8), "c": conv(4, 5)}),
    "constant padding": (padded, {"a": conv(3, 8), "c": conv(11, 5)}),
    "prelu": (chain, {"a": conv(3, 8), "b": nn.PReLU(8), "c": conv(8, 5)}),
    "select": (chain, {"a": SelectChannels([2, 0]), "b": conv(2, 6), "c": conv(6, 5)}),
    "scatter": (
        lambda self, x: self.c(self.b(self.a(x))),
        {"a": conv(3, 6), "b": ScatterChannels([1, 3, 4, 0, 6, 7], 9, [1.0, -1.0, 2.0]), "c": conv(9, 5)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_exact(name: str) -> None:
    forward, modules = CASES[name]
    check_exact(function_module(forward, **modules), IMAGE)


class ZeroPadShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = conv(3, 8, padding=1), conv(8, 16, padding=1), nn.Linear(16, 5)
        self.register_buffer("index", torch.tensor([8] * 4 + list(range(8)) + [8] * 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        zero = y.new_zeros(y.shape[0], 1, y.shape[2], y.shape[3])
        return self.last((self.second(y) + torch.cat([y, zero], 1).index_select(1, self.index)).mean((2, 3)))


def test_index_buffer_is_shortened_and_renumbered() -> None:
    graph, smaller = check_exact(ZeroPadShortcut(), IMAGE)
    assert sorted(g.size for g in graph.groups) == [8, 8]
    kept = smaller.first.out_channels
    assert [i for i in smaller.index.tolist() if i < kept] == list(range(kept))
    assert int(smaller.index.max()) == kept  # the zero channel
    assert len(smaller.index) == smaller.second.out_channels


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    graph, _ = check_exact(getattr(models, name)(num_classes=10), torch.randn(1, 3, 64, 64).double())
    assert graph.kept_whole == []


def test_flags_dtype_gradients_and_requires_grad_are_kept() -> None:
    model = randomise(ResNet("B")).float()
    model.train()
    model.bn1.eval()
    model.fc.weight.requires_grad_(False)
    model(IMAGE.float()).sum().backward()
    smaller = remove(model, IMAGE.float(), {"conv1": [0, 5]})
    assert [m.training for m in smaller.modules()] == [m.training for m in model.modules()]
    assert not smaller.fc.weight.requires_grad
    assert smaller.conv1.weight.dtype == torch.float32
    kept = [1, 2, 3, 4, 6, 7]
    assert torch.equal(smaller.conv1.weight.grad, model.conv1.weight.grad[kept])
    smaller(IMAGE.float()).sum().backward()


def test_refusals_leave_the_model_untouched() -> None:
    model, x = LeNet5(), torch.randn(1, 1, 28, 28)
    graph = ChannelGraph.trace(model, x)
    for selection, message in (
        ({"conv9": [0]}, "did you mean .*'conv1'"),
        ({"conv1": [6]}, r"0\.\.5"),
        ({"conv1": [-1]}, r"0\.\.5"),
        ({"conv1": range(6)}, "leave at least one"),
        ({"conv1": torch.zeros(6, dtype=torch.bool)}, "give integers"),
    ):
        with pytest.raises(SurgeryError, match=message):
            remove(model, x, selection, graph)
    assert model.conv1.weight.shape[0] == 6


class Reader(nn.Module):
    """The number of channels is part of the result, which no shape shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y) / y.shape[1]


def test_a_removal_that_breaks_the_network_is_refused_with_the_group() -> None:
    model = Reader()
    graph = ChannelGraph.trace(model, IMAGE.float(), verify=False)
    with pytest.raises(SurgeryError, match="'first' breaks the network"):
        remove(model, IMAGE.float(), {"first": [0]}, graph)


def test_silently_wrong_is_noticed() -> None:
    graph = ChannelGraph.trace(Reader(), IMAGE.float())
    assert graph.groups == []
    assert "differ" in graph.kept_whole[0].reason
