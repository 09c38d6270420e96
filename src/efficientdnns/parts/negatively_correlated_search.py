"""Negatively correlated search: an evolutionary minimiser whose individuals keep out of each other's regions.

Random search is its control.
"""

from __future__ import annotations

import torch
from torch import Tensor

EDGE = 1e-4
"""How far from a bound a clipped coordinate lies."""


class NegativelyCorrelatedSearch:
    r"""NCS, `Tang et al., 2016 <https://arxiv.org/abs/1504.04914>`_, for asking and telling.

    Individual i searches with :math:`N(x_i, \sigma_i^2 I)`. Its offspring :math:`x'_i` takes its place where

    .. math:: \lambda\, \frac{d'}{d' + d} > \frac{f' - f^*}{(f' - f^*) + (f - f^*)}, \qquad
        \lambda \sim N(1, 0.1 - 0.1\, t / t_{max})

    with f the fitness (minimised), :math:`f^*` the best so far and d the smallest Bhattacharyya distance to the other
    individuals' distributions. Every ``population`` generations :math:`\sigma_i` is divided by r = 0.99 if more than a
    fifth of the offspring won, multiplied if fewer.

    Args:
        start: (n,) where all individuals begin.
        fitness: fitness of ``start``.
        step_size: initial sigma.
        bounds: lower and upper bound of every coordinate, or None.
        population: individuals, at least 2.
        generations: :math:`t_{max}`, over which the noise of the choice falls to zero.
        shrink: r.
        generator: source of randomness; None takes the global one.

    >>> search = NegativelyCorrelatedSearch(torch.ones(2), 2.0, 0.1, generations=50)
    >>> for _ in range(50):
    ...     search.tell([float(x.square().sum()) for x in search.ask()])
    >>> search.best_fitness < 2.0
    True
    """

    def __init__(
        self,
        start: Tensor,
        fitness: float,
        step_size: float,
        *,
        bounds: tuple[float, float] | None = None,
        population: int = 10,
        generations: int = 100,
        shrink: float = 0.99,
        generator: torch.Generator | None = None,
    ) -> None:
        self.points = start.double().repeat(population, 1)
        self.fitness = torch.full((population,), float(fitness), dtype=torch.float64)
        self.step_sizes = torch.full((population,), float(step_size), dtype=torch.float64)
        self.bounds, self.generations, self.shrink, self.generator = bounds, max(1, generations), shrink, generator
        self.best, self.best_fitness = start.double().clone(), float(fitness)
        self.generation = 0
        self.wins = torch.zeros(population)
        self.children = self.points

    def ask(self) -> Tensor:
        """(population, n) offspring to evaluate."""
        noise = torch.randn(self.points.shape, generator=self.generator, dtype=torch.float64)
        self.children = self.points + self.step_sizes[:, None] * noise
        if self.bounds is not None:
            self.children.clamp_(self.bounds[0] + EDGE, self.bounds[1] - EDGE)
        return self.children

    def tell(self, fitness: Tensor | list[float]) -> None:
        """Take the fitness of the offspring that `ask` gave."""
        new = torch.as_tensor(fitness, dtype=torch.float64)
        lowest = int(new.argmin())
        if float(new[lowest]) < self.best_fitness:
            self.best, self.best_fitness = self.children[lowest].clone(), float(new[lowest])
        won = self.accept(new)
        self.points = torch.where(won[:, None], self.children, self.points)
        self.fitness = torch.where(won, new, self.fitness)
        self.wins += won
        self.generation += 1
        if self.generation % len(self.points) == 0:
            rate = self.wins / len(self.points)
            self.step_sizes *= torch.where(rate > 0.2, 1 / self.shrink, torch.where(rate < 0.2, self.shrink, 1.0))
            self.wins.zero_()

    def accept(self, fitness: Tensor) -> Tensor:
        """Which offspring take their parent's place."""
        deviation = 0.1 - 0.1 * min(self.generation, self.generations) / self.generations
        bar = 1 + deviation * torch.randn(len(fitness), generator=self.generator, dtype=torch.float64)
        worse = _share(fitness - self.best_fitness, self.fitness - self.best_fitness)
        apart = _share(self._diversity(self.children), self._diversity(self.points))
        return bar * apart > worse

    def _diversity(self, points: Tensor) -> Tensor:
        """Smallest Bhattacharyya distance of every N(points_i, sigma_i^2) to the N(x_j, sigma_j^2) of the others."""
        variances = self.step_sizes.square()
        mean = (variances[:, None] + variances[None]) / 2
        distance = torch.cdist(points, self.points).square() / (8 * mean)
        spread = points.shape[1] / 2 * (mean / (variances[:, None] * variances[None]).sqrt()).log()
        return (distance + spread).fill_diagonal_(torch.inf).amin(1)


class RandomSearch:
    """Uniform random search of a box, for asking and telling like `NegativelyCorrelatedSearch`.

    Args:
        start: (n,) the best so far.
        fitness: fitness of ``start``.
        bounds: lower and upper bound of every coordinate.
        population: candidates per generation.
        generator: source of randomness; None takes the global one.
    """

    def __init__(
        self,
        start: Tensor,
        fitness: float,
        *,
        bounds: tuple[float, float],
        population: int = 10,
        generator: torch.Generator | None = None,
    ) -> None:
        self.bounds, self.shape, self.generator = bounds, (population, len(start)), generator
        self.best, self.best_fitness = start.double().clone(), float(fitness)

    def ask(self) -> Tensor:
        """(population, n) candidates to evaluate."""
        low, high = self.bounds
        self.children = low + (high - low) * torch.rand(self.shape, generator=self.generator, dtype=torch.float64)
        return self.children

    def tell(self, fitness: Tensor | list[float]) -> None:
        """Take the fitness of the candidates that `ask` gave."""
        new = torch.as_tensor(fitness, dtype=torch.float64)
        lowest = int(new.argmin())
        if float(new[lowest]) < self.best_fitness:
            self.best, self.best_fitness = self.children[lowest].clone(), float(new[lowest])


def _share(child: Tensor, parent: Tensor) -> Tensor:
    """child / (child + parent), and a half where both are zero."""
    total = child + parent
    return torch.where(total > 0, child / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
