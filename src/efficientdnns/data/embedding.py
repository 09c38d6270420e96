"""Embeddings: one vector a sample, from whatever an encoder returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientdnns.errors import DataError


def embeddings(outputs: Any, inputs: Any) -> Tensor:
    """Embeddings (B, D): a tensor as it is, ``sentence_embedding``, or the mean over the tokens of ``last_hidden_state``.

    The mean leaves out padding: positions where ``attention_mask`` (B, T), an input of that name or the second input, is
    0. Raises `DataError` for outputs that hold none of these.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "sentence_embedding" in outputs:
        return outputs["sentence_embedding"]
    states = getattr(outputs, "last_hidden_state", None)
    if states is None:
        raise DataError(
            f"the encoder returns a {type(outputs).__name__} without last_hidden_state; give the task "
            "forward=, a function (model, inputs) -> embeddings (B, D)"
        )
    if isinstance(inputs, Mapping):
        mask = inputs.get("attention_mask")
    else:
        mask = inputs[1] if isinstance(inputs, tuple) and len(inputs) > 1 else None
    if mask is None:
        return states.mean(1)
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def cosine_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 - cosine similarity of embeddings (B, D), mean over the batch."""
    return 1 - F.cosine_similarity(outputs, targets.to(outputs.dtype)).mean()


def cosine_similarity(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Sum of the cosine similarities of a batch, and its size."""
    return torch.cosine_similarity(outputs.double(), targets.double()).sum(), len(targets)
