"""Metrics and losses of the kinds of task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientdnns.data.detection import average_precision, detection_loss, find
from efficientdnns.data.embedding import cosine_loss, cosine_similarity
from efficientdnns.data.nested import length
from efficientdnns.data.segmentation import confusion, mean_iou, pixel_accuracy, segmentation_loss
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
    """A figure of a whole split: ``finish(sum of sums / sum of counts)``.

    ``function(outputs, targets)`` gives the (sum, count) of a batch, the sum as a tensor or a number; ``finish`` turns
    the mean of the whole split into the value. A figure that is no mean sets ``whole``: ``finish`` then gets the sum
    itself, a tensor of any shape (a confusion matrix) or a list (joined over the batches).
    """

    name: str
    function: Callable[[Any, Any], tuple[Any, int]]
    higher_is_better: bool = True
    unit: str = ""
    finish: Callable[[Any], float] = float
    whole: bool = False

    def over(self, parts: Iterable[tuple[Any, int]]) -> tuple[float, int]:
        """The value of what ``function`` gave for each batch, and the sum of the counts; not-a-number where that is 0."""
        total: Any = None
        count = 0
        for part, number in parts:
            if not isinstance(part, list):
                part = torch.as_tensor(part).double()
            total, count = part if total is None else total + part, count + number
        if count == 0:
            return math.nan, 0
        return self.finish(total if self.whole else total.item() / count), count


UNMASKED = -100
"""The label of tokens that count for nothing (all but the masked ones in masked language modelling)."""


def _correct(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    if targets.is_floating_point() and targets.dim() == outputs.dim():
        targets = targets.argmax(1)
    return (outputs.argmax(1) == targets).sum(), targets.numel()


def _squared_error(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return (outputs - targets.view_as(outputs)).double().square().sum(), targets.numel()


def _negative_log_likelihood(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    loss = F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten(), reduction="sum", ignore_index=UNMASKED)
    return loss, int((targets != UNMASKED).sum())


def _perplexity(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _correct, True, "%", lambda mean: 100 * mean),
        Metric("mse", _squared_error, False),
        Metric("perplexity", _negative_log_likelihood, False, "", _perplexity),
        Metric("bits-per-character", _negative_log_likelihood, False, "bit", lambda mean: mean / math.log(2)),
        Metric("mean-iou", confusion, True, "%", mean_iou, whole=True),
        Metric("pixel-accuracy", confusion, True, "%", pixel_accuracy, whole=True),
        Metric("map", find, True, "%", lambda found: float(average_precision(found).mean()), whole=True),
        Metric("ap50", find, True, "%", lambda found: float(average_precision(found)[0]), whole=True),
        Metric("cosine-similarity", cosine_similarity, True, "%", lambda mean: 100 * mean),
    )
}
"""Share of right answers in percent, mean squared error over all elements, and exp and log2 of the mean negative
log-likelihood of a token; intersection over union and share of right pixels (`efficientdnns.data.segmentation`); COCO's
average precision over overlaps 0.5 to 0.95 and at 0.5 (`efficientdnns.data.detection`); cosine of embeddings."""


def _token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets.view_as(outputs))


DEFAULTS: dict[str, tuple[Loss, str]] = {
    "classification": (F.cross_entropy, "accuracy"),
    "regression": (_mean_squared_error, "mse"),
    "language-modelling": (_token_cross_entropy, "perplexity"),
    "segmentation": (segmentation_loss, "mean-iou"),
    "detection": (detection_loss, "map"),
    "feature-extraction": (cosine_loss, "cosine-similarity"),
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
