import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from efficientdnns.parts.evbmf import evbmf


def low_rank(rows, columns, rank, noise, seed=0):
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(rows, rank, generator=g) @ torch.randn(rank, columns, generator=g)
    return signal + noise * torch.randn(rows, columns, generator=g)


@pytest.mark.parametrize(("rows", "columns", "rank", "noise"), [(20, 50, 3, 0.1), (64, 288, 5, 0.5), (32, 576, 0, 1.0)])
def test_evbmf_finds_rank_and_noise(rows, columns, rank, noise):
    found = evbmf(low_rank(rows, columns, rank, noise))
    assert found.rank == rank
    assert math.sqrt(found.sigma2) == pytest.approx(noise, rel=0.06)
    gamma = torch.linalg.svdvals(low_rank(rows, columns, rank, noise).double())[:rank]
    assert bool((found.values > 0).all())
    assert bool((found.values < gamma).all())


@hypothesis_settings(max_examples=20, deadline=None)
@given(st.integers(0, 50), st.floats(1e-3, 1e3), st.integers(0, 4))
def test_evbmf_does_not_care_about_transposition_and_scale(seed, scale, rank):
    matrix = low_rank(16, 40, rank, 0.3, seed)
    found, flipped, scaled = evbmf(matrix), evbmf(matrix.T), evbmf(scale * matrix)
    assert found.rank == flipped.rank == scaled.rank
    assert scaled.sigma2 == pytest.approx(scale**2 * found.sigma2, rel=1e-3)
    assert flipped.u.shape == (40, found.rank)


def test_evbmf_shrinkage_is_real_at_the_threshold():
    rows, columns, sigma2 = 12, 30, 0.04
    alpha = rows / columns
    tau = 2.5129 * math.sqrt(alpha)
    threshold = math.sqrt(columns * sigma2 * (1 + tau) * (1 + alpha / tau))
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    matrix[0, 0], matrix[1, 1] = threshold * (1 + 1e-6), threshold * (1 - 1e-6)
    found = evbmf(matrix, sigma2)
    assert found.rank == 1
    assert 0 < float(found.values) < threshold


def test_evbmf_takes_matrices_of_exactly_low_rank():
    assert evbmf(low_rank(20, 50, 3, 0.0)).rank == 3
