"""Charts as inline SVG in shares of its width, so that they fit any screen without a script and keep their text size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from efficientdnns.reporting.html import Html, tag
from efficientdnns.reporting.numbers import log_ticks, ticks

Point = tuple[float, float]


WIDE = 5.0
"""Values that differ by more than this factor go on a logarithmic scale."""


@dataclass(frozen=True)
class Scale:
    """Maps values to shares of the axis in [0, 1]: straight, logarithmic, or stretched towards ``top``.

    Stretched is logarithmic in what is missing to ``top``: an accuracy of 99 % lies as far above 98 % as 90 % above 80 %.
    """

    low: float
    high: float
    log: bool = False
    top: float | None = None

    @classmethod
    def over(cls, values: Iterable[float], *, log: bool | None = False, margin: float = 0.06) -> Scale:
        """A scale over ``values`` with a margin on both sides; ``log=None`` decides by their range."""
        known = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(known), max(known)
        logarithmic = low > 0 and high / low > WIDE if log is None else log
        if logarithmic:
            room = (high / low) ** margin if high > low else 2.0
            return cls(low / room, high * room, True)
        room = (high - low) * margin or abs(high) * margin or 1.0
        return cls(low - room, high + room)

    @classmethod
    def of_metric(cls, values: Iterable[float], unit: str, higher_is_better: bool, margin: float = 0.1) -> Scale:
        """A scale for a metric: per cents of which more is better are stretched towards 100 where they differ much."""
        known = [value for value in values if math.isfinite(value)]
        if not higher_is_better:
            return cls.over(known, log=None, margin=margin)
        if unit == "%" and known and max(known) < 100 and (100 - min(known)) > WIDE * (100 - max(known)):
            room = ((100 - min(known)) / (100 - max(known))) ** margin
            return cls(100 - (100 - min(known)) * room, 100 - (100 - max(known)) / room, top=100.0)
        return cls.over(known, margin=margin)

    def __call__(self, value: float) -> float:
        if self.top is not None:
            return math.log((self.top - self.low) / (self.top - value)) / math.log(
                (self.top - self.low) / (self.top - self.high)
            )
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """Round values on the axis."""
        if self.top is not None:
            missing = log_ticks(self.top - self.high, self.top - self.low)
            return [round(self.top - value, 9) for value in reversed(missing)]
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)

    @property
    def note(self) -> str:
        """What to say of it beside the axis."""
        return "logarithmic" if self.log else f"stretched towards {self.top:g}" if self.top is not None else ""


def share(value: float) -> str:
    """``"43.2%"``."""
    return f"{100 * value:.4g}%"


@dataclass
class Plot:
    """A frame with two axes to which marks are added; `figure` gives the chart.

    ``written`` says how a value of an axis is written at its ticks.
    """

    x: Scale
    y: Scale
    x_name: Any
    y_name: str
    description: str
    x_written: Callable[[float], str] = "{:g}".format
    y_written: Callable[[float], str] = "{:g}".format
    short: bool = False
    behind: list[Html] = field(default_factory=list)
    marks: list[Html] = field(default_factory=list)
    named: bool = False
    """Whether names stand above the frame."""

    def at(self, x: float, y: float) -> Point:
        """Where a point lies, in shares of the width from the left and of the height from the top."""
        return self.x(x), 1 - self.y(y)

    def line(self, points: Sequence[Point], **attributes: Any) -> None:
        """A line through ``points``."""
        corners = " ".join(f"{100 * left:.5g},{100 * top:.5g}" for left, top in (self.at(*point) for point in points))
        inner = tag("polyline", points=corners, **attributes)
        box = {"width": "100%", "height": "100%", "viewBox": "0 0 100 100", "preserveAspectRatio": "none"}
        self.marks.append(tag("svg", inner, **box, overflow="hidden"))

    def dot(self, x: float, y: float, title: str = "", radius: float = 3.5) -> None:
        """One point, whose ``title`` shows where the pointer rests on it."""
        left, top = self.at(x, y)
        circle = tag("circle", cx=share(left), cy=share(top), r=radius)
        self.marks.append(tag("g", tag("title", title) if title else None, circle))

    def level(self, y: float, class_: str) -> None:
        """A horizontal line at ``y``."""
        top = share(1 - self.y(y))
        self.behind.append(tag("line", x1="0", x2="100%", y1=top, y2=top, class_=class_))

    def band(self, low: float, high: float, text: str = "", shaded: bool = True) -> None:
        """A background from ``low`` to ``high`` on the x axis, with ``text`` on top."""
        left, right = max(0.0, self.x(low)), min(1.0, self.x(high))
        if shaded:
            self.behind.append(
                tag("rect", x=share(left), y="0", width=share(right - left), height="100%", class_="band")
            )
        if text:
            middle = share((left + right) / 2)
            self.named = True
            self.behind.append(tag("text", text, x=middle, y="-5", text_anchor="middle", class_="step"))

    def figure(self, caption: Any = None, **attributes: Any) -> Html:
        """The chart."""
        across = [(self.x(tick), self.x_written(tick)) for tick in self.x.ticks]
        down = [(1 - self.y(tick), self.y_written(tick)) for tick in self.y.ticks]
        grid = [tag("line", x1="0", x2="100%", y1=share(at), y2=share(at), class_="grid") for at, _ in down]
        grid += [tag("line", x1=share(at), x2=share(at), y1="0", y2="100%", class_="grid") for at, _ in across]
        frame = tag("rect", x="0", y="0", width="100%", height="100%", class_="frame")
        drawing = tag("svg", self.behind, grid, frame, self.marks, role="img", aria_label=self.description)
        plot = tag(
            "div",
            tag(
                "div",
                [tag("span", text, style=f"top:{share(at)}") for at, text in down],
                class_="y",
                aria_hidden="true",
            ),
            drawing,
            tag(
                "div",
                [tag("span", text, style=f"left:{share(at)}") for at, text in across],
                class_="x",
                aria_hidden="true",
            ),
            tag("div", self.x_name, class_="axis"),
            class_=" ".join(("plot", *(["short"] if self.short else []), *(["steps"] if self.named else []))),
        )
        title = tag("figcaption", caption if caption is not None else self.y_name)
        return tag("figure", title, plot, class_="chart", **attributes)


def bars(before: float | None, after: float | None, most: float, inside: float | None = None, title: str = "") -> Html:
    """Two bars, one above the other: before, and after with its part ``inside`` darker (weights that are not zero)."""
    rows: list[Any] = [tag("title", title) if title else None]
    for value, top, kind in ((before, "0", "before"), (after, "8", "after")):
        if value is None or most <= 0:
            continue
        width = value / most
        split = kind == "after" and inside is not None and inside < value
        rows.append(_bar(width, top, "zero" if split else kind))
        if split and inside is not None:
            rows.append(_bar(inside / most, top, "after"))
    return tag("svg", *rows, role="img", aria_label=title or None, aria_hidden=None if title else "true")


def _bar(width: float, top: str, kind: str) -> Html:
    thin = 0 < width < 0.006  # what is there must be seen
    return tag("rect", x="0", y=top, width="1.5" if thin else share(width), height="6", class_=kind)
