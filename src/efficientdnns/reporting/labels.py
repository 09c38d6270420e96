"""Where the number of a point stands so that numbers do not cover each other."""

from __future__ import annotations

from collections.abc import Sequence

Spot = tuple[float, float, str]
"""Offset to the right and down in pixels, and the text anchor."""

SIZE = (300.0, 270.0)
"""Pixels of the smallest plot that numbers must fit; on a larger one they are only further apart."""
_SPOTS: tuple[Spot, ...] = (
    (10, 4, "start"),
    (-10, 4, "end"),
    (0, -10, "middle"),
    (0, 20, "middle"),
    (8, -8, "start"),
    (-8, -8, "end"),
    (8, 16, "start"),
    (-8, 16, "end"),
)


def place(points: Sequence[tuple[float, float]], width: float = 16, height: float = 12) -> list[Spot]:
    """For each point (shares of the plot from the left and the top) the first spot where its text covers no other point
    or text; the first of all where there is none."""
    marks = [(x * SIZE[0] - 6, y * SIZE[1] - 6, x * SIZE[0] + 6, y * SIZE[1] + 6) for x, y in points]
    taken: list[tuple[float, float, float, float]] = []
    found: list[Spot] = []
    for number, (x, y) in enumerate(points):
        others = [mark for i, mark in enumerate(marks) if i != number]
        best, least = _SPOTS[0], float("inf")
        for spot in _SPOTS:
            left = x * SIZE[0] + spot[0] - {"start": 0.0, "middle": width / 2, "end": width}[spot[2]]
            bottom = y * SIZE[1] + spot[1]
            box = (left, bottom - height, left + width, bottom)
            outside = 40.0 if box[0] < 0 or box[2] > SIZE[0] else 0.0
            covered = outside + sum(_overlap(box, other) for other in (*others, *taken))
            if covered < least:
                best, least, where = spot, covered, box
        taken.append(where)
        found.append(best)
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
