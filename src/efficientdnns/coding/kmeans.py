"""One-dimensional k-means, for weight sharing.

Minimises ``sum_i sum_{w in cluster i} (w - c_i)**2`` by Lloyd's iterations. In one dimension the clusters are intervals
of the sorted values, so an iteration costs ``O(k log n)``: cut at the midpoints between centroids and take means from
prefix sums. The cost never rises.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigurationError, DataError, suggest

Initialization = Literal["linear", "density", "random"]


class Clustering(NamedTuple):
    """Centroids [k'], ascending, in the dtype of the values, and for every value the index of its centroid (int64,
    shape of the values).
    """

    centroids: Tensor
    assignments: Tensor


def initial_centroids(values: Tensor, clusters: int, init: Initialization = "linear", seed: int = 0) -> Tensor:
    """Return ``clusters`` ascending starting centroids as float64.

    ``linear``: evenly spaced from the smallest to the largest value (the best choice for pruned weights: large weights
    are few but matter); ``density``: quantiles, equally many values to each; ``random`` (Forgy): values drawn without
    replacement.
    """
    flat = _sorted_values(values)
    if clusters < 1:
        raise ConfigurationError(f"clusters is {clusters}; use 1 or more")
    return torch.from_numpy(_start(flat, clusters, init, seed))


def kmeans_1d(
    values: Tensor,
    clusters: int,
    init: Initialization = "linear",
    iterations: int = 100,
    tolerance: float = 0.0,
    seed: int = 0,
) -> Clustering:
    """Cluster ``values`` (any shape, at least one, finite) into at most ``clusters`` groups.

    Stops after ``iterations`` updates or when no centroid moves by more than ``tolerance``. Clusters that end up empty
    are left out, so fewer than ``clusters`` centroids can come back; with no more distinct values than clusters, the
    values themselves are returned. Every value goes to its nearest centroid. Sums run in float64, and the centroids are
    rounded to the dtype of ``values`` at the end.
    """
    flat = values.detach().reshape(-1).to("cpu", torch.float64).numpy()
    ordered = _sorted_values(values)
    if clusters < 1 or iterations < 0:
        raise ConfigurationError(f"clusters is {clusters} and iterations {iterations}; use at least 1 and 0")
    found = torch.unique_consecutive(torch.from_numpy(ordered), return_counts=True)
    distinct, counts = (tensor.numpy() for tensor in found)
    if distinct.size <= clusters:
        centroids = distinct
    else:
        centroids = _lloyd(distinct, counts, _start(ordered, clusters, init, seed), iterations, tolerance)
    # round first, so that the assignments are those of the centroids that the caller gets
    rounded = torch.unique(torch.from_numpy(centroids).to(values.dtype))
    exact = rounded.to(torch.float64).numpy()
    nearest = np.searchsorted((exact[1:] + exact[:-1]) / 2, flat, side="left")
    used = np.bincount(nearest, minlength=exact.size) > 0
    assignments = (np.cumsum(used) - 1)[nearest]
    centroids_left = rounded[torch.from_numpy(used)]
    return Clustering(
        centroids_left.to(values.device), torch.from_numpy(assignments).reshape(values.shape).to(values.device)
    )


def _sorted_values(values: Tensor) -> NDArray[np.float64]:
    if values.numel() == 0:
        raise DataError("k-means needs at least one value, the tensor is empty")
    flat: NDArray[np.float64] = np.sort(values.detach().reshape(-1).to("cpu", torch.float64).numpy())
    if not np.isfinite(flat).all():
        raise DataError("k-means needs finite values, the tensor holds NaN or infinity")
    return flat


def _start(ordered: NDArray[np.float64], clusters: int, init: str, seed: int) -> NDArray[np.float64]:
    if init == "linear":
        return np.linspace(ordered[0], ordered[-1], clusters)
    if init == "density":
        return np.quantile(ordered, (np.arange(clusters) + 0.5) / clusters)
    if init == "random":
        chosen = np.random.default_rng(seed).choice(ordered, min(clusters, ordered.size), replace=False)
        return np.sort(chosen)
    raise ConfigurationError(f"unknown k-means start {init!r}{suggest(init, get_args(Initialization))}")


def _lloyd(
    distinct: NDArray[np.float64],
    counts: NDArray[np.int64],
    centroids: NDArray[np.float64],
    iterations: int,
    tolerance: float,
) -> NDArray[np.float64]:
    mass = np.concatenate([[0], np.cumsum(counts)])
    moment = np.concatenate([[0.0], np.cumsum(counts * distinct)])
    for _ in range(iterations):
        edges = np.searchsorted(distinct, (centroids[1:] + centroids[:-1]) / 2, side="right")
        edges = np.concatenate([[0], edges, [distinct.size]])
        sizes = np.diff(mass[edges])
        means = np.where(sizes > 0, np.diff(moment[edges]) / np.maximum(sizes, 1), centroids)
        moved = np.abs(means - centroids).max()
        centroids = np.sort(means)
        if moved <= tolerance:
            break
    return centroids
