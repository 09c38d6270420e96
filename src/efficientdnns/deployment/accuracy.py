"""The task's metric of the file that is deployed, beside that of the network."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from efficientdnns.deployment.opened import Network
from efficientdnns.measurement.profile import Metric

MACS = 5e11
"""Multiply-accumulates after which the evaluation of a file stops: half a minute or so on one core."""
FEWEST = 100
"""Samples that are evaluated whatever they cost."""


class Evaluates(Protocol):
    """What is needed of a task."""

    evaluation: Any

    def evaluate(self, model: Any, split: Any = ..., *, limit: int | None = ...) -> Any:
        """The metric of a network."""
        ...

    def with_(self, **changes: Any) -> Any:
        """A copy with changes."""
        ...


def metric_of_file(
    task: Evaluates, network: Network, model: nn.Module, measured: Metric, macs: int | None
) -> dict[str, Any]:
    """``{name, value, split, n, network}``: the metric of the file, and of the network on the same samples.

    Args:
        network: the opened file. model: what it was made from.
        measured: the network's metric on the whole evaluation split.
        macs: of one sample; with many the first samples have to do, as ``n`` says.
    """
    most = max(FEWEST, int(MACS // max(macs or 1e9, 1)))
    limit = None if measured.n <= most else most
    value = task.with_(forward=lambda file, inputs: file(inputs)).evaluate(network, limit=limit)
    same = measured.value if limit is None else task.evaluate(model, limit=limit).value
    return {"name": value.name, "value": value.value, "split": value.split, "n": value.n, "network": same}
