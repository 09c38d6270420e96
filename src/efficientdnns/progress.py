"""What a person sees while work goes on: a bar with ETA, loss and metric, or one line an epoch where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Bar:
    """One running bar; redrawn at most four times a second so that drawing costs nothing."""

    def __init__(self, rich: RichProgress | None, task: Any) -> None:
        self.rich, self.task_id, self.pending, self.drawn, self.remark = rich, task, 0, 0.0, ""

    def advance(self, text: Callable[[], str] | None = None, steps: int = 1) -> None:
        """Count ``steps``; ``text`` is only called when the bar is redrawn."""
        self.pending += steps
        if self.rich is None:
            return
        now = time.monotonic()
        if now - self.drawn > 0.25:
            self.drawn = now
            text_now = " · ".join(part for part in (text() if text else "", self.remark) if part)
            self.rich.update(self.task_id, advance=self.pending, text=text_now)
            self.pending = 0

    def note(self, remark: str) -> None:
        """Keep a remark (the current metric) beside the bar."""
        self.remark = remark


class Progress:
    """Shows the work of one run; silent when ``quiet``."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A bar for ``total`` steps of which ``done`` are done already."""
        if self.quiet or not self.console.is_terminal or total == 0:
            yield Bar(None, None)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with RichProgress(*columns, console=self.console, transient=True) as rich:
            bar = Bar(rich, rich.add_task(label, total=total, completed=done, text=""))
            yield bar

    def epoch(self, entry: dict[str, Any], epochs: int) -> None:
        """Report a finished epoch: one line where there is no terminal to draw a bar on."""
        if self.quiet or self.console.is_terminal:
            return
        left = entry["seconds"] * (epochs - entry["epoch"])
        skipped = ("run", "epoch", "seconds", "split", "learning_rate", "steps", "step_seconds")
        values = " · ".join(f"{key} {value:.4g}" for key, value in entry.items() if key not in skipped)
        self.console.print(
            f"{entry['run']}: epoch {entry['epoch']}/{epochs} · {values} · eta {left:.0f} s", highlight=False
        )

    def say(self, text: str) -> None:
        """One line to the person."""
        if not self.quiet:
            self.console.print(text, highlight=False)
