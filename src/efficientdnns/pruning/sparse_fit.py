"""Training of sparse autoencoders: squared error, rarely active hidden units, small or non-negative weights."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from efficientdnns.errors import ConfigurationError, suggest
from efficientdnns.fit import Fit
from efficientdnns.session import Session
from efficientdnns.training import Callback, Trainer

NonNegative = Annotated[float, Field(ge=0)]


def bernoulli_divergence(target: float, means: Tensor) -> Tensor:
    r""":math:`\sum_r p \log\frac{p}{q_r} + (1-p) \log\frac{1-p}{1-q_r}` of mean activations q in (0, 1); 0 where q = p."""
    q = means.clamp(1e-6, 1 - 1e-6)
    return (target * (target / q).log() + (1 - target) * ((1 - target) / (1 - q)).log()).sum()


def negative_squares(weight: Tensor) -> Tensor:
    r""":math:`\sum \phi(w)` with :math:`\phi(w) = w^2` for w < 0, else 0."""
    return weight.clamp_max(0.0).square().sum()


class SparseFit(Fit):
    r"""Training of an autoencoder with sparse hidden activations (SAE), or with non-negative weights as well (NCAE).

    .. math:: J = \frac{1}{m} \sum \frac12 \|\hat x - x\|^2 + \beta \sum_r KL(p \| \hat p_r)
              + \frac{\lambda}{2} \sum w^2 + \frac{\alpha}{2} \sum_{w < 0} w^2

    where :math:`\hat p_r` is the mean activation of hidden unit r on the batch.
    """

    name: ClassVar[str] = "sparse-fit"

    layer: str | None = None
    """The layer whose inputs are the hidden activations; None takes the last linear layer."""
    activity: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """p: the mean activation that is aimed at."""
    beta: NonNegative = 3.0
    """Weight of the divergence from it."""
    weight_penalty: NonNegative = 0.003
    """lambda: of all squared weights."""
    negative_penalty: NonNegative = 0.0
    """alpha: of the squares of negative weights; the NCAE has this in place of lambda."""

    def check(self, session: Session) -> None:
        super().check(session)
        if session.task.kind != "regression":
            raise ConfigurationError(f"{self.name} needs a task of kind regression, this one is {session.task.kind}")
        linear = [name for name, module in session.model.named_modules() if isinstance(module, nn.Linear)]
        if not linear or (self.layer is not None and self.layer not in linear):
            raise ConfigurationError(
                f"{self.name}: layer is '{self.layer}', no linear layer{suggest(str(self.layer), linear)}"
            )

    def settings(self) -> dict[str, Any]:
        return {"weight_decay": 0.0} | super().settings()

    def callback(self, session: Session) -> Callback:
        return SparseActivity(self)


class SparseActivity(Callback):
    """Turns the mean squared error into J."""

    def __init__(self, method: SparseFit) -> None:
        self.method = method
        self.activations: Tensor | None = None

    def setup(self, trainer: Trainer) -> None:
        linear = {name: module for name, module in trainer.model.named_modules() if isinstance(module, nn.Linear)}
        layer = linear[self.method.layer or list(linear)[-1]]
        self.handle = layer.register_forward_pre_hook(self._read)

    def _read(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.activations = inputs[0]

    def task_loss(self, trainer: Trainer, batch: Any, outputs: Tensor, loss: Tensor) -> Tensor:
        return loss * (outputs[0].numel() / 2)

    def penalty(self, trainer: Trainer) -> Tensor | None:
        assert self.activations is not None
        method, weights = self.method, [p for p in trainer.model.parameters() if p.dim() > 1]
        total = method.beta * bernoulli_divergence(method.activity, self.activations.flatten(0, -2).mean(0))
        if method.weight_penalty:
            total = total + method.weight_penalty / 2 * torch.stack([w.square().sum() for w in weights]).sum()
        if method.negative_penalty:
            total = total + method.negative_penalty / 2 * torch.stack([negative_squares(w) for w in weights]).sum()
        return total

    def finish(self, trainer: Trainer) -> None:
        self.handle.remove()
        self.activations = None
