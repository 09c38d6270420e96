"""``compare.html`` and the table of the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from efficientdnns.reporting.charts import Plot, Scale, share
from efficientdnns.reporting.comparison import Axis, Comparison, Group, Placed, Spread, origin
from efficientdnns.reporting.cost import times_spent
from efficientdnns.reporting.html import Html, details, page, scrolling, table, tag
from efficientdnns.reporting.labels import Spot, place
from efficientdnns.reporting.numbers import MISSING, amount, change, ratio, scored, seconds, times
from efficientdnns.reporting.recipe import recipe_block

if TYPE_CHECKING:
    from efficientdnns.result import Report


READOUT = "Point at a mark, touch it or go to it with the tab key, and it says here which it is."


def compare_page(comparison: Comparison) -> str:
    """The comparison as a page: a chart for each cost, one table, and the recipe of every group."""
    groups = comparison.groups
    models = list(dict.fromkeys(group.report.model for group in groups))
    tasks = list(dict.fromkeys(group.report.task for group in groups))
    metric = groups[0].report.after.metric
    count = sum(len(group.runs) for group in groups)
    shown = f"{len(groups)} different run{'s' if len(groups) != 1 else ''}, {count} with all seeds"
    title = f"{', '.join(models)} on {', '.join(tasks)}: {metric.name} against cost"
    choices = [
        Html(
            tag("input", type="radio", name="axis", value=axis.key, id=f"axis-{i}", checked=i == 0)
            + tag("label", axis.name, for_=f"axis-{i}")
        )
        for i, axis in enumerate(comparison.axes)
    ]
    return page(
        title,
        tag("h1", f"{metric.name} against cost"),
        tag("p", f"{', '.join(models)} on {', '.join(tasks)} · {shown}", class_="lead"),
        [tag("p", warning, class_="warning", role="note") for warning in comparison.warnings],
        tag("h2", "Which are worth having?"),
        tag(
            "p",
            "Each numbered point is a row of the table below. A grey one is dominated: another costs no more and scores no "
            "worse. The dashed line joins what remains. ◯ is the dense network that the runs started from.",
        ),
        tag("fieldset", tag("legend", "Cost"), choices, class_="choices", hidden=True),
        [_chart(comparison, axis) for axis in comparison.axes],
        tag("p", READOUT, class_="readout muted", aria_live="polite", hidden=True),
        tag("h2", "All of them"),
        _table(comparison),
        tag("h2", "What was done in each"),
        [_recipe(group) for group in groups],
        scripts=("page.js", "compare.js"),
    )


def _written(axis: Axis, value: float) -> str:
    return f"{value:.3g} %" if axis.unit == "%" else amount(value, axis.unit)


def _tick(axis: Axis, value: float) -> str:
    """Without the zeros that end a round number."""
    return re.sub(r"\.0+(?= )|(\.\d*?)0+(?= )", r"\1", _written(axis, value))


def _chart(comparison: Comparison, axis: Axis) -> Html:
    metric = comparison.groups[0].report.after.metric
    placed = comparison.placed(axis)
    x = Scale.over([v for p in placed for v in (p.cost.low, p.cost.high)], log=None, margin=0.08)
    scores = [value for p in placed for value in (p.score.low, p.score.high)]
    y = Scale.of_metric(scores, metric.unit, metric.higher_is_better)
    note = (
        "of the dense network's, both timed in one run"
        if axis.unit == "%"
        else "per sample"
        if axis.key == "macs"
        else ""
    )
    name = f"{axis.name}{' ' + note if note else ''}{f' ({x.note})' if x.note else ''}; less is better"
    description = f"{metric.name} of {len(placed)} points against {axis.name}; the table has the numbers"
    plot = Plot(x, y, name, metric.name, description, lambda value: _tick(axis, value))
    _staircase(plot, [(p.cost.mean, p.score.mean) for p in placed if p.best])
    spots = place([plot.at(p.cost.mean, p.score.mean) for p in placed])
    plot.marks += [_point(plot, axis, p, spot, metric.unit) for p, spot in reversed(list(zip(placed, spots)))]
    shown = [p.group.number for p in placed if p.group]
    absent = [str(group.number) for group in comparison.comparable if group.number not in shown]
    hint = f" Not measured for {', '.join(absent)}." if absent else ""
    unit = f" ({metric.unit})" if metric.unit else ""
    stretched = f", {y.note}" if y.note else ""
    better = "more" if metric.higher_is_better else "less"
    caption = f"{metric.name}{unit} on {metric.n:,} {metric.split} samples, {better} is better{stretched}.{hint}"
    return plot.figure(caption, data_axis=axis.key)


def _staircase(plot: Plot, front: list[tuple[float, float]]) -> None:
    """What can be had at every cost: level up to the next point of the front."""
    corners: list[tuple[float, float]] = []
    for point in sorted(set(front)):
        if corners:
            corners.append((point[0], corners[-1][1]))
        corners.append(point)
    if corners:
        plot.line([*corners, (plot.x.high, corners[-1][1])], class_="front")


def _point(plot: Plot, axis: Axis, placed: Placed, spot: Spot, unit: str) -> Html:
    """A mark with its number, and bars over the range of its seeds."""
    cost, score, group = placed.cost, placed.score, placed.group
    words = f"{placed.name}: {_plus_minus(score, unit)}, {axis.name} {_written(axis, cost.mean)}"
    if group is not None:
        words = f"{group.number} · {words}{'' if placed.best else ' (dominated)'}"
    parts: list[Any] = [tag("title", words)]
    ends = [((cost.low, score.mean), (cost.high, score.mean)), ((cost.mean, score.low), (cost.mean, score.high))]
    for first, last in ends:
        if first != last:
            (x1, y1), (x2, y2) = plot.at(*first), plot.at(*last)
            parts.append(tag("line", x1=share(x1), y1=share(y1), x2=share(x2), y2=share(y2)))
    for _, report in group.runs if group is not None and len(group.runs) > 1 else []:
        if (value := axis.of(report)) is not None:
            x, y = plot.at(value, report.after.metric.value)
            parts.append(tag("circle", cx=share(x), cy=share(y), r=2.5, class_="seed"))
    left, top = plot.at(cost.mean, score.mean)
    parts.append(tag("circle", cx=share(left), cy=share(top), r=6, class_="mean"))
    number = "dense" if group is None else str(group.number)
    dx, dy, anchor = spot
    parts.append(tag("text", number, x=share(left), y=share(top), dx=dx, dy=dy, text_anchor=anchor))
    kind = "dense" if group is None else "best" if placed.best else "dominated"
    marks: dict[str, Any] = {"class_": f"point {kind}", "tabindex": "0", "aria_label": words}
    return tag("g", *parts, **marks, **({"role": "img"} if group is None else {"role": "button", "data_run": number}))


def _plus_minus(spread: Spread, unit: str) -> str:
    if spread.std is None:
        return scored(spread.mean, unit)
    return f"{spread.mean:.2f} ± {spread.std:.2f}{' ' + unit if unit else ''}"


def _gain(axis: Axis) -> Callable[[Report], float | None]:
    """How many times less than the dense network."""

    def of(report: Report) -> float | None:
        before, after = axis.dense(report), axis.of(report)
        return before / after if before is not None and after else None

    return of


def _cells(comparison: Comparison, group: Group) -> list[tuple[float | None, Any]]:
    """For each column the value to sort by and what is shown."""
    metric = group.report.after.metric
    gap = group.spread(lambda r: r.after.metric.value - origin(r).metric.value)
    gained = change(gap.mean, metric.unit) if gap else MISSING
    seeds = ", ".join(map(str, group.seeds[:6])) + (", ..." if len(group.seeds) > 6 else "")
    runs = (
        f"{len(group.runs)} run{'s' if len(group.runs) > 1 else ''}, seed{'s' if len(group.seeds) > 1 else ''} {seeds}"
    )
    best = [axis.short for axis in comparison.axes if axis.key in group.fronts]
    cells: list[tuple[float | None, Any]] = [
        (group.number, str(group.number)),
        (None, [tag("b", group.label), tag("div", group.done, class_="hint done"), tag("div", runs, class_="hint")]),
        (group.metric.mean, [_plus_minus(group.metric, metric.unit), tag("div", gained, class_="hint")]),
    ]
    for axis in comparison.axes:
        cost, gain = group.spread(axis.of), group.spread(_gain(axis))
        if cost is None:
            cells.append((None, MISSING))
        elif axis.unit == "%":
            cells.append(
                (cost.mean, [times(gain.mean if gain else None), tag("div", _milliseconds(group, axis), class_="hint")])
            )
        else:
            cells.append(
                (
                    cost.mean,
                    [amount(cost.mean, axis.unit), tag("div", times(gain.mean if gain else None), class_="hint")],
                )
            )
    spent = group.spread(lambda r: sum(times_spent(r)))
    cells.append((spent.mean if spent else None, seconds(spent.mean if spent else None)))
    if _budgeted(comparison):
        met = [line["met"] for _, report in group.runs for line in report.budget]
        missed = tag("span", f"missed in {met.count(False)}", class_="bad")
        verdict = MISSING if not met else tag("span", "met", class_="good") if all(met) else missed
        cells.append((float(all(met)) if met else None, verdict))
    return [*cells, (float(len(best)), ", ".join(best) or MISSING)]


def _milliseconds(group: Group, axis: Axis) -> str:
    """Milliseconds after, the mean of its runs."""
    spread = group.spread(axis.milliseconds) if axis.milliseconds else None
    return f"{spread.mean:.3g} ms" if spread else ""


def headings(comparison: Comparison) -> list[str]:
    """The columns of the table."""
    costs = [axis.name.replace("latency in", "speed-up in") for axis in comparison.axes]
    budget = ["budget"] if _budgeted(comparison) else []
    return ["#", "run", comparison.groups[0].report.after.metric.name, *costs, "time", *budget, "best in"]


def _budgeted(comparison: Comparison) -> bool:
    return any(group.report.budget for group in comparison.groups)


def _table(comparison: Comparison) -> Html:
    names = headings(comparison)
    words = (1, len(names) - 1)

    def heading(i: int, name: str) -> Html:
        button = tag("button", name, type="button")
        return tag("th", button, scope="col", aria_sort="none", class_=None if i in words else "number")

    def row(group: Group) -> Html:
        cells = []
        for i, (value, shown) in enumerate(_cells(comparison, group)):
            written = None if value is None else f"{value:.10g}"
            if i == 0:
                shown = tag("a", shown, href=f"#run-{group.number}", aria_label=f"recipe of run {group.number}")
            kind = "run" if i == 1 else "wrap" if i in words else "number"
            cells.append(
                tag("th" if i == 1 else "td", shown, scope="row" if i == 1 else None, class_=kind, data_value=written)
            )
        return tag("tr", cells, data_run=group.number, class_=None if group.fronts else "dominated")

    head = tag("thead", tag("tr", [heading(i, name) for i, name in enumerate(names)]))
    body = tag("tbody", [row(group) for group in comparison.groups])
    note = (
        "Under a figure stands the dense network's divided by it: 2.00x is half as much; under the metric, the "
        "change. Best in: "
        "nothing else costs less there and scores as well. Speed-ups are measured, before and "
        "after in turns; the milliseconds under them come from runs at different times. Several seeds: mean ± standard "
        "deviation; in the charts, the mean with its range. A click on a heading sorts."
    )
    return Html(
        scrolling(tag("table", head, body, class_="runs sortable"), "comparison of runs")
        + tag("p", note, class_="hint")
    )


def _recipe(group: Group) -> Html:
    metric = group.report.after.metric
    rows = [
        [
            str(path),
            report.seed,
            scored(origin(report).metric.value, metric.unit),
            scored(report.after.metric.value, metric.unit),
            amount(report.after.bytes, "B"),
            ratio(origin(report).macs, report.after.macs),
        ]
        for path, report in group.runs
    ]
    names = ["folder", "seed", "before", "after", "file", "MACs"]
    runs = table(names, rows, label=f"runs of {group.label}")
    return details(
        f"{group.number} · {group.label}", runs, recipe_block(group.report), id=f"run-{group.number}", class_="recipe"
    )


def compare_table(comparison: Comparison) -> Table:
    """The comparison for a terminal: beside the metric how many times less than the dense network each run costs."""
    metric = comparison.groups[0].report.after.metric
    note = "n: runs; x: how many times less than the dense network; *: no other costs less and scores as well"
    shown = Table(box=box.SIMPLE_HEAD, caption=note, caption_justify="left", padding=(0, 1, 0, 0))
    for name in ("#", "run", "n", metric.name, "change"):
        shown.add_column(name, justify="left" if name == "run" else "right", no_wrap=name != "run", overflow="fold")
    for axis in comparison.axes:
        shown.add_column(axis.short, justify="right", no_wrap=True)
    for group in comparison.groups:
        gap = group.spread(lambda r: r.after.metric.value - origin(r).metric.value)
        gains = [(axis.key, group.spread(_gain(axis))) for axis in comparison.axes]
        shown.add_row(
            str(group.number),
            escape(group.label),
            str(len(group.runs)),
            _plus_minus(group.metric, ""),
            f"{gap.mean:+.2f}" if gap else MISSING,
            *(f"{times(gain.mean)}{'*' if key in group.fronts else ' '}" if gain else MISSING for key, gain in gains),
        )
    return shown
