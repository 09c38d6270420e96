"""Reproductions: a recipe per published figure, run and recorded with the figure beside ours."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from efficientdnns.budget import Budget
from efficientdnns.errors import ConfigurationError, suggest
from efficientdnns.fit import Fit
from efficientdnns.recipe import Recipe
from efficientdnns.run import run


def folder() -> Path:
    """Where the reproductions lie: beside the package when installed, else in the source tree."""
    installed = Path(__file__).parent / "_reproductions"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "reproductions"


def names() -> list[str]:
    """The ids that have a reproduction."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def recorded(name: str) -> list[dict[str, Any]]:
    """The recorded outcomes of reproduction ``name`` with the notes on their runs; empty where nothing was recorded."""
    path = folder() / f"{name}.json"
    if not path.is_file():
        return []
    notes = {
        run["name"]: run.get("note", "") for run in yaml.safe_load((folder() / f"{name}.yaml").read_text())["runs"]
    }
    return [{**outcome, "note": notes.get(outcome["run"], "")} for outcome in json.loads(path.read_text())["results"]]


def reproduce_all(
    name: str,
    *,
    out: Path,
    smoke: bool = False,
    only: str | None = None,
    record: bool = False,
    resume: bool = False,
    device: str | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Run every run of ``reproductions/NAME.yaml`` for each of its seeds and return the outcomes.

    The file holds ``runs``, each with a ``name``, the ``paper``'s figures (any keys; ``text`` in words), a ``recipe``,
    ``seeds``, a ``note`` on what differs from the paper, and under ``smoke`` the recipe keys that a smoke run replaces.
    """
    path = folder() / f"{name}.yaml"
    if not path.is_file():
        raise ConfigurationError(f"there is no reproduction of '{name}'{suggest(name, names())}")
    definition = yaml.safe_load(path.read_text())
    runs = [r for r in definition["runs"] if only in (None, r["name"])]
    if not runs:
        raise ConfigurationError(
            f"{name} has no run '{only}'{suggest(only or '', [r['name'] for r in definition['runs']])}"
        )
    results = []
    for item in runs:
        content = {**item["recipe"], **(item.get("smoke", {}) if smoke else {})}
        recipe = Recipe.parse(yaml.safe_dump(content, sort_keys=False), f"{path.name} run {item['name']}")
        for seed in [0] if smoke else item.get("seeds", [0]):
            started = time.perf_counter()
            place = out / name / ("smoke" if smoke else "full")
            options: dict[str, Any] = {"seed": seed, "device": device, "threads": threads, "quiet": quiet}
            start = _from_dense(recipe, place, options)
            result = run(start, place / f"{item['name']}-{seed}", resume=resume, latency=not smoke, **options)
            report = result.report
            outcome = {
                "run": item["name"],
                "seed": seed,
                "paper": item.get("paper", {}),
                "paper_text": item.get("paper", {}).get("text", ""),
                "before": report.before.model_dump(exclude={"by_layer"}),
                "after": report.after.model_dump(exclude={"by_layer"}),
                "methods": [m.model_dump() for m in report.methods],
                "seconds": time.perf_counter() - started,
                "environment": report.environment,
            }
            outcome["ours_text"] = _in_words(outcome)
            results.append(outcome)
            if record and not smoke:
                _record(name, outcome)
    return results


def _from_dense(recipe: Recipe, place: Path, options: dict[str, Any]) -> Recipe:
    """The recipe with its leading `fit` steps done: runs that begin alike start from the very same dense network."""
    fits = [
        step
        for position, step in enumerate(recipe.methods)
        if all(isinstance(s, Fit) for s in recipe.methods[: position + 1])
    ]
    if not fits or len(fits) == len(recipe.methods):
        return recipe
    training = recipe.training.model_dump()
    begin = [recipe.model, recipe.task, training, [step.fields_as_data() for step in fits], options["seed"]]
    dense = place / f"dense-{hashlib.sha256(json.dumps(begin, sort_keys=True).encode()).hexdigest()[:12]}"
    if not (dense / "report.json").is_file():
        run(replace(recipe, methods=fits, budget=Budget()), dense, resume=True, latency=False, **options)
    return replace(recipe, model={"name": str(dense)}, methods=recipe.methods[len(fits) :])


def _in_words(outcome: dict[str, Any]) -> str:
    before, after = outcome["before"], outcome["after"]
    metric = f"{after['metric']['name']} {before['metric']['value']:.2f} → {after['metric']['value']:.2f}"
    parts = [metric]
    for key, label in (("nonzero_params", "parameters"), ("macs", "MACs"), ("bytes", "bytes")):
        if before.get(key) and after.get(key):
            parts.append(f"{label} {before[key] / after[key]:.2f}x")
    return ", ".join(parts)


def _record(name: str, outcome: dict[str, Any]) -> None:
    path = folder() / f"{name}.json"
    kept = [r for r in recorded(name) if (r["run"], r["seed"]) != (outcome["run"], outcome["seed"])]
    results = [{k: v for k, v in r.items() if k != "note"} for r in [*kept, outcome]]
    results.sort(key=lambda r: (r["run"], r["seed"]))
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"results": results}, indent=1) + "\n")
    os.replace(partial, path)
