"""Proximal steps of a penalty on factors: what makes them exactly zero, where a gradient step would only make them small."""

from __future__ import annotations

import torch
from torch import Tensor

from efficientdnns.training import Trainer
from efficientdnns.training.schedule import factor


def soft_threshold(values: Tensor, threshold: float | Tensor) -> Tensor:
    r"""The proximal operator of the L1 norm, :math:`S_a(v) = \mathrm{sign}(v) \max(|v| - a, 0)`; zeros are exact."""
    return values - values.clamp(-torch.as_tensor(threshold), torch.as_tensor(threshold))


def ista_step(values: Tensor, gradient: Tensor, rate: float, strength: float | Tensor) -> Tensor:
    r"""One step of iterative shrinkage and thresholding, :math:`S_{\eta\rho}(v - \eta g)`.

    Args:
        values: v.
        gradient: g, of the loss without the penalty.
        rate: :math:`\eta`, the learning rate in force.
        strength: :math:`\rho \ge 0`, of the L1 penalty.
    """
    return soft_threshold(values - rate * gradient, rate * strength)


def apg_step(
    values: Tensor,
    gradient: Tensor,
    velocity: Tensor,
    rate: float,
    strength: float | Tensor,
    momentum: float = 0.9,
    nonnegative: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""One step of the accelerated proximal gradient in momentum form, with one gradient a step at the current values.

    .. math::
        z = \lambda - \eta g, \quad v' = S_{\eta\gamma}(z) - \lambda + \mu v, \quad
        \lambda' = \max(S_{\eta\gamma}(z) + \mu v', 0)

    The velocity accumulates displacements, not gradients, and is kept where the clamp holds a value at zero.

    Args:
        values: :math:`\lambda`.
        gradient: g, of the loss without the penalty.
        velocity: v, zero before the first step.
        rate: :math:`\eta`.
        strength: :math:`\gamma \ge 0`.
        momentum: :math:`\mu`; with 0 this is `ista_step`.
        nonnegative: clamp at zero.

    Returns:
        The new values and the new velocity.
    """
    proximal = ista_step(values, gradient, rate, strength)
    velocity = proximal - values + momentum * velocity
    moved = proximal + momentum * velocity
    return (moved.clamp_min(0.0) if nonnegative else moved), velocity


def total_rate(trainer: Trainer, peak: float | None = None) -> float:
    r"""Sum of the learning rates of all steps of a run, :math:`\sum_t \eta_t`.

    Times the strength of the penalty it is the most by which thresholding alone can shrink a factor over the run: a
    factor that starts higher cannot come to zero unless the loss helps.

    Args:
        trainer: of the run, before its first step.
        peak: peak learning rate, by default that of the run.
    """
    settings, steps = trainer.settings, trainer.total_steps
    warmup = min(1.0, settings.warmup_epochs * trainer.steps_per_epoch / steps)
    shares = (factor(settings.schedule, step / steps, warmup) for step in range(steps))
    return (peak or settings.learning_rate) * sum(shares)
