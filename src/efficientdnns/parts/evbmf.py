"""The rank of a noisy matrix by analytic variational Bayes, without a knob."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Evbmf(NamedTuple):
    """The analytic solution of variational Bayesian matrix factorisation."""

    rank: int
    u: Tensor
    """Left singular vectors that are kept, (L, rank)."""
    values: Tensor
    """Shrunken singular values d_h < gamma_h, (rank,)."""
    vh: Tensor
    """Right singular vectors that are kept, (rank, M)."""
    sigma2: float
    """Noise variance."""


def evbmf(matrix: Tensor, sigma2: float | None = None) -> Evbmf:
    r"""Rank of a noisy matrix, `Nakajima et al., JMLR 2013 <https://jmlr.org/papers/v14/nakajima13a.html>`_.

    A singular value :math:`\gamma_h` of V (L x M, L <= M, :math:`\alpha = L/M`) is signal if
    :math:`\gamma_h > \sqrt{M \sigma^2 x}` with :math:`x = (1+\tau)(1+\alpha/\tau)` and
    :math:`\tau \approx 2.5129\sqrt\alpha`;
    it is shrunken to :math:`d_h = \frac{\gamma_h}{2}\left[b + \sqrt{b^2 - 4LM\sigma^4/\gamma_h^4}\right]`,
    :math:`b = 1 - (L+M)\sigma^2/\gamma_h^2`.

    Args:
        matrix: any shape (rows, columns); it is transposed where there are more rows than columns.
        sigma2: variance of the noise; None takes the one that minimises the free energy.
    """
    if matrix.shape[0] > matrix.shape[1]:
        flipped = evbmf(matrix.T, sigma2)
        return flipped._replace(u=flipped.vh.T, vh=flipped.u.T)
    rows, columns = matrix.shape
    u, gamma, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    alpha = rows / columns
    tau = 2.5129 * math.sqrt(alpha)
    x_low = (1 + tau) * (1 + alpha / tau)
    if sigma2 is None:
        sigma2 = _noise_variance(gamma, columns, x_low)
    rank = int((gamma > math.sqrt(columns * sigma2 * x_low)).sum())
    kept = gamma[:rank]
    b = 1 - (rows + columns) * sigma2 / kept**2
    values = kept / 2 * (b + torch.sqrt(b**2 - 4 * rows * columns * sigma2**2 / kept**4))
    return Evbmf(rank, u[:, :rank], values, vh[:rank], sigma2)


def free_energy(sigma2: float, gamma: Tensor, columns: int, x_low: float) -> float:
    r""":math:`\Omega(\sigma^2) = \sum_h \psi(\gamma_h^2 / M\sigma^2)` over all L singular values, up to a constant.

    :math:`\psi(x) = x - \log x`, and for :math:`x > x_{low}` also
    :math:`\log(\tau+1) + \alpha\log(\tau/\alpha+1) - \tau` with
    :math:`\tau(x) = \frac12\left(x-(1+\alpha)+\sqrt{(x-(1+\alpha))^2-4\alpha}\right)`.
    """
    alpha = len(gamma) / columns
    x = gamma.square() / (columns * sigma2)
    above = x[x > x_low] - (1 + alpha)
    tau = (above + torch.sqrt(above**2 - 4 * alpha)) / 2
    signal = torch.log(tau + 1) + alpha * torch.log(tau / alpha + 1) - tau
    return float((x - torch.log(x)).sum() + signal.sum())


def _noise_variance(gamma: Tensor, columns: int, x_low: float) -> float:
    from scipy.optimize import minimize_scalar

    # Exact zeros (a matrix of lower rank) have no logarithm; far below the noise they change nothing.
    gamma = gamma.clamp_min(max(1e-8 * float(gamma[0]), 1e-150))
    rows = len(gamma)
    tail = gamma[min(math.ceil(rows / (1 + rows / columns)) - 1, rows - 1) :].square()
    upper = float(gamma.square().mean()) / columns
    lower = min(max(float(tail[0]) / (columns * x_low), float(tail.mean()) / columns), upper)
    # Searched in units of the upper bound, which makes the rank independent of the scale of the matrix.
    scaled = gamma / math.sqrt(upper)
    found = minimize_scalar(
        free_energy,
        args=(scaled, columns, x_low),
        bounds=(lower / upper, 1.0),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(found.x) * upper
