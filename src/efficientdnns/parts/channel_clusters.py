"""Grouping weight vectors by the cosine between them, from the bottom up."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Linkage = Literal["complete", "average", "centroid"]
"""Which cosine two clusters have: the least of a pair, the mean of all pairs, or that of their mean directions."""


class Dendrogram:
    """The merges that agglomerative clustering makes of the rows of a matrix, closest first.

    Rows count by direction alone; one of zeros has cosine 0 with all others.

    Args:
        vectors: (n, d).
        linkage: see `Linkage`. 'centroid' works on Euclidean distances of unit vectors, sqrt(2 (1 - cos)), and its
            merges may come closer again; then the closer ones only happen after the farther ones before them.

    Attributes:
        heights: (n - 1,) distance 1 - cosine of each merge.
    """

    def __init__(self, vectors: Tensor, linkage: Linkage = "complete") -> None:
        rows = vectors.detach().double().cpu()
        unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
        self.cosines = unit @ unit.T
        self.count = len(unit)
        self.merges: NDArray[np.int64] = np.empty((0, 2), np.int64)
        self.heights: NDArray[np.float64] = np.empty(0)
        if self.count > 1:
            from scipy.cluster import hierarchy

            pairs = np.triu_indices(self.count, 1)
            distances = (1 - self.cosines.numpy())[pairs].clip(0.0, 2.0)
            if linkage == "centroid":
                tree = hierarchy.linkage(np.sqrt(2 * distances), "centroid")
                self.heights = np.maximum.accumulate(tree[:, 2] ** 2 / 2)
            else:
                tree = hierarchy.linkage(distances, linkage)
                self.heights = np.maximum.accumulate(tree[:, 2])
            self.merges = tree[:, :2].astype(np.int64)

    def merged_at(self, tau: float) -> int:
        """How many merges join clusters of cosine ``tau`` or more; all of them at -1."""
        return self.count - 1 if tau <= -1 else int(np.searchsorted(self.heights, 1 - tau, side="right"))

    def labels(self, merged: int) -> Tensor:
        """(n,) number of the cluster of each row after the first merges, clusters in the order of their first rows."""
        clusters = {i: [i] for i in range(self.count)}
        for step, (a, b) in enumerate(self.merges[:merged].tolist()):
            clusters[self.count + step] = clusters.pop(a) + clusters.pop(b)
        found = torch.empty(self.count, dtype=torch.long)
        for label, members in enumerate(sorted(clusters.values(), key=min)):
            found[members] = label
        return found


def clusters(vectors: Tensor, tau: float, linkage: Linkage = "complete") -> Tensor:
    """(n,) cluster of each row when clusters are joined as long as their cosine is ``tau`` or more."""
    dendrogram = Dendrogram(vectors, linkage)
    return dendrogram.labels(dendrogram.merged_at(tau))


def count_distinct(vectors: Tensor, tau: float = 0.5, linkage: Linkage = "complete") -> int:
    """How many different rows there are: the clusters at ``tau`` in [-1, 1)."""
    if not (-1 <= tau <= 1) or math.isnan(tau):
        from efficientdnns.errors import ConfigurationError

        raise ConfigurationError(f"tau is {tau}, expected a cosine from -1 to 1")
    return int(clusters(vectors.flatten(1), tau, linkage).max()) + 1
