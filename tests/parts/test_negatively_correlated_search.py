"""Negatively correlated search on functions with known minima."""

from __future__ import annotations

import pytest
import torch

from efficientdnns.parts.negatively_correlated_search import EDGE, NegativelyCorrelatedSearch, RandomSearch


def minimise(kind: type[NegativelyCorrelatedSearch], seed: int) -> NegativelyCorrelatedSearch:
    start = torch.full((5,), 5 / 5**0.5)
    generator = torch.Generator().manual_seed(seed)
    search = kind(start, 25.0, 0.1, generations=500, generator=generator)
    for _ in range(500):
        search.tell(search.ask().square().sum(1))
    return search


@pytest.mark.parametrize("seed", range(5))
def test_sphere(seed) -> None:
    search = minimise(NegativelyCorrelatedSearch, seed)
    assert search.best_fitness < 1e-2
    assert search.best.square().sum().item() == pytest.approx(search.best_fitness)


def test_parents_that_are_never_replaced_do_not_get_there() -> None:
    class Released(NegativelyCorrelatedSearch):
        """The acceptance test of the released code: 'fitness < 0' is never true of a ratio."""

        def accept(self, fitness):
            return fitness < 0

    assert minimise(Released, 0).best_fitness > 20


def test_offspring_stay_within_the_bounds_and_the_best_is_kept() -> None:
    search = NegativelyCorrelatedSearch(torch.full((3,), 0.001), 1.0, 5.0, bounds=(0, 10), generations=5)
    seen = [1.0]
    for _ in range(5):
        children = search.ask()
        assert children.min() >= EDGE
        assert children.max() <= 10 - EDGE
        seen.extend((children.sum(1) / 30).tolist())
        search.tell(children.sum(1) / 30)
        assert search.best_fitness == pytest.approx(min(seen))


def test_same_generator_same_search() -> None:
    a, b = (minimise(NegativelyCorrelatedSearch, 3) for _ in range(2))
    assert torch.equal(a.best, b.best)


def test_random_search_covers_the_box_and_keeps_the_best() -> None:
    search = RandomSearch(torch.full((3,), 4.0), 48.0, bounds=(-1.0, 5.0), population=200)
    asked = search.ask().clone()
    assert -1 <= asked.min() < -0.9
    assert 4.9 < asked.max() <= 5
    search.tell(asked.square().sum(1))
    assert search.best_fitness == pytest.approx(asked.square().sum(1).min().item())
    assert search.best.square().sum().item() == pytest.approx(search.best_fitness)
    search.tell(torch.full((200,), 1e9))
    assert search.best_fitness < 48
