"""Latencies and layers as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from efficientdnns.measurement.compare import Comparison
from efficientdnns.measurement.latency import Latency, Speedup
from efficientdnns.measurement.layers import LayerTimes


def latency_table(names: Sequence[str], comparisons: Sequence[Comparison]) -> Table:
    """Milliseconds of every network; the measured speed-up over the first one, the ratio of MACs ("MACs": what the speed-up
    would be if only arithmetic took time) and the share of that which is real."""
    table = Table(title="latency in ms: median (p10-p90)", title_justify="left")
    table.add_column("runtime", no_wrap=True)
    for heading in ("threads", "batch", *names):
        table.add_column(heading, justify="right")
    for name in names[1:]:
        table.add_column("speed-up" if len(names) == 2 else f"{name}: speed-up")
        table.add_column("MACs", justify="right")
        table.add_column("real", justify="right")
    for entry in comparisons:
        where = (entry.runtime, str(entry.threads), str(entry.batch))
        if entry.problem:
            table.add_row(*where, f"not measured: {entry.problem}")
            continue
        cells = [_milliseconds(latency) for latency in entry.latencies]
        for position, gain in enumerate(entry.speedups):
            ratio = f"{entry.mac_ratios[position]:.2f}x" if entry.mac_ratios else "-"
            real = f"{100 * entry.realised[position]:.0f} %" if entry.mac_ratios and gain.significant else "-"
            cells += [short_speedup(gain), ratio, real]
        table.add_row(*where, *cells)
    return table


def short_speedup(gain: Speedup) -> str:
    """``"1.60x (1.55-1.66)"``, or ``"1.01x, within noise"``."""
    return (
        f"{gain.ratio:.2f}x ({gain.low:.2f}-{gain.high:.2f})"
        if gain.significant
        else f"{gain.ratio:.2f}x, within noise"
    )


def layer_table(name: str, times: LayerTimes) -> Table:
    """Where the time goes: one row a layer, in order of execution."""
    plural = "s" if times.threads > 1 else ""
    title = f"{name}: {times.runtime}, batch {times.batch}, {times.threads} thread{plural}, {times.ms:.3f} ms"
    table = Table(title=title, title_justify="left")
    for heading in ("layer", "kind", "MACs", "share of MACs", "ms", "share of time", "M MACs/ms"):
        table.add_column(heading, justify="left" if heading in ("layer", "kind") else "right")
    for row in times.rows():
        table.add_row(
            row["layer"] or "(network)",
            ", ".join(row["operations"]) if row["kind"] == "-" else row["kind"],
            f"{row['macs']:,}" if row["macs"] else "-",
            f"{100 * row['macs_share']:.1f} %" if row["macs"] else "-",
            f"{row['ms']:.3f}" if row["ms"] else "-",
            f"{100 * row['time_share']:.1f} %" if row["ms"] else "-",
            f"{row['macs_per_ms'] / 1e6:,.1f}" if row["macs"] and row["ms"] else "-",
        )
    return table


def _milliseconds(latency: Latency) -> str:
    return f"{latency.median:.3g} ({latency.p10:.3g}-{latency.p90:.3g})"
