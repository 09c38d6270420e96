from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from surgery_networks import CharModel, LeNet5, ResNet, random_selection, randomise
from torch import Tensor, nn

from efficientdnns.errors import FileFormatError, ModelError
from efficientdnns.surgery import (
    ChannelGraph,
    apply_difference,
    describe,
    difference,
    fold_batch_norm,
    narrow_input,
    narrow_output,
    rebuildable,
    remove,
)

IMAGE = torch.randn(2, 3, 16, 16)


def rebuilt(model: nn.Module, reference: nn.Module) -> nn.Module:
    """Through JSON and a strict state dict."""
    delta = json.loads(json.dumps(difference(model, reference)))
    again = apply_difference(reference, delta)
    again.load_state_dict(model.state_dict(), strict=True)
    return again.eval()


@pytest.mark.parametrize(
    ("factory", "x"),
    [
        (LeNet5, torch.randn(2, 1, 28, 28)),
        (lambda: ResNet("A"), IMAGE),
        (lambda: ResNet("B"), IMAGE),
        (CharModel, torch.arange(10).reshape(2, 5)),
        (lambda: CharModel(nn.GRU, 1, True), torch.arange(10).reshape(2, 5)),
        (lambda: CharModel(nn.RNN, 2), torch.arange(10).reshape(2, 5)),
    ],
)
def test_pruned_networks_come_back(factory: Any, x: Tensor) -> None:
    model = randomise(factory()).float()
    graph = ChannelGraph.trace(model, x)
    smaller = remove(model, x, random_selection(graph), graph)
    assert torch.equal(rebuilt(smaller, factory())(x), smaller(x))


def test_narrowed_and_folded_networks_come_back() -> None:
    model = randomise(ResNet("A")).float()
    narrow = narrow_input(narrow_output(model, IMAGE, "conv1", [0, 2, 5]), "fc", range(3, 30))
    folded = fold_batch_norm(model, IMAGE)
    for changed in (narrow, folded):
        assert torch.equal(rebuilt(changed, ResNet("A"))(IMAGE), changed(IMAGE))


def test_equal_networks_have_no_difference() -> None:
    assert difference(ResNet("B"), ResNet("B")) == {"modules": {}}


def test_ties_and_dtype_come_back() -> None:
    model = randomise(CharModel(tied=True))
    tokens = torch.arange(10).reshape(2, 5)
    smaller = remove(model, tokens, {"embedding": [1, 2]})
    again = rebuilt(smaller, CharModel(tied=True))
    assert again.head.weight is again.embedding.weight
    assert again.head.weight.dtype == torch.float64
    assert torch.equal(again(tokens), smaller(tokens))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.width = nn.Parameter(torch.ones(4)), 4
        self.register_buffer("index", torch.tensor([0, 1, 2, 3]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)[:, : self.width] * self.scale


def test_own_tensors_buffers_and_attributes() -> None:
    model = Own()
    model.scale, model.index, model.width = nn.Parameter(torch.randn(2)), torch.tensor([3, 1]), 2
    x = torch.randn(2, 4)
    assert torch.equal(rebuilt(model, Own())(x), model(x))


def test_root_and_sequential() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2, bias=False)))
    x = torch.randn(2, 4)
    assert torch.equal(rebuilt(model, nn.Identity())(x), model(x))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, (3, 1), stride=2, padding="valid", dilation=2, groups=2, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 6, 3, output_padding=1, stride=2),
        nn.GroupNorm(2, 4, affine=False),
        nn.LayerNorm([3, 4]),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.LSTM(3, 4, 2, batch_first=True, dropout=0.1),
        nn.RNN(3, 4, nonlinearity="relu"),
        nn.MultiheadAttention(8, 2, batch_first=True),
        nn.PReLU(3),
        nn.AdaptiveAvgPool2d((2, None)),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Embedding(5, 3, padding_idx=0),
        nn.Hardtanh(-2, 2),
        nn.GELU("tanh"),
        nn.Unflatten(1, (2, 2)),
        nn.Upsample(scale_factor=2, mode="nearest"),
    ],
    ids=lambda module: type(module).__name__,
)
def test_leaf_round_trip(module: nn.Module) -> None:
    spec = json.loads(json.dumps(describe(module)))
    again = apply_difference(nn.Identity(), spec)
    again.load_state_dict(module.state_dict(), strict=True)
    assert repr(again) == repr(module)
    assert describe(again) == describe(module)


def test_what_cannot_be_described_is_named() -> None:
    class Strange(nn.Module):
        pass

    model = LeNet5()
    model.fc2 = nn.Sequential(nn.ReLU(), Strange())
    with pytest.raises(ModelError, match=r"'fc2\.1' \(Strange\).*@rebuildable"):
        difference(model, LeNet5())


def test_rebuildable_needs_config_and_a_free_name() -> None:
    with pytest.raises(ModelError, match=r"no config\(\)"):
        rebuildable(type("NoConfig", (nn.Module,), {}))
    with pytest.raises(ModelError, match="another class name"):
        rebuildable(type("Linear", (nn.Module,), {"config": lambda self: {}}))


def test_bad_data_is_refused() -> None:
    with pytest.raises(FileFormatError, match=r"'Linaer'.*did you mean"):
        apply_difference(LeNet5(), {"modules": {"fc1": {"type": "Linaer"}}})
    with pytest.raises(FileFormatError, match=r"no module 'body'"):
        apply_difference(LeNet5(), {"modules": {"body.0": {"type": "ReLU"}}})


def test_the_compared_model_is_untouched() -> None:
    model = LeNet5()
    before = copy.deepcopy(model.state_dict())
    difference(model, LeNet5())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
