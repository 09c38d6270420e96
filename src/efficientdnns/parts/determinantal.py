"""Determinantal point processes: random subsets that avoid similar items, sampled exactly.

P(Y) = det(L_Y) / det(L + I) for a positive semi-definite L; a k-DPP is the same among subsets of k items,
`Kulesza and Taskar, 2012 <https://arxiv.org/abs/1207.6083>`_.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficientdnns.parts.weight_sets import squared_distances


def gaussian_kernel(vectors: Tensor, beta: float, eps: float = 0.01) -> Tensor:
    r""":math:`L_{ij} = \exp(-\beta \|v_i - v_j\|^2) + \epsilon [i = j]`.

    Args:
        vectors: (n, N), one row an item.
        beta: > 0.
        eps: added to the diagonal, so that no set has probability zero.
    """
    distances = squared_distances(vectors)
    eye = torch.eye(len(vectors), dtype=torch.float64, device=vectors.device)
    return torch.exp(-beta * (distances + distances.T) / 2) + eps * eye


def linear_kernel(vectors: Tensor, eps: float = 0.01) -> Tensor:
    """Inner products of the rows, divided by their mean square, and ``eps`` on the diagonal."""
    vectors = vectors.double()
    gram = vectors @ vectors.T
    eye = torch.eye(len(vectors), dtype=torch.float64, device=vectors.device)
    return gram / gram.diagonal().mean().clamp_min(1e-300) + eps * eye


def expected_size(kernel: Tensor) -> float:
    r"""Mean size of a sample, :math:`\sum_i \lambda_i / (1 + \lambda_i)`."""
    values = torch.linalg.eigvalsh(kernel.double()).clamp_min(0.0)
    return float((values / (1 + values)).sum())


def inclusion_probabilities(kernel: Tensor) -> Tensor:
    """(n,) probability that each item is in a sample: the diagonal of L (L + I)^-1."""
    values, vectors = torch.linalg.eigh(kernel.double())
    values = values.clamp_min(0.0)
    return (vectors.square() * (values / (1 + values))).sum(1)


def log_elementary_symmetric(values: Tensor, k: int) -> Tensor:
    """(n + 1, k + 1): entry (i, r) is the log of e_r, the sum over all products of r of the first i values."""
    logs = values.clamp_min(1e-300).log()
    found = torch.full((len(values) + 1, k + 1), -torch.inf, dtype=torch.float64)
    found[:, 0] = 0.0
    for i in range(1, len(values) + 1):
        found[i, 1:] = torch.logaddexp(found[i - 1, 1:], logs[i - 1] + found[i - 1, :-1])
    return found


def sample(kernel: Tensor, k: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Draw a subset: ascending indices.

    Args:
        kernel: (n, n), symmetric, positive semi-definite.
        k: items of a k-DPP, 0 to n; None draws from the DPP, whose size is random.
        generator: on the CPU.
    """
    values, vectors = torch.linalg.eigh(kernel.double().cpu())
    values = values.clamp_min(0.0)
    if k is None:
        draws = torch.rand(len(values), generator=generator, dtype=torch.float64)
        chosen = draws < values / (1 + values)
    else:
        chosen = _eigenvectors_of_size(values, k, generator)
    return _projection_sample(vectors[:, chosen], generator)


def _eigenvectors_of_size(values: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """Which k eigenvectors span the sample's process."""
    symmetric = log_elementary_symmetric(values, k)
    logs = values.clamp_min(1e-300).log()
    draws = torch.rand(len(values), generator=generator, dtype=torch.float64).tolist()
    chosen = torch.zeros(len(values), dtype=torch.bool)
    left = k
    for i in range(len(values), 0, -1):
        if left == 0:
            break
        share = float(torch.exp(logs[i - 1] + symmetric[i - 1, left - 1] - symmetric[i, left]))
        if left == i or draws[i - 1] < share:
            chosen[i - 1] = True
            left -= 1
    return chosen


def _projection_sample(vectors: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample of the projection process of orthonormal columns (n, k): always k items.

    Items are drawn one after another with probability proportional to the squared distance of their row from the span
    of the rows drawn before (Gram-Schmidt), which is the sampler of Kulesza and Taskar without its changes of basis.
    """
    n, k = vectors.shape
    left = vectors.square().sum(1)
    basis = torch.zeros(n, k, dtype=vectors.dtype)
    items: list[int] = []
    for step in range(k):
        weights = left.clamp_min(0.0)
        weights[items] = 0.0
        item = int(torch.multinomial(weights / weights.sum(), 1, generator=generator))
        row = vectors @ vectors[item] - basis[:, :step] @ basis[item, :step]
        basis[:, step] = row / left[item].clamp_min(1e-300).sqrt()
        left = left - basis[:, step].square()
        items.append(item)
    return torch.tensor(sorted(items), dtype=torch.long)
