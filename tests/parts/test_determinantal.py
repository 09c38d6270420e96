"""Determinantal point processes: kernels, exact frequencies, sizes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from efficientdnns.parts.determinantal import (
    expected_size,
    gaussian_kernel,
    inclusion_probabilities,
    log_elementary_symmetric,
    sample,
)


def random_kernel(n: int) -> torch.Tensor:
    a = torch.randn(n, n + 2, dtype=torch.float64)
    return a @ a.T / n


def test_the_kernel_is_positive_definite() -> None:
    kernel = gaussian_kernel(torch.randn(40, 6), beta=0.1)
    assert torch.equal(kernel, kernel.T)
    torch.testing.assert_close(kernel.diagonal(), torch.full((40,), 1.01, dtype=torch.float64))
    assert torch.linalg.eigvalsh(kernel).min() >= 0.01 - 1e-9


@pytest.mark.parametrize("k", [None, 2])
def test_frequencies_are_determinants(k) -> None:
    kernel, draws = random_kernel(5), 6000
    sets = [s for r in range(6) for s in itertools.combinations(range(5), r) if k in (None, r)]
    mass = torch.tensor([float(torch.linalg.det(kernel[list(s)][:, list(s)])) if s else 1.0 for s in sets])
    if k is None:
        torch.testing.assert_close(float(mass.sum()), float(torch.linalg.det(kernel + torch.eye(5))), rtol=1e-5, atol=0)
    expected = mass / mass.sum() * draws
    generator = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(sets, 0)
    for _ in range(draws):
        counts[tuple(sample(kernel, k, generator).tolist())] += 1
    seen = torch.tensor([float(counts[s]) for s in sets])
    rare = expected < 5
    cells = [(seen[~rare], expected[~rare]), (seen[rare].sum()[None], expected[rare].sum()[None].clamp_min(1e-9))]
    statistic = sum(float(((o - e) ** 2 / e.clamp_min(5.0 if i else 0.0)).sum()) for i, (o, e) in enumerate(cells))
    degrees = int((~rare).sum())
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)  # far beyond the 99.9 % point is a wrong sampler


def test_the_size_is_as_expected() -> None:
    kernel = random_kernel(20)
    values = torch.linalg.eigvalsh(kernel)
    deviation = float((values / (1 + values) ** 2).sum()) ** 0.5
    generator = torch.Generator().manual_seed(1)
    mean = sum(len(sample(kernel, None, generator)) for _ in range(1000)) / 1000
    assert abs(mean - expected_size(kernel)) < 4 * deviation / math.sqrt(1000)
    assert float(inclusion_probabilities(kernel).sum()) == pytest.approx(expected_size(kernel))


def test_duplicates_are_hardly_kept_together() -> None:
    vectors = torch.randn(6, 30)
    vectors[5] = vectors[0]
    kernel = gaussian_kernel(vectors, beta=0.1)
    generator = torch.Generator().manual_seed(0)
    drawn = [set(sample(kernel, None, generator).tolist()) for _ in range(600)]
    both = sum({0, 5} <= s for s in drawn) / len(drawn)
    alone = [sum(i in s for s in drawn) / len(drawn) for i in (0, 5)]
    assert both < 0.15 * alone[0] * alone[1]


@pytest.mark.parametrize("k", [0, 1, 150, 299, 300])
def test_k_distinct_items_of_many(k) -> None:
    kernel = gaussian_kernel(torch.randn(300, 4), beta=1.0)
    items = sample(kernel, k, torch.Generator().manual_seed(0))
    assert len(items) == len(set(items.tolist())) == k


def test_elementary_symmetric_polynomials() -> None:
    values = torch.tensor([0.5, 2.0, 3.0, 0.1], dtype=torch.float64)
    table = log_elementary_symmetric(values, 3)
    for i, r in itertools.product(range(5), range(4)):
        sums = sum(math.prod(c) for c in itertools.combinations(values[:i].tolist(), r))
        assert float(table[i, r].exp()) == pytest.approx(sums, abs=1e-12)
    assert log_elementary_symmetric(torch.full((600,), 50.0), 300).isfinite()[-1].all()
