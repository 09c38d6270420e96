"""Ensembles of specialists: one network that knows all classes, and many that tell a few similar ones apart.

Section 5 of `Hinton et al., 2015 <https://arxiv.org/abs/1503.02531>`_, for data with very many classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.errors import ConfigurationError


def cluster_classes(
    probabilities: Tensor, specialists: int, classes_per_specialist: int, seed: int = 0
) -> list[list[int]]:
    """Sets S_m of classes that the generalist confuses: K-means on the columns of the covariance of its predictions.

    Each of the ``specialists`` clusters takes the ``classes_per_specialist`` columns nearest to its centre, so sets may
    overlap. Without labels.

    Args:
        probabilities: the generalist's distributions, (samples, classes).
        specialists: M, up to the number of classes.
        classes_per_specialist: size of a set, up to the number of classes.
        seed: start of K-means.
    """
    from sklearn.cluster import KMeans

    classes = probabilities.shape[1]
    for name, value in (("specialists", specialists), ("classes_per_specialist", classes_per_specialist)):
        if not 1 <= value <= classes:
            raise ConfigurationError(f"{name} is {value}, expected 1 to {classes} (the number of classes)")
    columns = torch.cov(probabilities.double().T).cpu()
    fitted = KMeans(specialists, n_init=10, random_state=seed).fit(columns.numpy())
    distance = torch.cdist(torch.from_numpy(fitted.cluster_centers_), columns)
    return [sorted(row.topk(classes_per_specialist, largest=False).indices.tolist()) for row in distance]


def relabel(labels: Tensor, subset: Sequence[int]) -> Tensor:
    """Labels for a specialist: position in its ``subset``, or ``len(subset)``, the dustbin class."""
    positions = torch.full((int(max(int(labels.max()), *subset)) + 1,), len(subset), dtype=torch.long)
    positions[torch.tensor(list(subset))] = torch.arange(len(subset))
    return positions.to(labels.device)[labels]


def specialist_samples(labels: Tensor, subset: Sequence[int], generator: torch.Generator) -> tuple[Tensor, float]:
    """Indices of a training set for a specialist, half of it its own classes, and the over-sampling factor rho.

    All n samples of the ``subset`` and n drawn from the rest (with replacement where there are fewer). rho is the
    factor by which the share of the subset against the rest exceeds that of the whole set.
    """
    own = torch.isin(labels, torch.tensor(list(subset), device=labels.device))
    inside, outside = own.nonzero().flatten().cpu(), (~own).nonzero().flatten().cpu()
    if len(inside) == 0 or len(outside) == 0:
        raise ConfigurationError(f"classes {list(subset)} are none or all of the samples; choose another subset")
    if len(outside) >= len(inside):
        rest = outside[torch.randperm(len(outside), generator=generator)[: len(inside)]]
    else:
        rest = outside[torch.randint(len(outside), (len(inside),), generator=generator)]
    return torch.cat([inside, rest]), len(outside) / len(inside)


def specialist_from(generalist: nn.Module, head: str, subset: Sequence[int]) -> nn.Module:
    """A copy of the generalist whose linear layer ``head`` is cut to the ``subset`` and a dustbin class.

    The dustbin starts as the mean of the other classes' weights.
    """
    specialist = copy.deepcopy(generalist)
    old = generalist.get_submodule(head)
    if not isinstance(old, nn.Linear) or old.out_features <= len(subset):
        size = len(subset)
        raise ConfigurationError(f"'{head}' is no linear layer over more than {size} classes; name the output layer")
    inside = torch.tensor(list(subset), device=old.weight.device)
    outside = torch.isin(torch.arange(old.out_features, device=old.weight.device), inside, invert=True)
    new = nn.Linear(old.in_features, len(subset) + 1, old.bias is not None).to(old.weight)
    with torch.no_grad():
        new.weight.copy_(torch.cat([old.weight[inside], old.weight[outside].mean(0, keepdim=True)]))
        if old.bias is not None:
            new.bias.copy_(torch.cat([old.bias[inside], old.bias[outside].mean(0, keepdim=True)]))
    specialist.set_submodule(head, new)
    return specialist.requires_grad_(True)


def dustbin_correction(logits: Tensor, rho: float) -> Tensor:
    """Specialist logits (B, |S| + 1) with log(rho) added to the dustbin; rho > 0 is the over-sampling factor of S."""
    corrected = logits.clone()
    corrected[:, -1] += math.log(rho)
    return corrected


def combination_objective(
    z: Tensor, general: Tensor, special: Sequence[Tensor], members: Tensor, active: Tensor
) -> Tensor:
    r""":math:`\mathrm{KL}(p_g, q) + \sum_{m \in A_k} \mathrm{KL}(p_m, q)` of each sample, q = softmax(z).

    q's mass outside S_m meets the dustbin of p_m. ``general`` (B, C), ``special[m]`` (B, |S_m| + 1), ``members``
    (M, C) of booleans, ``active`` (B, M) of booleans.
    """
    log_q = z.log_softmax(1)
    total = F.kl_div(log_q, general, reduction="none").sum(1)
    for m, p in enumerate(special):
        dustbin = log_q[:, ~members[m]].logsumexp(1, keepdim=True)
        divergence = F.kl_div(torch.cat([log_q[:, members[m]], dustbin], 1), p, reduction="none").sum(1)
        total = total + divergence * active[:, m]
    return total


def combine(
    general: Tensor, special: Sequence[Tensor], members: Tensor, active: Tensor, steps: int, rate: float = 1.0
) -> Tensor:
    """Distributions q (B, C) that agree best with all: ``steps`` of gradient descent on z from log p_g, at T = 1.

    The step size ``rate / (1 + active specialists)`` with rate <= 4 lets `combination_objective` fall in every step:
    its curvature is at most half of the number of terms. Samples without active specialists keep p_g.
    """
    z = general.clamp(min=1e-12).log()
    terms = 1 + active.sum(1, keepdim=True)
    for _ in range(steps):
        q = z.softmax(1)
        gradient = terms * q - general
        for m, p in enumerate(special):
            share = q * ~members[m]
            target = share / share.sum(1, keepdim=True).clamp(min=1e-12) * p[:, -1:]
            target[:, members[m]] = p[:, :-1]
            gradient -= target * active[:, m : m + 1]
        z = z - rate / terms * gradient
    return torch.where(active.any(1, keepdim=True), z.softmax(1), general)


class SpecialistEnsemble(nn.Module):
    """A generalist over C classes and specialists over ``subsets`` plus a dustbin, as one classifier.

    For each input the generalist's ``top`` classes choose the specialists whose subset holds one of them; `combine`
    merges their distributions. Returns log-probabilities (B, C), which serve as logits.

    Args:
        generalist: a network of C outputs.
        specialists: networks of |S_m| + 1 outputs, the dustbin last, in the order of ``subsets``.
        subsets: the sets S_m, each in rising order.
        oversampling: rho of each specialist for `dustbin_correction`; 1 corrects nothing.
        top: n, how many of the generalist's classes choose specialists.
        steps: gradient steps for each input.
        rate: step size, in (0, 4].
    """

    members: Tensor

    def __init__(
        self,
        generalist: nn.Module,
        specialists: Sequence[nn.Module],
        subsets: Sequence[Sequence[int]],
        classes: int,
        oversampling: Sequence[float] | None = None,
        top: int = 1,
        steps: int = 100,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        if len(specialists) != len(subsets):
            raise ConfigurationError(f"{len(specialists)} specialists and {len(subsets)} subsets; give one subset each")
        for subset in subsets:
            if list(subset) != sorted(set(subset)) or not 0 < len(subset) < classes or subset[-1] >= classes:
                raise ConfigurationError(f"subset {list(subset)} is no rising list of some classes below {classes}")
        self.generalist, self.specialists = generalist, nn.ModuleList(specialists)
        self.oversampling = list(oversampling) if oversampling is not None else [1.0] * len(subsets)
        self.top, self.steps, self.rate = top, steps, rate
        members = torch.zeros(len(subsets), classes, dtype=torch.bool)
        for row, subset in zip(members, subsets):
            row[list(subset)] = True
        self.register_buffer("members", members)

    def forward(self, x: Tensor) -> Tensor:
        general = self.generalist(x).softmax(1)
        chosen = general.topk(self.top, dim=1).indices
        active = self.members.T[chosen].any(1)
        special = [
            dustbin_correction(specialist(x), rho).softmax(1)
            for specialist, rho in zip(self.specialists, self.oversampling)
        ]
        q = combine(general, special, self.members, active, self.steps, self.rate)
        return q.clamp(min=1e-12).log()
