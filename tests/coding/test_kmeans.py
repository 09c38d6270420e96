import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efficientdnns.coding import initial_centroids, kmeans_1d
from efficientdnns.errors import ConfigurationError, DataError


def cost(values, clustering):
    return float(((values.double() - clustering.centroids.double()[clustering.assignments]) ** 2).sum())


@pytest.fixture
def weights():
    return torch.randn(40, 25, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("init", ["linear", "density", "random"])
def test_cost_never_rises(weights, init):
    costs = [cost(weights, kmeans_1d(weights, 16, init, iterations=n)) for n in range(12)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(costs))
    assert costs[-1] < 0.9 * costs[0]


def test_every_value_goes_to_its_nearest_centroid(weights):
    result = kmeans_1d(weights, 8)
    nearest = (weights[..., None] - result.centroids).abs().min(-1).values
    assert result.assignments.shape == weights.shape
    torch.testing.assert_close((weights - result.centroids[result.assignments]).abs(), nearest)


def test_converged_centroids_are_means(weights):
    result = kmeans_1d(weights, 8, iterations=10_000)
    for index, centroid in enumerate(result.centroids):
        torch.testing.assert_close(weights[result.assignments == index].mean(), centroid)


def test_linear_start_is_evenly_spaced(weights):
    expected = torch.linspace(weights.min().item(), weights.max().item(), 32, dtype=torch.float64)
    torch.testing.assert_close(initial_centroids(weights, 32), expected)


def test_density_start_holds_equal_shares(weights):
    centroids = initial_centroids(weights, 4, "density")
    shares = torch.bucketize(weights.double().flatten(), centroids).bincount() / weights.numel()
    torch.testing.assert_close(shares, torch.tensor([0.125, 0.25, 0.25, 0.25, 0.125]), atol=2e-3, rtol=0)


def test_random_start_depends_on_the_seed_alone(weights):
    assert torch.equal(initial_centroids(weights, 8, "random", 1), initial_centroids(weights, 8, "random", 1))
    assert not torch.equal(initial_centroids(weights, 8, "random", 1), initial_centroids(weights, 8, "random", 2))


@pytest.mark.parametrize("init", ["linear", "density", "random"])
def test_more_clusters_than_values(init):
    values = torch.tensor([3.0, -1.0, 3.0, 0.5])
    result = kmeans_1d(values, 16, init)
    assert result.centroids.tolist() == [-1.0, 0.5, 3.0]
    assert torch.equal(result.centroids[result.assignments], values)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60), st.integers(1, 20))
def test_no_empty_cluster_and_never_too_many(values, clusters):
    values = torch.tensor(values)
    result = kmeans_1d(values, clusters)
    assert 1 <= result.centroids.numel() <= clusters
    assert result.assignments.bincount().min() > 0
    assert torch.equal(result.centroids, result.centroids.sort().values)


def test_low_precision_values_get_centroids_of_their_dtype():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)).bfloat16()
    result = kmeans_1d(values, 4)
    assert result.centroids.dtype == torch.bfloat16
    assert result.centroids.numel() == 4


def test_wrong_input_is_refused():
    with pytest.raises(DataError, match="empty"):
        kmeans_1d(torch.empty(0), 4)
    with pytest.raises(DataError, match="finite"):
        kmeans_1d(torch.tensor([1.0, float("nan")]), 4)
    with pytest.raises(ConfigurationError):
        kmeans_1d(torch.ones(3), 0)
    with pytest.raises(ConfigurationError, match="did you mean 'linear'"):
        kmeans_1d(torch.randn(30), 4, "liner")
