"""What one-shot compression costs as networks grow: processor time, and peak memory as a multiple of the network.

    python benchmarks/scaling.py [--sizes 1m 10m 50m 100m 300m] [--billion] [--methods int8-static ...] [--svg FILE]

The networks are generated transformers. Every row is a fresh process: it imports everything and compresses a tiny network
first; what the process takes then is the baseline. Seconds are those that the process computed, which what else the machine
does changes little. Peak memory is the highest resident set (anonymous and file pages,
``VmHWM``) above the baseline, divided by the bytes of the network's parameters; the network itself, which the caller
holds, is the first 1.0 of it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import efficientdnns as ed
from efficientdnns.data.text import WindowSplit
from efficientdnns.method import Method
from efficientdnns.models.transformer import SIZES
from efficientdnns.session import Session

TOKENS = 16
PHASES = ("build", "check", "method", "measure", "save")


METHODS: dict[str, Callable[[], Method]] = {
    "int8-static": lambda: ed.Int8Quantization(mode="static", calibration_samples=4),
    "int8-dynamic": lambda: ed.Int8Quantization(mode="dynamic"),
    "multibit-2": lambda: ed.AlternatingMultibitQuantization(weight_bits=2, epochs=0),
    "tucker-quarter": lambda: ed.TuckerDecomposition(ranks=0.25, finetune_epochs=0),
    "nisp": lambda: ed.NISP(samples=4),
    "prune-channels": lambda: ed.PruneChannels(pruning_ratio=0.5),
}


def make_task(vocabulary: int) -> ed.Task:
    """A few windows of random tokens: enough to run everything that a real task runs."""
    ids = torch.randint(0, vocabulary, (4 * TOKENS + 1,), generator=torch.Generator().manual_seed(0))
    split = WindowSplit(ids, TOKENS, name="evaluation")
    calibration = WindowSplit(ids, TOKENS, name="calibration")
    return ed.Task(None, split, calibration, kind="language-modelling", num_classes=vocabulary)


def resident(field: str = "VmRSS") -> int:
    """Bytes of the resident set (``VmRSS``), its highest so far (``VmHWM``), or its anonymous part (``RssAnon``)."""
    found = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Phases:
    """Processor seconds and peak memory of each phase. Phases nest: an inner one interrupts the outer one."""

    def __init__(self) -> None:
        self.baseline = resident()
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._open: list[str] = []
        self._since = time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._cut()
        self._open.append(name)
        try:
            yield
        finally:
            self._cut()
            self._open.pop()

    def _cut(self) -> None:
        now = time.process_time()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            self.peaks[name] = max(self.peaks.get(name, 0), resident("VmHWM") - self.baseline)
        self._since = now
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew


def run_one(size: str, method: str, file: str | None, threads: int) -> dict[str, Any]:
    """Compress one network in this process and return what it cost. ``file``: weights that are mapped, not read."""
    torch.set_num_threads(threads)
    options = {"quiet": True, "latency": False, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(64)
        tiny = ed.models.build("transformer", vocabulary=64, width=64, depth=1, context=TOKENS)
        ed.compress(tiny, task, METHODS[method](), **options).save(folder, exports=())
        phases = Phases()
        measure, apply = sys.modules["efficientdnns.compress"]._measured, type(METHODS[method]()).apply

        def measured(*arguments: Any, **keywords: Any) -> Any:
            with phases.phase("measure"):
                return measure(*arguments, **keywords)

        def applied(self: Method, session: Session) -> None:
            with phases.phase("method"):
                apply(self, session)

        sys.modules["efficientdnns.compress"]._measured = measured
        type(METHODS[method]()).apply = applied
        with phases.phase("build"):
            torch.manual_seed(0)
            model = ed.models.build(f"transformer-{size}", weights=file)
        tensors = list(model.parameters())
        with phases.phase("check"):
            result = ed.compress(model, make_task(2048), METHODS[method](), **options)
        with phases.phase("save"):
            result.save(folder, exports=())
    return {
        "size": size,
        "method": method,
        "mapped": file is not None,
        "parameters": sum(t.numel() for t in tensors),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "layer": max(t.numel() * t.element_size() for t in tensors),
        "baseline": phases.baseline,
        "seconds": phases.seconds,
        "peaks": phases.peaks,
        "file_before": result.before.bytes,
        "file_after": result.after.bytes,
    }


def fresh(size: str, method: str, *, mapped: bool = False, threads: int = 1, timeout: float = 7200) -> dict[str, Any]:
    """`run_one` in a process of its own; a run that fails gives its last line under ``error``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", size, method, "--threads", str(threads)]
        if mapped:
            file = str(Path(folder) / "weights.safetensors")
            subprocess.run([sys.executable, __file__, "--write", size, file], check=True)
            command += ["--file", file]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"size": size, "method": method, "mapped": mapped, "error": f"not done after {timeout:.0f} s"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"size": size, "method": method, "mapped": mapped, "error": reason}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Peak memory as a multiple of the network, and processor seconds, by phase."""
    table = Table(
        title="peak memory above the baseline / bytes of the network (processor seconds)", title_justify="left"
    )
    for heading in ("network", "parameters", "method", *PHASES, "all", "largest layer", "file"):
        table.add_column(heading, justify="left" if heading in ("network", "method") else "right")
    for row in rows:
        name = row["method"] + (" (mapped)" if row["mapped"] else "")
        if "error" in row:
            table.add_row(row["size"], "", name, row["error"][:60])
            continue
        cells = [f"{row['peaks'][p] / row['bytes']:.2f} ({row['seconds'][p]:.1f})" for p in PHASES]
        whole = f"{max(row['peaks'].values()) / row['bytes']:.2f} ({sum(row['seconds'].values()):.0f})"
        layer = f"{row['layer'] / row['bytes']:.3f}"
        file = f"{row['file_after'] / row['file_before']:.2f}"
        table.add_row(row["size"], f"{row['parameters']:,}", name, *cells, whole, layer, file)
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Both costs against the number of parameters, as an SVG drawn by hand: no plotting library is needed."""
    import math

    colours = ["#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#9c6b4e", "#6cc5b0"]
    good = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(row["method"] + (" (mapped)" if row["mapped"] else "") for row in good))
    x_low, x_high = (math.log10(f(row["parameters"] for row in good)) for f in (min, max))
    panels: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("peak memory / network", lambda row: max(row["peaks"].values()) / row["bytes"]),
        ("processor seconds (log)", lambda row: math.log10(sum(row["seconds"].values()))),
    ]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="330" font-family="sans-serif" font-size="11">'
    ]
    parts.append('<rect width="900" height="330" fill="white"/>')
    for number, (title, value) in enumerate(panels):
        left, top, width, height = 60 + 360 * number, 30, 280, 240
        values = [value(row) for row in good]
        low, high = (0.0, max(2.0, *values)) if number == 0 else (math.floor(min(values)), math.ceil(max(values)))

        def place(row: dict[str, Any], v: float) -> tuple[float, float]:
            share = (math.log10(row["parameters"]) - x_low) / max(x_high - x_low, 1e-9)
            return left + share * width, top + height - (v - low) / max(high - low, 1e-9) * height  # noqa: B023

        parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
        parts.append(f'<text x="{left}" y="{top - 10}">{title}</text>')
        ticks = [0.5 * n for n in range(int(2 * high) + 1)] if number == 0 else range(int(low), int(high) + 1)
        for tick in ticks:
            y = top + height - (tick - low) / max(high - low, 1e-9) * height
            label = f"{tick:g}" if number == 0 else f"{10**tick:g}"
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
            parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        if number == 0:
            y = top + height - 1.3 / high * height
            parts.append(
                f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#c00" stroke-dasharray="4"/>'
            )
        for size in dict.fromkeys(row["size"] for row in good):
            x, _ = place(next(row for row in good if row["size"] == size), low)
            parts.append(f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{size}</text>')
        for index, name in enumerate(names):
            mine = [row for row in good if row["method"] + (" (mapped)" if row["mapped"] else "") == name]
            points = [place(row, value(row)) for row in sorted(mine, key=lambda row: row["parameters"])]
            path_text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            colour = colours[index % len(colours)]
            parts.append(f'<polyline points="{path_text}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
    for index, name in enumerate(names):
        parts.append(
            f'<rect x="740" y="{34 + 18 * index}" width="10" height="10" fill="{colours[index % len(colours)]}"/>'
        )
        parts.append(f'<text x="756" y="{43 + 18 * index}">{name}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["1m", "10m", "50m", "100m", "300m"], choices=list(SIZES))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--billion", action="store_true", help="a billion parameters too: 4 GB, and the time")
    parser.add_argument("--mapped", action="store_true", help="weights mapped from a file rather than in memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=7200)
    parser.add_argument("--json", type=Path, help="append every row to this file")
    parser.add_argument("--svg", type=Path, help="plot into this file")
    parser.add_argument("--plot", type=Path, nargs="*", help="only table and plot the rows of these files")
    for name, number in (("--one", 2), ("--write", 2), ("--file", None)):
        parser.add_argument(name, nargs=number, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(*options.one, options.file, options.threads)))
        return
    if options.write:
        torch.manual_seed(0)
        ed.coding.save_weights(options.write[1], ed.models.build(f"transformer-{options.write[0]}").state_dict())
        return
    console, rows = Console(width=220), []
    if options.plot:
        rows = [json.loads(line) for path in options.plot for line in path.read_text().splitlines()]
    else:
        for size in [*options.sizes, *["1b"] * options.billion]:
            for method in options.methods:
                row = fresh(size, method, mapped=options.mapped, threads=options.threads, timeout=options.timeout)
                rows.append(row)
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    console.print(table_of(rows))
    if options.svg:
        plot(rows, options.svg)


if __name__ == "__main__":
    main()
