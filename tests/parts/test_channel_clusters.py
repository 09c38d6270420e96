"""Clusters of weight vectors: planted ones, thresholds, linkage."""

from __future__ import annotations

import pytest
import torch

import efficientdnns as ed
from efficientdnns.parts.channel_clusters import Dendrogram, clusters, count_distinct

LINKAGES = ("complete", "average", "centroid")


def planted() -> torch.Tensor:
    """Ten directions, five noisy copies each, of random scale."""
    directions = torch.nn.functional.normalize(torch.randn(10, 60, dtype=torch.float64), dim=1)
    noise = torch.nn.functional.normalize(torch.randn(10, 5, 60, dtype=torch.float64), dim=2) * 0.1
    return ((directions[:, None] + noise) * (0.1 + 5 * torch.rand(10, 5, 1, dtype=torch.float64))).flatten(0, 1)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_planted_clusters_are_found(linkage) -> None:
    vectors = planted()
    labels = clusters(vectors, 0.9, linkage)
    assert torch.equal(labels, torch.arange(10).repeat_interleave(5))
    assert count_distinct(torch.cat([vectors, -vectors]), 0.9, linkage) == 20


@pytest.mark.parametrize("linkage", LINKAGES)
def test_the_number_grows_with_tau(linkage) -> None:
    vectors = torch.randn(40, 6, dtype=torch.float64)
    taus = [-1.0, *torch.linspace(-0.9, 0.99, 30).tolist(), 1 - 1e-9]
    counts = [count_distinct(vectors, tau, linkage) for tau in taus]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 40)


def test_every_pair_of_a_complete_cluster_reaches_tau() -> None:
    dendrogram = Dendrogram(torch.randn(50, 4), "complete")
    for tau in (0.2, 0.6, 0.9):
        labels = dendrogram.labels(dendrogram.merged_at(tau))
        same = labels[:, None] == labels[None, :]
        assert dendrogram.cosines[same].min() >= tau - 1e-9


def test_average_merges_reach_tau_on_average() -> None:
    dendrogram = Dendrogram(torch.randn(30, 4), "average")
    for merged in range(1, 30):
        before, after = dendrogram.labels(merged - 1), dendrogram.labels(merged)
        parts = next(p for label in after.unique() if len(p := before[after == label].unique()) == 2)
        a, b = (before == parts[0], before == parts[1])
        assert float(dendrogram.cosines[a][:, b].mean()) == pytest.approx(1 - dendrogram.heights[merged - 1], abs=1e-9)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_scales_do_not_count(linkage) -> None:
    vectors = torch.randn(30, 5)
    scaled = vectors * (0.01 + torch.rand(30, 1))
    assert torch.equal(clusters(vectors, 0.5, linkage), clusters(scaled, 0.5, linkage))


def test_edges() -> None:
    assert count_distinct(torch.randn(1, 5)) == 1
    assert count_distinct(torch.zeros(3, 5), 0.5) == 3
    with pytest.raises(ed.ConfigurationError, match=r"tau is 2.*from -1 to 1"):
        count_distinct(torch.randn(3, 5), 2.0)
