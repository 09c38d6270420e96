"""When how much is pruned: sparsity as a function of the progress of a run."""

from __future__ import annotations


def scheduled_sparsity(progress: float, final: float, initial: float = 0.0, exponent: float = 3.0) -> float:
    r""":math:`s = s_f + (s_i - s_f)(1 - p)^e` for progress p in [0, 1]; constant outside.

    Args:
        progress: share of the pruning phase that is over; below 0 counts as 0, above 1 as 1.
        final: sparsity at the end.
        initial: sparsity at the start, at most ``final``.
        exponent: 3 is the cubic schedule of gradual pruning, 1 a straight line; the larger, the earlier most is gone.
    """
    left = 1.0 - min(1.0, max(0.0, progress))
    return final + (initial - final) * left**exponent


def remaining(levels: int, fraction: float) -> float:
    """What is left after ``levels`` rounds that each remove ``fraction`` of the rest: :math:`(1 - p)^r`."""
    return (1 - fraction) ** levels
