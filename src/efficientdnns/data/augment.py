"""Augmentation of whole batches: a few tensor operations for all images at once, driven by one generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientdnns.data.split import Augment


def random_crop(padding: int, value: float = 0.0) -> Augment:
    """Pad images (B, C, H, W) with ``value`` by ``padding`` pixels on each side and cut H x W windows at independent offsets.

    The offsets are drawn as one ``randint(0, 2 * padding + 1, (2, B))``: rows first, then columns.
    """

    def crop(images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        dy, dx = torch.randint(0, 2 * padding + 1, (2, count), generator=generator).to(images.device)
        windows = F.pad(images, (padding,) * 4, value=value).unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(count, device=images.device), :, dy, dx]

    return crop


def random_flip(probability: float = 0.5) -> Augment:
    """Mirror each image (B, C, H, W) left to right with ``probability``, drawn as one ``rand(B)``."""

    def flip(images: Tensor, generator: torch.Generator) -> Tensor:
        chosen = (torch.rand(len(images), generator=generator) < probability).to(images.device)
        return torch.where(chosen[:, None, None, None], images.flip(-1), images)

    return flip


def compose(*functions: Augment) -> Augment:
    """The functions one after the other, sharing the generator."""

    def chain(inputs: Any, generator: torch.Generator) -> Any:
        for function in functions:
            inputs = function(inputs, generator)
        return inputs

    return chain
