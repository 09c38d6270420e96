"""Gates: stochastic or learned switches on structures."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class HardConcrete(nn.Module):
    r"""Gates in [0, 1] with point masses at 0 and 1, `Louizos et al., 2018 <https://arxiv.org/abs/1712.01312>`_.

    .. math::
        s = \sigma((\log u - \log(1-u) + \log\alpha)/\beta), \quad z = \min(1, \max(0, s(\zeta-\gamma)+\gamma)),
        \quad u \sim U(\epsilon, 1-\epsilon)

    In training mode ``forward`` samples, in eval mode it gives the deterministic
    :math:`\hat z = \min(1, \max(0, \sigma(\log\alpha)(\zeta-\gamma)+\gamma))`.

    Args:
        size: number of gates.
        drop_rate: p in (0, 1); :math:`\log\alpha \sim N(\log\frac{1-p}{p}, 0.01^2)`.
        beta: temperature in (0, 1).
        gamma: lower end of the stretched interval, < 0.
        zeta: upper end, > 1.
    """

    LOWEST, HIGHEST = math.log(1e-2), math.log(1e2)
    EPSILON = 1e-6

    def __init__(
        self, size: int, drop_rate: float = 0.5, beta: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1
    ) -> None:
        super().__init__()
        self.beta, self.gamma, self.zeta = beta, gamma, zeta
        self.log_alpha = nn.Parameter(torch.randn(size) * 0.01 + math.log((1 - drop_rate) / drop_rate))

    def forward(self, samples: int | None = None) -> Tensor:
        """Gate values: (size,), or (samples, size) independent draws in training mode."""
        return self.sample(samples) if self.training else self.deterministic()

    def sample(self, samples: int | None = None) -> Tensor:
        """One draw of all gates, or ``samples`` of them; drawn in float32 whatever the precision of the run."""
        shape = self.log_alpha.shape if samples is None else (samples, *self.log_alpha.shape)
        log_alpha = self.log_alpha.float()
        u = torch.empty(shape, device=log_alpha.device).uniform_(self.EPSILON, 1 - self.EPSILON)
        return self._stretch(torch.sigmoid((u.logit() + log_alpha) / self.beta))

    def deterministic(self, shift: float = 0.0, lowest: float = -math.inf) -> Tensor:
        """The test-time gates, with ``shift`` added to log alpha, and where that is below ``lowest`` that instead."""
        return self._stretch(torch.sigmoid((self.log_alpha + shift).clamp_min(lowest)))

    @property
    def threshold(self) -> float:
        r"""Log alpha up to which a test-time gate is closed: :math:`\log(-\gamma / \zeta)`."""
        return math.log(-self.gamma / self.zeta)

    def probability_open(self) -> Tensor:
        r"""Probability that each gate is not zero: :math:`\sigma(\log\alpha - \beta\log(-\gamma/\zeta))`."""
        return torch.sigmoid(self.log_alpha - self.beta * math.log(-self.gamma / self.zeta))

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep log alpha in [log 0.01, log 100]; call it after every optimizer step."""
        self.log_alpha.clamp_(self.LOWEST, self.HIGHEST)

    def _stretch(self, s: Tensor) -> Tensor:
        return (s * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)
