"""Multi-head attention as four linear layers, so that what works on linear layers works on it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.surgery import rebuildable, replace_module


@rebuildable
class SplitAttention(nn.Module):
    """What ``nn.MultiheadAttention`` computes, with queries, keys, values and outputs from linear layers of their own.

    It is called as that module is, and returns the same pair.
    """

    def __init__(
        self, width: int, heads: int, dropout: float = 0.0, bias: bool = True, batch_first: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.batch_first = heads, dropout, batch_first
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias) for _ in range(4))

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> SplitAttention:
        """The same attention, with the same weights."""
        assert module.in_proj_weight is not None
        bias = module.in_proj_bias is not None
        new = cls(module.embed_dim, module.num_heads, module.dropout, bias, module.batch_first)
        layers = new.query, new.key, new.value
        with torch.no_grad():
            for layer, weight in zip(layers, module.in_proj_weight.chunk(3), strict=True):
                layer.weight = nn.Parameter(weight.detach().clone(), module.in_proj_weight.requires_grad)
            if module.in_proj_bias is not None:
                for layer, shift in zip(layers, module.in_proj_bias.chunk(3), strict=True):
                    layer.bias = nn.Parameter(shift.detach().clone(), module.in_proj_bias.requires_grad)
        new.out.weight, new.out.bias = module.out_proj.weight, module.out_proj.bias
        return new.train(module.training)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "width": self.query.in_features,
            "heads": self.heads,
            "dropout": self.dropout,
            "bias": self.query.bias is not None,
            "batch_first": self.batch_first,
        }

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Inputs (batch, tokens, width), or tokens first, or without a batch; see ``nn.MultiheadAttention``."""
        single = query.dim() == 2
        inputs = [
            x.unsqueeze(0) if single else x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)
        ]
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in zip((self.query, self.key, self.value), inputs, strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = F.dropout(weights, self.dropout, self.training) @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if single else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        y = self.out(y.transpose(1, 2).flatten(2))
        return (y.squeeze(0) if single else y if self.batch_first else y.transpose(0, 1)), weights

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores: (batch or 1, heads or 1, queries, keys)."""
        total: Tensor | None = None
        for given in (mask, padding):
            if given is None:
                continue
            added = given
            if given.dtype == torch.bool:
                added = torch.zeros_like(given, dtype=q.dtype).masked_fill(given, -torch.inf)
            if given is padding:
                added = added.view(-1, 1, 1, k.shape[2])
            elif added.dim() == 3:
                added = added.view(-1, self.heads, *added.shape[1:])
            total = added if total is None else total + added
        return total


def split_attention(model: nn.Module, names: list[str] | None = None) -> list[str]:
    """Put `SplitAttention` in the place of every ``nn.MultiheadAttention`` that is called as a module; returns their names.

    Left alone are those whose queries, keys and values differ in width, that append to keys and values, and those inside
    torch's own transformer layers, which read their weights themselves.
    """
    fused = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    inside = {id(part) for module in model.modules() if isinstance(module, fused) for part in module.modules()}
    found = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention
        and id(module) not in inside
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
        and (names is None or name in names)
    ]
    for name in found:
        module = model.get_submodule(name)
        assert isinstance(module, nn.MultiheadAttention)
        replace_module(model, name, SplitAttention.of(module))
    return found
