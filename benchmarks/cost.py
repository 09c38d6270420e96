"""What each method of the pruning and coding rooms costs as the network grows: processor time and peak memory.

    python benchmarks/cost.py [--sizes 1m 10m 100m] [--methods 'nisp' '*magnitude*'] [--timeout 60] [--json FILE [--reuse]]

The networks are ResNet-20s for 8x8 images, wide enough to have as many parameters as the size says: all of these methods
can do them. Data are random: 4 steps of 8 images are an epoch, and 32 images calibrate. Every method takes the short
settings of its contract tests (an epoch or two, few samples), so figures say how the cost grows, not what the paper's
schedule takes. Every cell is a fresh process that did the same on a tiny network first.

- Seconds: what the process computed in the method's `apply` alone (training included; tracing for checks beforehand and
  measurement afterwards not).
- (1.2x): those seconds divided by what as many steps of plain `fit` cost; only where the method trains. Steps are few and
  small, so all that a method does once, or to every weight at each step, weighs more than on real data
  (`benchmarks/training.py` compares steps alone); steps after channels were removed are cheaper than those of `fit`.
  Where channels are removed, tracing the network takes a second or more at every size.
- Memory: highest resident set during `apply`, above that before the network was built, as a multiple of the bytes of the
  network's parameters. The caller's network is the first 1.0; the row of `fit` says what training alone takes.
- Growth: g where seconds grow as parameters^g between the two largest networks; 1 is in proportion. Linux only.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import multiprocessing
import resource
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from scaling import Phases
from table import show
from torch import Tensor

import efficientdnns as ed
from efficientdnns.errors import EfficientDNNsError
from efficientdnns.method import Method
from efficientdnns.session import Session
from efficientdnns.training import Trainer

WIDTHS = {"1m": 1.93, "10m": 6.1, "100m": 19.33}
"""Multiples of ResNet-20's 16, 32 and 64 channels."""
BATCH, STEPS = 8, 4
FIELDS: dict[str, dict[str, Any]] = {
    "olmp": {"evaluations": 10},
    "nonlinear-reconstruction-pruning": {"refine_steps": 2},
}
"""What a method is told beside its contract fields: less of what it repeats at its own pace."""


class Applied(BaseException):
    """The method is through: nothing behind it is run."""


def make_task() -> ed.Task:
    """Random images with random labels: enough to run everything that a real task runs."""
    generator = torch.Generator().manual_seed(0)

    def part(samples: int) -> tuple[Tensor, Tensor]:
        images = torch.randn(samples, 3, 8, 8, generator=generator)
        return images, torch.randint(0, 10, (samples,), generator=generator)

    return ed.Task.from_tensors(part(BATCH * STEPS), part(BATCH), part(32), num_classes=10)


def names() -> list[str]:
    """Plain training, the yardstick, and every method of the two rooms."""
    return ["fit", *(method.name for kind in ("pruning", "coding") for method in ed.methods(kind))]


def make(name: str) -> Method:
    """The method with its short settings."""
    if name == "fit":
        return ed.Fit(epochs=2)
    kind = ed.method.get(name)
    return kind(**{**kind.contract_fields, **FIELDS.get(name, {})})


def cost_of(width: float, name: str, timeout: float, threads: int) -> dict[str, Any]:
    """Compress one network in this process up to the end of `apply`; ``timeout`` processor seconds there kill it."""
    phases, method, task, steps = Phases(), make(name), make_task(), 0
    apply, fit = type(method).apply, Trainer.fit

    def applied(self: Method, session: Session) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(usage.ru_utime + usage.ru_stime + timeout)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        with phases.phase("method"):
            apply(self, session)
        raise Applied

    def counted(trainer: Trainer) -> list[dict[str, Any]]:
        nonlocal steps
        before = trainer.step
        history = fit(trainer)
        steps += trainer.step - before
        return history

    torch.manual_seed(0)
    model = ed.models.build("cifar-resnet20", width=width)
    parameters = list(model.parameters())
    with patch.object(type(method), "apply", applied), patch.object(Trainer, "fit", counted):
        try:
            training = {"batch_size": BATCH, "learning_rate": 0.001}
            ed.compress(model, task, method, training=training, quiet=True, latency=False, threads=threads)
        except Applied:
            pass
    size = sum(p.numel() * p.element_size() for p in parameters)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "seconds": phases.seconds["method"],
        "memory": phases.peaks["method"] / size,
        "steps": steps,
    }


def run_one(size: str, name: str, timeout: float, threads: int, answer: Connection) -> None:
    """A tiny network, then the real one; sends what it cost or why not."""
    torch.set_num_threads(threads)
    try:
        cost_of(0.25, name, timeout, threads)
        answer.send(cost_of(WIDTHS[size], name, timeout, threads))
    except EfficientDNNsError as error:
        answer.send({"error": f"refused: {error}"})
    except Exception as error:
        traceback.print_exc()
        answer.send({"error": f"failed: {type(error).__name__}: {error}".splitlines()[0]})


def fresh(size: str, name: str, timeout: float, threads: int) -> dict[str, Any]:
    """`run_one` in a process of its own, forked from one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["efficientdnns", "torch._dynamo", "torch.export._trace"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_one, args=(size, name, timeout, threads, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        code = -(process.exitcode or 0)
        found = {"error": f"> {timeout:g} s" if code == signal.SIGXCPU else f"killed by signal {code}"}
    process.join()
    return {"size": size, "method": name, "threads": threads, **found}


def lines_of(rows: Sequence[dict[str, Any]], sizes: Sequence[str]) -> list[list[str]]:
    """The cells of the table, headings first."""
    found = {(row["method"], row["size"]): row for row in rows}
    lines = [["method", "steps", *(f"{size}{what}" for size in sizes for what in ("", " memory")), "growth"]]
    for name in names():
        mine = [found.get((name, size), {"error": ""}) for size in sizes]
        if not any(row.get("error") != "" for row in mine):
            continue
        good = [row for row in mine if "error" not in row]
        line = [name, str(good[-1]["steps"] or "") if good else ""]
        for size, row in zip(sizes, mine):
            if "error" in row:
                line += [row["error"], ""]
                continue
            plain, ratio = found.get(("fit", size), {"error": ""}), ""
            if row["steps"] and "error" not in plain:
                ratio = f" ({row['seconds'] / row['steps'] * plain['steps'] / plain['seconds']:.1f}x)"
            line += [f"{row['seconds']:.1f} s{ratio}", f"{row['memory']:.1f}"]
        if len(good) > 1:
            less, more = good[-2:]
            growth = math.log(more["seconds"] / less["seconds"]) / math.log(more["parameters"] / less["parameters"])
            line.append(f"{growth:.2f}")
        lines.append(line + [""] * (len(lines[0]) - len(line)))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--methods", nargs="*", default=["*"], help="names or patterns such as '*pruning'")
    parser.add_argument("--timeout", type=float, default=60, help="processor seconds of a method's apply")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append every row to this file")
    parser.add_argument(
        "--reuse", action="store_true", help="do not run again what that file has; it all stands in the table"
    )
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.reuse and options.json and options.json.exists():
        rows = [json.loads(line) for line in options.json.read_text().splitlines()]
        rows = [row for row in rows if row["threads"] == options.threads]
    done = {(row["method"], row["size"]) for row in rows}
    for size in options.sizes:
        for name in names():
            if (name, size) in done or not any(fnmatch.fnmatch(name, pattern) for pattern in options.methods):
                continue
            rows.append(fresh(size, name, options.timeout, options.threads))
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    lines = lines_of(rows, [size for size in WIDTHS if any(row["size"] == size for row in rows)])
    show(lines[0], lines[1:], options.markdown, f"seconds of apply (times fit), {options.threads} thread(s)")


if __name__ == "__main__":
    main()
