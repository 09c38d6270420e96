"""Masks inside a training run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from efficientdnns.training.callback import Callback

if TYPE_CHECKING:
    from efficientdnns.training.trainer import Trainer


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the masked-out entries of the named parameters to exactly zero."""
    for name, mask in masks.items():
        # Adding zero turns -0.0 into 0.0, which is another bit pattern and would have to be stored.
        model.get_parameter(name).mul_(mask).add_(0.0)


class MaskedTraining(Callback):
    """Keeps ``masks`` (by parameter name) in force: masked weights stay exactly zero in spite of momentum and decay."""

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self.masks = dict(masks or {})

    def setup(self, trainer: Trainer) -> None:
        self.masks = {name: mask.to(trainer.device) for name, mask in self.masks.items()}
        apply_masks(trainer.model, self.masks)

    def after_backward(self, trainer: Trainer) -> None:
        for name, mask in self.masks.items():
            gradient = trainer.model.get_parameter(name).grad
            if gradient is not None:
                gradient.mul_(mask)

    def after_step(self, trainer: Trainer) -> None:
        apply_masks(trainer.model, self.masks)


class KeepZeros(MaskedTraining):
    """Masks the zeros that the named parameters have when the run starts; names that are gone are passed over."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = sorted(names)

    def setup(self, trainer: Trainer) -> None:
        parameters = dict(trainer.model.named_parameters())
        self.masks = {
            name: (parameters[name] != 0).to(parameters[name].dtype) for name in self.names if name in parameters
        }
        super().setup(trainer)
