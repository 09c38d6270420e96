"""Norms, attention and sizes written in code: what transformers need beside convolutions."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from surgery_networks import check_exact, function_module
from torch import Tensor, nn

from efficientdnns.surgery import ChannelGraph, apply_difference, difference, remove
from efficientdnns.surgery.reshape_rules import factors

TOKENS = torch.randn(2, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Attention(nn.Module):
    """Fused qkv with sizes read off the input, as timm's."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * (width // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, length, width))


class SeparateAttention(nn.Module):
    """Three projections and scaled_dot_product_attention, as Hugging Face's."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).view(x.shape[0], -1, self.heads, self.head_width).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], -1, self.heads * self.head_width))


class SelfAttention(nn.Module):
    """torch.nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, 12), nn.Linear(12, 5)
        self.position = nn.Parameter(torch.randn(1, 6, 12))
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(12), attention, nn.LayerNorm(12)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


@pytest.mark.parametrize("attention", [Attention, SeparateAttention, SelfAttention])
def test_transformer_block(attention: type[nn.Module]) -> None:
    model = Block(attention())
    graph, smaller = check_exact(model, TOKENS)
    assert sorted(group.size for group in graph.groups) == [3, 12, 24], "heads, the stream, the hidden layer"
    assert graph.kept_whole == []
    assert len(smaller.head.weight[0]) == smaller.norm1.normalized_shape[0] == 8


def test_encoder_layer_and_its_fused_path() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.TransformerEncoderLayer(12, 3, 24, batch_first=True), nn.Linear(12, 4))
    graph, _ = check_exact(model, TOKENS)
    assert sorted(group.size for group in graph.groups) == [3, 12, 24]


def test_a_recorded_module_is_data_trains_and_takes_any_batch() -> None:
    model = Block(Attention())
    graph = ChannelGraph.trace(model, TOKENS.float())
    heads = next(g for g in graph.groups if g.size == 3)
    smaller = remove(model, TOKENS.float(), {heads.name: [1]}, graph)
    assert graph.recorded == {"attention"}
    assert isinstance(smaller.attention, Attention)
    again = apply_difference(Block(Attention()), json.loads(json.dumps(difference(smaller, model))))
    again.load_state_dict(smaller.state_dict())
    x = torch.randn(5, 6, 12)
    assert torch.equal(again.eval()(x), smaller.eval()(x))
    assert torch.equal(copy.deepcopy(smaller)(x), smaller(x))
    smaller.train()(x).square().mean().backward()
    assert smaller.attention.qkv.weight.grad.abs().sum() > 0
    program = torch.export.export(smaller.eval(), (x,))
    torch.testing.assert_close(program.module()(x), smaller(x))


def test_children_of_a_recorded_module_are_called() -> None:
    model = Block(Attention())
    graph = ChannelGraph.trace(model, TOKENS.float())
    heads = next(g for g in graph.groups if g.size == 3)
    smaller = remove(model, TOKENS.float(), {heads.name: [0]}, graph)
    seen: list[torch.Size] = []
    smaller.attention.proj.register_forward_hook(lambda m, args, y: seen.append(args[0].shape))
    smaller(TOKENS.float())
    assert seen == [torch.Size([2, 6, 8])]


def test_removing_twice() -> None:
    model = Block(Attention(12, 6))
    for _ in range(2):
        graph = ChannelGraph.trace(model, TOKENS.float())
        model = remove(model, TOKENS.float(), {group.name: [0] for group in graph.groups}, graph)
    assert model.attention.qkv.weight.shape == (3 * 4 * 2, 10)


def group_norm(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(self.n(self.a(x)).relu()).mean((2, 3))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm(groups: int) -> None:
    model = function_module(group_norm, a=nn.Conv2d(3, 16, 3), n=nn.GroupNorm(groups, 16), b=nn.Conv2d(16, 4, 1))
    graph, smaller = check_exact(model, IMAGE)
    assert graph.groups[0].size == 16 // groups
    assert graph.groups[0].in_statistics
    assert smaller.n.num_channels == smaller.a.out_channels


def test_response_normalisation_counts_the_channels_that_are_left() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.a(x)
        size = y.norm(p=2, dim=(2, 3), keepdim=True)
        return self.b(y * (size / (size.mean(1, keepdim=True) + 1e-6))).mean((2, 3))

    check_exact(function_module(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1)), IMAGE)


def test_windows_with_a_position_table_and_a_mask() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention(12, 3)
            self.embed, self.head = nn.Linear(3, 12), nn.Linear(12, 4)
            self.table = nn.Parameter(torch.randn(16 * 16, 3))
            self.register_buffer("where", torch.randperm(256))

        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[0]
            x = torch.roll(self.embed(x.permute(0, 2, 3, 1)), (-2, -2), (1, 2))
            windows = x.view(n, 2, 4, 2, 4, 12).transpose(2, 3).reshape(n * 4, 16, 12)
            q, k, v = self.attention.qkv(windows).reshape(n * 4, 16, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
            scores = q @ k.transpose(-2, -1) + self.table[self.where].view(16, 16, 3).permute(2, 0, 1)
            mask = x.new_zeros(8, 8)
            mask[-2:] = -100.0
            mask = mask.view(2, 4, 2, 4).transpose(1, 2).reshape(4, 1, 1, 16)
            scores = (scores.view(n, 4, 3, 16, 16) + mask).view(n * 4, 3, 16, 16).softmax(-1)
            y = self.attention.proj((scores @ v).transpose(1, 2).reshape(n * 4, 16, 12))
            return self.head(y.reshape(n, 4, 16, 12).mean((1, 2)))

    graph, smaller = check_exact(Windows(), IMAGE)
    assert sorted(group.size for group in graph.groups) == [3, 12, 12], "heads; what they read; what they give"
    assert smaller.table.shape == (256, 2)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [([2, 12], [6, 4], [2, 3, 4]), ([12], [3, 4], [3, 4]), ([2, 3, 4], [24], [2, 3, 4]), ([4, 3], [3, 4], None)],
)
def test_factors(old: list[int], new: list[int], expected: list[int] | None) -> None:
    assert factors(old, new) == expected


def test_types_that_the_code_fixes() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        places = torch.arange(6, dtype=torch.float32).mul(0.7).sin()
        return self.b((self.a(x) + places[:, None]).relu())

    model = function_module(forward, a=nn.Linear(12, 8), b=nn.Linear(8, 3))
    graph = ChannelGraph.trace(model, TOKENS.float())
    assert [group.size for group in graph.groups] == [8]
    remove(model, TOKENS.float(), {"a": [0, 5]}, graph)
