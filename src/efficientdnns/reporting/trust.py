"""Can the numbers be trusted: which samples they come from, what was checked, and what is only theory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from efficientdnns.measurement.compare import Comparison
from efficientdnns.measurement.latency import Speedup
from efficientdnns.reporting.html import Html, table, tag
from efficientdnns.reporting.numbers import MISSING, amount, change, milliseconds, scored, times

if TYPE_CHECKING:
    from efficientdnns.deployment.export import Exported
    from efficientdnns.result import Report

USES = {"train": "the methods learn from it", "calibration": "choices are made on it, and the curves above are drawn"}


def trust(report: Report) -> Html:
    """The section."""
    parts = [tag("h3", "Samples"), _splits(report), tag("h3", "Checks"), _checks(report)]
    parts += [tag("h3", "Files for other runtimes"), _exports(report)]
    parts += [tag("h3", "Speed: measured and theoretical"), _speed(report)]
    kept = [(record.id, reason) for record in report.methods for reason in _kept(record.findings)]
    if kept:
        parts += [tag("h3", "Kept whole"), tag("p", "What the methods could not cut stays as it was:")]
        parts += [tag("ul", [tag("li", method, ": ", reason) for method, reason in kept], class_="checks")]
    return Html("".join(parts))


def chance(value: float, n: int) -> float:
    """Half the width of the 95 % interval of an accuracy of ``value`` per cent on ``n`` samples, in points.

    1.96 sqrt(p (1 - p) / n), with at least half a sample right and half a sample wrong.
    """
    p = min(max(value / 100, 0.5 / n), 1 - 0.5 / n)
    return 196 * math.sqrt(p * (1 - p) / n)


def _kept(findings: dict[str, Any]) -> list[Any]:
    kept = findings.get("kept_whole", [])
    return list(kept) if isinstance(kept, list | tuple) else [kept]


def _splits(report: Report) -> Html:
    metric = report.after.metric
    rows = []
    for name, size in report.splits.items():
        use = USES.get(name, "")
        if name == metric.split:
            read = "read twice, before and after, and by nothing else"
            use = f"{use}; {read}" if use else read
        rows.append([name, f"{size:,}", use])
    shown = table(["split", "samples", ""], rows, words=(0, 2), label="splits")
    if metric.name == "accuracy" and metric.unit == "%" and metric.n:
        half = chance(metric.value, metric.n)
        text = (
            f"An accuracy of {metric.value:.2f} % on {metric.n:,} samples is known to about ±{half:.2g} points (95 % interval "
            "for other samples of the same kind)."
        )
        return Html(shown + tag("p", text))
    return Html(shown)


def _checks(report: Report) -> Html:
    exact = {
        True: tag(
            "li",
            tag("span", "yes", class_="good"),
            " · loaded again from its folder, the network gives exactly the same outputs",
        ),
        False: tag("li", tag("span", "NO", class_="bad"), " · loaded again, the network gives other outputs"),
        None: tag("li", "not checked · whether the network gives the same outputs when loaded again"),
    }[report.reload_exact]
    yes = tag("span", "yes", class_="good")
    decoded = tag("li", yes, " · the weights file was decoded and compared bit for bit; its size is that of the file")
    counted = tag("li", yes, " · MACs were counted while the networks ran, zeros included")
    return tag("ul", exact, decoded, counted, class_="checks")


def _exports(report: Report) -> Html:
    if not report.exports:
        return tag("p", "None were written.", class_="muted")
    rows = [_export(exported, report) for exported in report.exports]
    note = (
        "Each file was opened again in its runtime. Difference: the largest between its outputs and the network's, on inputs "
        "of the task, beside the largest output. The metric is that of the file itself, on the samples named."
    )
    headings = ["file", "size", "difference", "metric"]
    return Html(table(headings, rows, label="files for other runtimes") + tag("p", note, class_="hint"))


def _export(exported: Exported, report: Report) -> list[Any]:
    if exported.error:
        reason = tag("div", f"not written: {exported.error}", class_="hint")
        return [[exported.format, reason], MISSING, MISSING, MISSING]
    batch = "any batch" if exported.dynamic_batch else f"batch {exported.batch}"
    opened = f"opened with {exported.opened_with}" if exported.opened_with else ""
    name = [exported.file, tag("div", "; ".join(filter(None, [opened, batch, exported.note])), class_="hint")]
    difference: Any = MISSING
    if exported.max_difference is not None:
        difference = "none" if exported.max_difference == 0 else f"{exported.max_difference:.1e}"
        of = f"of {exported.largest_output:.3g}" if exported.largest_output is not None else ""
        difference = [difference, tag("div", f"{of} · {exported.compared} samples", class_="hint")]
    metric: Any = MISSING
    if exported.metric is not None:
        unit = report.after.metric.unit
        gap = change(exported.gap or 0.0, unit)
        metric = [
            scored(exported.metric["value"], unit),
            tag("div", f"{gap} · n = {exported.metric['n']:,}", class_="hint"),
        ]
    return [name, amount(exported.bytes, "B"), difference, metric]


def speeds(report: Report) -> list[Comparison]:
    """Latency in every runtime; of an older result the one in its profiles."""
    before, after = report.before.latency_ms, report.after.latency_ms
    if report.latencies or before is None or after is None:
        return report.latencies
    gains = [Speedup(**report.speedup)] if report.speedup else []
    macs = [report.before.macs / report.after.macs] if report.before.macs and report.after.macs else []
    return [
        Comparison(
            runtime=after.runtime,
            threads=after.threads,
            batch=after.batch,
            latencies=[before, after],
            speedups=gains,
            mac_ratios=macs,
        )
    ]


def _speed(report: Report) -> Html:
    entries = speeds(report)
    if not entries:
        return tag("p", "Latency was not measured.", class_="muted")
    rows: list[list[Any]] = []
    for entry in entries:
        threads = f"batch {entry.batch}, {entry.threads} thread{'s' if entry.threads > 1 else ''}"
        where = [entry.runtime, tag("div", threads, class_="hint")]
        if entry.problem or len(entry.latencies) < 2:
            reason = tag("div", f"not measured: {entry.problem}", class_="hint")
            rows.append([[entry.runtime, reason], MISSING, MISSING, MISSING, MISSING])
            continue
        cells = [
            [
                milliseconds(latency.median).removesuffix(" ms"),
                tag("div", f"{latency.p10:.3g} to {latency.p90:.3g}", class_="hint"),
            ]
            for latency in entry.latencies[:2]
        ]
        gain = entry.speedups[0] if entry.speedups else None
        measured: Any = MISSING
        if gain is not None:
            interval = f"{gain.low:.2f} to {gain.high:.2f}" if gain.significant else "within noise"
            measured = [times(gain.ratio), tag("div", interval, class_="hint")]
        theory = times(entry.mac_ratios[0]) if entry.mac_ratios else MISSING
        rows.append([where, *cells, measured, theory])
    note = (
        "In theory: the ratio of MACs: how much faster it would be if only arithmetic took time. It is a count, no "
        "measurement. Measured values are medians of calls in which before and after took turns, with their 95 % interval."
    )
    headings = ["runtime", "before (ms)", "after (ms)", "measured", "in theory"]
    return Html(table(headings, rows, label="speed") + tag("p", note, class_="hint"))
