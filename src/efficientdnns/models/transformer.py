"""Generated transformers of any size: one class from a million to a billion parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.errors import ModelError


class Size(NamedTuple):
    """Width and depth of a transformer of a certain size."""

    width: int
    depth: int


SIZES: dict[str, Size] = {
    "1m": Size(96, 6),
    "10m": Size(256, 12),
    "50m": Size(512, 15),
    "100m": Size(768, 13),
    "300m": Size(1024, 23),
    "1b": Size(2048, 20),
}
"""Sizes by name; with the default vocabulary they have about as many parameters as the name says."""


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, width) -> (B, T, width): one projection to queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)) with GELU and four times the width."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Token ids (B, T) to logits (B, T, ``vocabulary``): a causal decoder, or an encoder with ``causal=False``.

    A block has 12 width^2 weights. ``tied`` makes the embedding the head's weight; ``classes`` in place of a vocabulary
    at the output gives logits (B, classes) of the mean over positions.
    """

    def __init__(
        self,
        vocabulary: int = 2048,
        width: int = 256,
        depth: int = 4,
        heads: int | None = None,
        context: int = 128,
        causal: bool = True,
        tied: bool = False,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        heads = max(1, width // 64) if heads is None else heads
        if width % heads:
            raise ModelError(f"width {width} does not divide into {heads} heads; choose a multiple")
        if tied and classes is not None:
            raise ModelError("tied=true ties the embedding to a head over the vocabulary; leave out classes")
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary if classes is None else classes, bias=False)
        self.pooled = classes is not None
        for weight in (self.embedding.weight, self.position.weight):
            nn.init.normal_(weight, std=0.02)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.blocks(self.embedding(tokens) + self.position(positions)))
        return self.head(x.mean(1) if self.pooled else x)
