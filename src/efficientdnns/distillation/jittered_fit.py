"""Plain training on shifted images with a limit on each unit's weights: how Hinton's MNIST teacher is regularised."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from efficientdnns.data.split import Batch, generator
from efficientdnns.fit import Fit
from efficientdnns.session import Session
from efficientdnns.training import Callback, Trainer


def jitter(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each moved by up to ``pixels`` in both directions; the edge is the batch's darkest value."""
    count, _, height, width = images.shape
    dy, dx = torch.randint(0, 2 * pixels + 1, (2, count), generator=generator).to(images.device)
    padded = F.pad(images, (pixels,) * 4, value=float(images.min()))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count, device=images.device), :, dy, dx]


@torch.no_grad()
def limit_norms(model: nn.Module, limit: float) -> None:
    """Scale the incoming weights of every unit of a linear layer down to L2 norm ``limit`` where they exceed it."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(limit / module.weight.norm(dim=1, keepdim=True).clamp(min=limit))


class JitteredFit(Fit):
    """Ordinary training on images that are moved at random, with max-norm constraints: a well regularised teacher.

    Like `Fit` it makes the dense network when it comes first: the original, and so the teacher, is what it has trained.
    """

    name: ClassVar[str] = "jittered-fit"
    kind: ClassVar[str] = "training"

    pixels: NonNegativeInt = 2
    """Largest shift in each direction."""
    max_norm: PositiveFloat | None = None
    """Largest L2 norm of the incoming weights of a unit; None sets no limit."""

    def callback(self, session: Session) -> Callback:
        return Jitter(self)


class Jitter(Callback):
    """Moves the images of every batch, by numbers that depend on (seed, step) alone."""

    def __init__(self, method: JitteredFit) -> None:
        self.method = method

    def batch(self, trainer: Trainer, batch: Batch) -> Batch:
        numbers = generator(trainer.seed, trainer.step, trainer.accelerator.process_index)
        inputs: Any = jitter(batch.inputs, self.method.pixels, numbers)
        return Batch(inputs, batch.targets, batch.indices)

    def after_step(self, trainer: Trainer) -> None:
        if self.method.max_norm is not None:
            limit_norms(trainer.model, self.method.max_norm)
