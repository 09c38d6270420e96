"""Learning-rate schedules as pure functions of progress, so that a resumed run cannot drift."""

from __future__ import annotations

import math


def factor(schedule: str, progress: float, warmup: float = 0.0) -> float:
    """Share of the peak learning rate at ``progress`` in [0, 1]; ``warmup`` is the share of the run that warms up.

    >>> factor("cosine", 0.5)
    0.5
    >>> factor("step", 0.8)
    0.01
    """
    if warmup > 0 and progress < warmup:
        return progress / warmup
    done = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "linear":
        return 1 - done
    if schedule == "step":
        return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
    return 1.0
