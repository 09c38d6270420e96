"""Constraint sets and the nearest point of each: what loops of a learning and a compression step project onto."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from efficientdnns.parts.select import largest_mask


class ConstraintSet(ABC):
    """A set of tensors with a Euclidean projection. Projections return new tensors and are idempotent."""

    @abstractmethod
    def project(self, tensor: Tensor) -> Tensor:
        """The point of the set that is nearest to ``tensor`` (one of them where several are)."""


class SparsitySet(ConstraintSet):
    """Tensors that are zero outside some mask: the projection keeps what it keeps exactly and never adds non-zeros."""

    @abstractmethod
    def mask(self, tensor: Tensor) -> Tensor:
        """Boolean mask, shaped like ``tensor``, of the entries that the projection keeps."""

    def project(self, tensor: Tensor) -> Tensor:
        return torch.where(self.mask(tensor), tensor, torch.zeros_like(tensor))


@dataclass(frozen=True)
class LargestEntries(SparsitySet):
    """Tensors with at most ``keep`` non-zero entries: the ``keep`` of largest magnitude stay."""

    keep: int

    def mask(self, tensor: Tensor) -> Tensor:
        return largest_mask(tensor.abs(), self.keep)


@dataclass(frozen=True)
class LargestRows(SparsitySet):
    """Tensors with at most ``keep`` non-zero rows (filters) along ``dim``: those of largest L2 norm stay."""

    keep: int
    dim: int = 0

    def mask(self, tensor: Tensor) -> Tensor:
        rows = tensor.movedim(self.dim, 0)
        kept = largest_mask(rows.flatten(1).norm(dim=1), self.keep)
        shape = [1] * tensor.dim()
        shape[self.dim] = -1
        return kept.view(shape).expand_as(tensor)


@dataclass(frozen=True)
class LargestInGroups(SparsitySet):
    """N:M sparsity: in every run of ``m`` entries along ``dim`` (input channels) the ``n`` of largest magnitude stay.

    Where m does not divide the dimension, the last run is shorter and keeps at most n as well.
    """

    n: int
    m: int
    dim: int = 1

    def mask(self, tensor: Tensor) -> Tensor:
        return largest_in_runs(tensor.abs(), self.n, self.m, self.dim)


def largest_in_runs(scores: Tensor, n: int, m: int, dim: int = 1) -> Tensor:
    """Boolean mask of the n highest scores in every run of m entries along ``dim``; ties go to the lower index."""
    scores = scores.movedim(dim, -1)
    length = scores.shape[-1]
    # Padding below every score is never chosen before a real entry.
    padded = torch.nn.functional.pad(scores, (0, -length % m), value=-torch.inf)
    groups = padded.unflatten(-1, (-1, m))
    order = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
    return mask.flatten(-2)[..., :length].movedim(-1, dim)


@dataclass(frozen=True)
class Levels(ConstraintSet):
    """Tensors whose entries are among ``levels``: each entry goes to the nearest, at a tie to the lower one.

    Without the level 0 the projection turns zeros into non-zeros.
    """

    levels: tuple[float, ...]

    def project(self, tensor: Tensor) -> Tensor:
        levels = torch.tensor(sorted(self.levels), dtype=tensor.dtype, device=tensor.device)
        middles = (levels[1:] + levels[:-1]) / 2
        return levels[torch.bucketize(tensor, middles)]
