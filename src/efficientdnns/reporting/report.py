"""``report.html``: one result as a page that answers, in order, what a stranger asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from efficientdnns.measurement.compare import Comparison
from efficientdnns.reporting.cost import cost
from efficientdnns.reporting.html import Html, details, page, table, tag
from efficientdnns.reporting.layers import layer_chart
from efficientdnns.reporting.numbers import MISSING, amount, change, milliseconds, ratio, scored, times
from efficientdnns.reporting.recipe import done
from efficientdnns.reporting.trust import speeds, trust

if TYPE_CHECKING:
    from efficientdnns.result import Report

GLOSSARY = {
    "parameters": "the numbers that training sets (weights and biases); 'non-zero' are those that pruning has left",
    "MACs": "multiply-accumulates: how many products the network adds up for one sample, counted while it ran. Weights that "
    "are zero count, so only a smaller network lowers them",
    "size of the file": "of model.safetensors as it was written; it was decoded again and is the same bit for bit",
    "latency": "time of one call, measured; before and after take turns in one run, so that what else the machine does hits "
    "both. The median is shown, and between which values four of five calls lie",
    "peak memory": "tensors alive at the worst moment of one call with one sample, weights included",
    "ratio": "before divided by after: 2.00x is half as much",
}


def report_page(report: Report) -> str:
    """The page of one result: a whole HTML document that loads nothing.

    It answers: did it work; where did the size go; what did it cost; what exactly was done; can I trust it.
    """
    chain = " → ".join(record.id for record in report.methods) or "nothing done"
    by_layer = report.before.by_layer, report.after.by_layer
    missing = tag("p", "This result was written before layers were recorded. Run it again to see them.", class_="muted")
    return page(
        f"{report.model} on {report.task}: {chain}",
        tag("h1", report.model, " on ", report.task),
        tag("p", chain, class_="lead"),
        tag("h2", "Did it work?"),
        tag("p", verdict(report)),
        _tiles(report),
        _budget(report),
        _before_and_after(report),
        details("What the words mean", tag("dl", [[tag("dt", k), tag("dd", v)] for k, v in GLOSSARY.items()])),
        tag("h2", "Where did the size go?"),
        layer_chart(*by_layer) if any(by_layer) else missing,
        tag("h2", "What did it cost?"),
        cost(report),
        tag("h2", "What exactly was done?"),
        done(report),
        tag("h2", "Can I trust it?"),
        trust(report),
        scripts=("page.js",),
    )


def verdict(report: Report) -> str:
    """The result in one sentence."""
    before, after = report.before, report.after
    metric, gap = after.metric, after.metric.value - before.metric.value
    parts = []
    for old, new, less, more in (
        (before.bytes, after.bytes, "the file is {} smaller", "the file is {} larger"),
        (before.macs, after.macs, "it does {} fewer multiply-accumulates (MACs)", "it does {} more MACs"),
    ):
        if old and new and old != new:
            parts.append(less.format(times(old / new)) if new < old else more.format(times(new / old)))
    parts += [_speed(entry) for entry in speeds(report) if entry.speedups]
    size = ", ".join(parts) or "nothing was made smaller"
    said = "stayed at" if gap == 0 else f"went from {scored(before.metric.value, metric.unit)} to"
    difference = f" ({change(gap, metric.unit)})" if gap else ""
    sentence = f"{size}; {metric.name} {said} {scored(metric.value, metric.unit)}{difference} on {metric.n:,} samples."
    return sentence[0].upper() + sentence[1:]


def _speed(entry: Comparison) -> str:
    gain = entry.speedups[0]
    if not gain.significant:
        return f"a difference in speed in {entry.runtime} was not measurable"
    faster = gain.ratio > 1
    return f"it runs {times(gain.ratio if faster else 1 / gain.ratio)} {'faster' if faster else 'slower'} in {entry.runtime}"


def _tiles(report: Report) -> Html:
    before, after = report.before, report.after
    gap = after.metric.value - before.metric.value
    unit = after.metric.unit
    tiles = [
        (
            after.metric.name,
            scored(after.metric.value, unit),
            f"before {scored(before.metric.value, unit)}",
            change(gap, unit),
        ),
        *(
            (name, amount(new, unit), f"before {amount(old, unit)}", ratio(old, new))
            for name, old, new, unit in (
                ("size of the file", before.bytes, after.bytes, "B"),
                ("MACs", before.macs, after.macs, ""),
            )
            if old is not None and new is not None
        ),
    ]
    if before.latency_ms and after.latency_ms:
        old, new = before.latency_ms, after.latency_ms
        gain = f"{report.speedup['ratio']:.2f}x" if report.speedup else MISSING
        if report.speedup and not report.speedup["significant"]:
            gain += ", within noise"
        tiles.append((f"latency, {new.runtime}", milliseconds(new.median), f"before {milliseconds(old.median)}", gain))
    return tag(
        "ul",
        [
            tag(
                "li",
                tag("div", n, class_="name"),
                tag("div", v, class_="value"),
                tag("div", f, " · ", tag("b", c), class_="from"),
            )
            for n, v, f, c in tiles
        ],
        class_="tiles",
    )


def _budget(report: Report) -> Html:
    if not report.budget:
        return tag("p", "No budget was given.", class_="muted")
    units = {"bytes": "B", "latency": " ms"}

    def line(entry: dict[str, Any]) -> Html:
        unit = units.get(entry["name"], "")
        asked, got = (f"{entry[k]:.4g}{unit}" if unit == " ms" else amount(entry[k], unit) for k in ("asked", "got"))
        verdict = tag("span", "met", class_="good") if entry["met"] else tag("span", "NOT met", class_="bad")
        return tag("li", entry["name"], f": at most {asked} asked, {got} got: ", verdict)

    return Html(tag("h3", "Budget") + tag("ul", [line(entry) for entry in report.budget], class_="checks"))


def _before_and_after(report: Report) -> Html:
    before, after = report.before, report.after
    metric = after.metric
    number, _, unit = change(metric.value - before.metric.value, metric.unit).partition(" ")
    better = "higher is better" if metric.higher_is_better else "lower is better"
    rows: list[list[Any]] = [
        [
            [metric.name, _hint(f"{metric.split} split, {metric.n:,} samples; {better}")],
            scored(before.metric.value, metric.unit),
            scored(metric.value, metric.unit),
            [number, _hint(unit)],
        ]
    ]
    for name, old, new, unit in (
        ("parameters", before.params, after.params, ""),
        ("non-zero parameters", before.nonzero_params, after.nonzero_params, ""),
        ("MACs", before.macs, after.macs, ""),
        ("size of the file", before.bytes, after.bytes, "B"),
        ("peak memory", before.peak_memory, after.peak_memory, "B"),
    ):
        rows.append([name, _exact(old, unit), _exact(new, unit), ratio(old, new)])
    if before.latency_ms and after.latency_ms:
        first = after.latency_ms
        threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
        gain = report.speedup
        said = MISSING if gain is None else [times(gain["ratio"]), _hint(_interval(gain))]
        cells = [
            [milliseconds(latency.median), _hint(f"{latency.p10:.3g} to {latency.p90:.3g}")]
            for latency in (before.latency_ms, after.latency_ms)
        ]
        rows.append([["latency", _hint(f"measured in {first.runtime}, batch {first.batch}, {threads}")], *cells, said])
    return table(["", "before", "after", "ratio"], rows, label="before and after")


def _hint(text: str) -> Html:
    return tag("div", text, class_="hint")


def _interval(gain: dict[str, Any]) -> str:
    return f"{gain['low']:.2f} to {gain['high']:.2f}" if gain["significant"] else "within noise"


def _exact(value: float | None, unit: str) -> Html:
    exact = None if value is None else f"{value:,}{' bytes' if unit else ''}"
    return tag("span", amount(value, unit), title=exact)
