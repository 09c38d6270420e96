"""Metrics and losses of the kinds of task."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from efficientdnns.data.nested import length
from efficientdnns.errors import ConfigurationError, suggest

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) -> mean loss, a scalar."""


class MetricValue(NamedTuple):
    """A metric's value on ``n`` samples of the split named ``split``."""

    name: str
    value: float
    split: str
    n: int
    higher_is_better: bool
    unit: str

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.name} {self.value:.4g}{unit} ({self.split}, n={self.n:,})"


@dataclass(frozen=True)
class Metric:
    """A mean over a split: ``finish(sum of sums / sum of counts)``.

    ``function(outputs, targets)`` gives the (sum, count) of a batch, the sum as a tensor or a number; ``finish`` turns
    the mean of the whole split into the value.
    """

    name: str
    function: Callable[[Any, Any], tuple[Any, int]]
    higher_is_better: bool = True
    unit: str = ""
    finish: Callable[[float], float] = float


def _correct(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    if targets.is_floating_point() and targets.dim() == outputs.dim():
        targets = targets.argmax(1)
    return (outputs.argmax(1) == targets).sum(), targets.numel()


def _squared_error(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return (outputs - targets.view_as(outputs)).double().square().sum(), targets.numel()


def _negative_log_likelihood(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    loss = F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten(), reduction="sum")
    return loss, targets.numel()


def _perplexity(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _correct, True, "%", lambda mean: 100 * mean),
        Metric("mse", _squared_error, False),
        Metric("perplexity", _negative_log_likelihood, False, "", _perplexity),
        Metric("bits-per-character", _negative_log_likelihood, False, "bit", lambda mean: mean / math.log(2)),
    )
}
"""Share of right answers in percent, mean squared error over all elements, and exp and log2 of the mean negative
log-likelihood of a token."""


def _token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets.view_as(outputs))


DEFAULTS: dict[str, tuple[Loss, str]] = {
    "classification": (F.cross_entropy, "accuracy"),
    "regression": (_mean_squared_error, "mse"),
    "language-modelling": (_token_cross_entropy, "perplexity"),
}
"""Loss and metric of each kind of task that has its own."""


def as_metric(metric: Any) -> Metric:
    """A `Metric` of a metric, a name, or a function ``(outputs, targets) -> batch mean`` (higher is better)."""
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ConfigurationError(f"metric is '{metric}'{suggest(metric, METRICS)}")
        return METRICS[metric]
    if not callable(metric):
        raise ConfigurationError(f"metric is a {type(metric).__name__}; expected a Metric, a name or a function")

    def weighted(outputs: Any, targets: Any) -> tuple[Any, int]:
        count = length(targets)
        return metric(outputs, targets) * count, count

    return Metric(getattr(metric, "__name__", type(metric).__name__), weighted)
