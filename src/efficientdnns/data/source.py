"""What every reader of data gives: the splits of a task and what they mean."""

from __future__ import annotations

from dataclasses import dataclass

from efficientdnns.data.split import Split


@dataclass(frozen=True)
class Source:
    """Splits and facts, named as the arguments of `efficientdnns.task.Task`; ``None`` leaves the task's default."""

    name: str
    train: Split
    evaluation: Split
    calibration: Split | None = None
    kind: str = "classification"
    num_classes: int | None = None
    metric: str | None = None
