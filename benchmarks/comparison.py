"""Methods side by side: every arm of a comparison, with every seed, under one budget and one training allowance.

    python benchmarks/comparison.py recipes/compare/structured-resnet20.yaml --out runs/compare [--arms 'depgraph*']
        [--seeds 3] [--threads 1] [--markdown]

The file is a recipe whose methods are written once per arm. Every (arm, seed) becomes a result of its own under --out; one
that is there is not run again, and one that was killed goes on where it stopped. At the end all results are set side by
side in compare.html and in a table of means and standard deviations.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from table import show

import efficientdnns as ed
from efficientdnns.recipe import Recipe, compose, construct
from efficientdnns.reporting import compare, compare_page, write_page
from efficientdnns.result import Report


def folder(name: str, seed: int) -> str:
    """``"taylor, global"`` with seed 1 -> ``taylor-global-1``."""
    return f"{re.sub('[^a-z0-9.]+', '-', name.lower()).strip('-')}-{seed}"


def recipes(path: Path) -> tuple[dict[str, Recipe], list[int]]:
    """The recipe of every arm by name, and the seeds; all are checked before the first one runs."""
    node = compose(path.read_text(), str(path))
    assert node is not None
    data: dict[str, Any] = construct(node)
    arms, seeds, allowance = data.pop("arms"), data.pop("seeds"), data.pop("epochs")
    text = data.pop("description", "").replace("{epochs}", str(allowance))
    made = {}
    for name, methods in arms.items():
        written = yaml.safe_dump({"description": f"{name}: {text}", **data, "methods": methods}, sort_keys=False)
        recipe = Recipe.parse(written, f"{path}, arm '{name}'")
        spent = sum(_epochs(method) for method in recipe.methods)
        if spent != allowance:
            raise ed.ConfigurationError(f"{path}: arm '{name}' trains {spent} epochs, the allowance is {allowance}")
        made[name] = recipe
    return made, seeds


def _epochs(method: ed.Method) -> int:
    own = method.total_epochs if isinstance(method, ed.TrainingMethod) else getattr(method, "epochs", 0)
    after = 0 if _counts_retraining(method) else getattr(method, "retrain_epochs", 0)
    return int(own) + int(after) + int(getattr(method, "auxiliary_epochs", 0))


def _counts_retraining(method: ed.Method) -> bool:
    """Whether the method's total has its retraining in it (it is one run)."""
    return isinstance(method, ed.TrainingMethod) and type(method).total_epochs is not ed.TrainingMethod.total_epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default="*", help="name patterns, several with semicolons")
    parser.add_argument("--seeds", type=int, help="only the first so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    arms, seeds = recipes(options.recipe)
    chosen = {n: r for n, r in arms.items() if any(fnmatch.fnmatch(n, p) for p in options.arms.split(";"))}
    results: dict[str, list[Report]] = {}
    for seed in seeds[: options.seeds]:
        for name, recipe in chosen.items():
            out = options.out / folder(name, seed)
            if not (out / "report.json").is_file():
                ed.run(recipe, out, seed=seed, resume=True, threads=options.threads, quiet=True, latency=False)
            results.setdefault(name, []).append(Report.model_validate_json((out / "report.json").read_text()))
            print(f"{name}, seed {seed}: {results[name][-1].after.metric}", file=sys.stderr, flush=True)
    page = write_page(options.out / "compare.html", compare_page(compare(sorted(options.out.glob("*-[0-9]*")))))
    rows = [row(name, reports) for name, reports in results.items()]
    titles = ["method", "metric", "+-", "n", "MACs", "parameters", "bytes", "training s"]
    show(titles, rows, options.markdown)
    print(f"written to {page}", file=sys.stderr)


def row(name: str, reports: list[Report]) -> list[str]:
    """Mean and deviation of an arm, and what its network costs."""
    metrics = [report.after.metric.value for report in reports if report.after.metric]
    spread = f"{statistics.stdev(metrics):.2f}" if len(metrics) > 1 else "-"

    def share(key: str) -> str:
        return f"{statistics.mean(getattr(r.after, key) / getattr(r.before, key) for r in reports):.3f}"

    seconds = statistics.mean(sum(entry.get("seconds", 0.0) for entry in report.history) for report in reports)
    costs = [share("macs"), share("nonzero_params"), share("bytes")]
    return [name, f"{statistics.mean(metrics):.2f}", spread, str(len(metrics)), *costs, f"{seconds:.0f}"]


if __name__ == "__main__":
    main()
