"""What a result cost: the metric over time, and the time of every step."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any

from efficientdnns.reporting.charts import Plot, Scale
from efficientdnns.reporting.html import Html, table, tag
from efficientdnns.reporting.numbers import amount, seconds

if TYPE_CHECKING:
    from efficientdnns.result import Report


def cost(report: Report) -> Html:
    """The section."""
    spent = sum(times_spent(report))
    place = report.environment.get("accelerator") or report.environment.get("cpu") or "an unknown processor"
    epochs = len(report.history)
    trained = f", {epochs:,} epoch{'s' if epochs != 1 else ''} of training" if epochs else ", without training"
    parts = [tag("p", f"{seconds(spent)} in all{trained}, on {place}.")]
    if report.history:
        metric = report.before.metric
        timed = [entry for entry in report.history if _number(entry.get(metric.name)) is not None]
        split = next((e["split"] for e in timed if "split" in e), "calibration")
        if timed:
            name = f"{metric.name}{' (' + metric.unit + ')' if metric.unit else ''} on the {split} split"
            parts.append(_over_time(report.history, metric.name, name, short=False))
        parts.append(_over_time(report.history, "loss", "training loss, mean of the epoch", short=True))
        runs = _runs(report.history)
        if len(runs) > 1:
            parts.append(tag("ol", [tag("li", run) for run, _ in runs], class_="steps muted"))
    parts.append(_steps(report))
    return Html("".join(parts))


def times_spent(report: Report) -> list[float]:
    """Seconds of each method; in a run that was resumed, those of its training where they are more than the last stretch."""
    trained: dict[str, float] = {}
    for entry in report.history:
        trained[entry["run"]] = trained.get(entry["run"], 0.0) + float(entry.get("seconds", 0.0))
    return [max(record.seconds, trained.get(record.id, 0.0)) for record in report.methods]


def _runs(history: list[dict[str, Any]]) -> list[tuple[str, list[int]]]:
    """Training runs in order, with the positions of their epochs; a run ends where the epochs start again."""
    runs: list[tuple[str, list[int]]] = []
    for position, entry in enumerate(history):
        again = runs and runs[-1][0] == entry["run"] and entry["epoch"] > history[runs[-1][1][-1]]["epoch"]
        if again:
            runs[-1][1].append(position)
        else:
            runs.append((entry["run"], [position]))
    return runs


def _number(value: Any) -> float | None:
    """``value`` where it is a number that can be drawn."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _over_time(history: list[dict[str, Any]], key: str, name: str, *, short: bool) -> Html:
    ends: list[float] = []
    for entry in history:
        ends.append((ends[-1] if ends else 0.0) + float(entry.get("seconds", 1.0)))
    values = [_number(entry.get(key)) for entry in history]
    points = [(end, value) for end, value in zip(ends, values) if value is not None]
    if not points:
        return Html("")
    unit, size = next(((u, s) for u, s in (("hours", 3600), ("minutes", 60)) if ends[-1] >= 2 * s), ("seconds", 1))
    scaled = [(end / size, value) for end, value in points]
    y = Scale.over([value for _, value in points])
    if key == "loss" and min(value for _, value in points) >= 0:
        y = Scale(max(0.0, y.low), y.high)
    first, last = points[0][1], points[-1][1]
    plot = Plot(
        Scale(0.0, ends[-1] / size * 1.02),
        y,
        f"{unit} of training",
        name,
        f"{name} over {amount(ends[-1] / size)} {unit}: from {first:.4g} to {last:.4g}",
        short=short,
    )
    runs = _runs(history)
    for number, (run, positions) in enumerate(runs, 1):
        start = ends[positions[0] - 1] / size if positions[0] else 0.0
        text = str(number) if 1 < len(runs) <= 12 else ""
        plot.band(start, ends[positions[-1]] / size, text, shaded=number % 2 == 1 and len(runs) > 1)
        known = [(p, value) for p in positions if (value := values[p]) is not None]
        if len(known) > 1:
            plot.line([(ends[p] / size, value) for p, value in known])
        for p, value in known:
            words = f"{run}, epoch {history[p]['epoch']}: {value:.4g} after {seconds(ends[p])}"
            plot.dot(ends[p] / size, value, words, 3.5 if len(scaled) <= 60 else 2)
    return plot.figure()


def _steps(report: Report) -> Html:
    rows: list[list[Any]] = []
    for record, spent in zip(report.methods, times_spent(report)):
        entries = [entry for entry in report.history if entry["run"] == record.id]
        steps = [entry["step_seconds"] for entry in entries if entry.get("step_seconds")]
        per_epoch = [entry["seconds"] for entry in entries if "seconds" in entry]
        rows.append(
            [
                record.id,
                seconds(spent),
                len(entries) or "-",
                seconds(median(per_epoch)) if per_epoch else "-",
                seconds(median(steps)) if steps else "-",
            ]
        )
    note = tag(
        "p",
        "Per epoch: with the evaluation after it. Per step: one batch forward and backward, and the update; medians.",
        class_="hint",
    )
    return Html(table(["step", "time", "epochs", "per epoch", "per step"], rows, label="time of each step") + note)
