"""Several results beside each other: runs that differ only in their seed are one, and which of them are worth having."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from efficientdnns.errors import ConfigurationError, FileFormatError
from efficientdnns.measurement.compare import Comparison as Timed
from efficientdnns.measurement.profile import Profile
from efficientdnns.reporting.numbers import plain
from efficientdnns.reporting.recipe import base, recipe_of
from efficientdnns.reporting.trust import speeds

if TYPE_CHECKING:
    from efficientdnns.result import Report


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds of a group."""

    mean: float
    low: float
    high: float
    std: float | None
    """Standard deviation (n - 1); None of a single run."""
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of what was measured; None where nothing was."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return None
        return cls(fmean(known), min(known), max(known), stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class Axis:
    """A cost that the metric is set against; less is better."""

    key: str
    name: str
    unit: str
    """``"B"``, ``"%"`` of the dense network's, or nothing for a plain number."""
    of: Callable[[Report], float | None]
    dense: Callable[[Report], float | None]
    short: str = ""
    """Its name in a narrow table."""
    milliseconds: Callable[[Report], float | None] | None = None
    """The latency behind a share of the dense network's."""


@dataclass
class Group:
    """Results that differ in nothing but their seed."""

    runs: list[tuple[Path, Report]]
    label: str = ""
    """A short name."""
    done: str = ""
    """Its methods, and the fields in which other groups of the same methods differ."""
    number: int = 0
    fronts: list[str] = field(default_factory=list)
    """Keys of the axes on which no other group is better."""

    @property
    def report(self) -> Report:
        """The first of its reports."""
        return self.runs[0][1]

    @property
    def seeds(self) -> list[int]:
        """Seeds, ascending."""
        return sorted({report.seed for _, report in self.runs})

    def spread(self, of: Callable[[Report], float | None]) -> Spread | None:
        """A figure over its runs."""
        return Spread.of(of(report) for _, report in self.runs)

    @property
    def metric(self) -> Spread:
        """The metric on the evaluation split."""
        found = self.spread(lambda report: report.after.metric.value)
        return found or Spread(math.nan, math.nan, math.nan, None, 0)


@dataclass(frozen=True)
class Placed:
    """A group, or a dense network, on one axis."""

    group: Group | None
    name: str
    cost: Spread
    score: Spread
    best: bool
    """Whether nothing costs no more and scores no worse."""


@dataclass
class Comparison:
    """What `compare` gives: the groups in the order given, the axes that something was measured on, and warnings."""

    groups: list[Group]
    axes: list[Axis]
    warnings: list[str]

    @property
    def comparable(self) -> list[Group]:
        """The groups with the metric of the first one; only they are drawn together."""
        first = self.groups[0].report.after.metric
        return [group for group in self.groups if _metric(group.report) == (first.name, first.unit)]

    def dense(self) -> list[list[Report]]:
        """The dense networks that the runs started from, each with one report for every seed."""
        found: dict[tuple[Any, ...], dict[tuple[int, float], Report]] = {}
        for group in self.comparable:
            for _, report in group.runs:
                mine = found.setdefault(_network(report), {})
                mine.setdefault((report.seed, origin(report).metric.value), report)
        return [list(reports.values()) for reports in found.values()]

    def placed(self, axis: Axis) -> list[Placed]:
        """All that was measured on ``axis``: the groups, and the dense networks after them."""
        found: list[tuple[Group | None, str, Spread | None, Spread | None]] = [
            (group, group.label, group.spread(axis.of), group.metric) for group in self.comparable
        ]
        for reports in self.dense():
            scores = Spread.of(origin(report).metric.value for report in reports)
            found.append((None, f"{reports[0].model}, dense", Spread.of(map(axis.dense, reports)), scores))
        known = [(g, name, cost, score) for g, name, cost, score in found if cost is not None and score is not None]
        higher = self.groups[0].report.after.metric.higher_is_better
        worse = dominated([(cost.mean, score.mean) for *_, cost, score in known], higher)
        return [Placed(*entry, best=not beaten) for entry, beaten in zip(known, worse)]

    def data(self) -> dict[str, Any]:
        """As plain data."""
        figures: dict[str, Callable[[Report], float | None]] = {axis.key: axis.of for axis in self.axes}
        return {
            "warnings": self.warnings,
            "groups": [
                {
                    "number": group.number,
                    "name": group.label,
                    "methods": group.done,
                    "directories": [str(path) for path, _ in group.runs],
                    "seeds": group.seeds,
                    "metric": {"name": group.report.after.metric.name, **vars(group.metric)},
                    **{key: vars(s) if (s := group.spread(of)) else None for key, of in figures.items()},
                    "best": group.fronts,
                }
                for group in self.groups
            ],
        }


def origin(report: Report) -> Profile:
    """The dense network: that before the first method; of a result that was only trained, what it gave."""
    trained = report.methods and all(base(record.id) == "fit" for record in report.methods)
    return report.after if trained else report.before


def read(directory: str | Path) -> Report:
    """The report of a saved result.

    Raises:
        FileFormatError: the folder holds no result, or one that cannot be read.
    """
    from efficientdnns.result import SCHEMA_VERSION, Report

    path = Path(directory) / "report.json"
    if not path.is_file() and (path.parent / ".checkpoints").is_dir():
        raise FileFormatError(f"{directory} holds a run that is not finished; finish it with --resume")
    if not path.is_file():
        inside = (
            sorted(found.parent.name for found in Path(directory).glob("*/report.json")) if path.parent.is_dir() else []
        )
        hint = f"; its folders {', '.join(inside[:3])} do, write {directory}/*" if inside else ""
        raise FileFormatError(
            f"{directory} holds no result (no report.json in it); give the folder that --out named{hint}"
        )
    try:
        report = Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FileFormatError(
            f"{path} is no report ({where + ': ' if where else ''}{first['msg']}); save it again"
        ) from None
    if report.schema_version > SCHEMA_VERSION:
        raise FileFormatError(
            f"{path} has schema {report.schema_version}, this version reads {SCHEMA_VERSION}; update it"
        )
    return report


def compare(directories: Sequence[str | Path]) -> Comparison:
    """Read the results, group them by all but the seed, and find out which are worth having.

    Raises:
        FileFormatError: a folder that holds no result. ConfigurationError: no folder at all.
    """
    if not directories:
        raise ConfigurationError("there is nothing to compare; give the folders of results")
    groups: dict[str, Group] = {}
    for directory in dict.fromkeys(map(Path, directories)):
        report = read(directory)
        groups.setdefault(_identity(report), Group([])).runs.append((directory, report))
    for number, group in enumerate(groups.values(), 1):
        group.number = number
        group.runs.sort(key=lambda run: run[1].seed)
    found = Comparison(list(groups.values()), [], _warnings([run for group in groups.values() for run in group.runs]))
    _name(found.groups)
    found.axes = _axes([report for group in found.groups for _, report in group.runs])
    for axis in found.axes:
        for placed in found.placed(axis):
            if placed.group is not None and placed.best:
                placed.group.fronts.append(axis.key)
    return found


def dominated(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[bool]:
    """For each (cost, metric), whether another one costs no more and scores no worse, and is better in one of the two."""
    sign = 1 if higher_is_better else -1
    return [
        any(c <= cost and sign * m >= sign * metric and (c < cost or sign * m > sign * metric) for c, m in points)
        for cost, metric in points
    ]


def _axes(reports: Sequence[Report]) -> list[Axis]:
    counted = [("bytes", "size of the file", "B", "file"), ("macs", "MACs", "", "MACs")]
    counted += [("nonzero_params", "non-zero parameters", "", "non-zero")]
    axes = [Axis(key, name, unit, *_figure(key), short) for key, name, unit, short in counted]
    places = {(e.runtime, e.threads, e.batch): None for report in reports for e in speeds(report) if e.speedups}
    runtimes = [runtime for runtime, _, _ in places]
    for runtime, threads, batch in places:
        where = f", {threads} thread{'s' if threads > 1 else ''}, batch {batch}" if runtimes.count(runtime) > 1 else ""
        name = f"latency in {runtime}{where}"
        axes.append(_latency_axis(name, (runtime, threads, batch)))
    return [axis for axis in axes if any(axis.of(report) is not None for report in reports)]


def _figure(key: str) -> tuple[Callable[[Report], float | None], Callable[[Report], float | None]]:
    """A figure of the profile, after and of the dense network."""
    return lambda report: getattr(report.after, key), lambda report: getattr(origin(report), key)


def _latency_axis(name: str, place: tuple[str, int, int]) -> Axis:
    """Latency in per cent of the dense network's, both timed in one run: between runs a machine is not the same."""

    def timed(report: Report) -> Timed | None:
        entries = [] if origin(report) is report.after else speeds(report)
        return next((e for e in entries if (e.runtime, e.threads, e.batch) == place and e.speedups), None)

    def of(report: Report) -> float | None:
        return None if (entry := timed(report)) is None else 100 / entry.speedups[0].ratio

    def dense(report: Report) -> float | None:
        return None if timed(report) is None else 100.0

    def milliseconds(report: Report) -> float | None:
        return None if (entry := timed(report)) is None else entry.latencies[1].median

    return Axis(name, name, "%", of, dense, place[0].removeprefix("pytorch-"), milliseconds)


def _metric(report: Report) -> tuple[str, str]:
    return report.after.metric.name, report.after.metric.unit


def _network(report: Report) -> tuple[Any, ...]:
    return report.model, origin(report).params, origin(report).macs


def _identity(report: Report) -> str:
    """Everything but the seed. The model's name is that of its architecture: runs of several seeds start from several files."""
    recipe = recipe_of(report)
    fields = [[record.id, record.fields] for record in report.methods]
    asked = {key: recipe[key] for key in ("budget", "training") if key in recipe}
    content = [report.model, report.task, recipe.get("task"), fields, asked, sorted(report.splits.items())]
    return json.dumps(content, sort_keys=True, default=str)


def _name(groups: Sequence[Group]) -> None:
    """For each group what was done, with the fields in which groups of the same methods differ, and a short name: that of
    its folders without the seed, or else what was done."""
    by_chain: dict[str, list[Group]] = {}
    for group in groups:
        steps = [base(record.id) for record in group.report.methods]
        while len(steps) > 1 and steps[0] == "fit":
            steps.pop(0)
        by_chain.setdefault(" → ".join(steps) or "nothing done", []).append(group)
    for chain, members in by_chain.items():
        stated = [_flat(group.report) for group in members]
        every = dict.fromkeys(key for fields in stated for key in fields)
        keys = [key for key in every if len({plain(fields.get(key)) for fields in stated}) > 1]
        for group, fields in zip(members, stated):
            differs = ", ".join(f"{key} {plain(fields[key])}" for key in keys[:6] if fields.get(key) is not None)
            group.done = f"{chain} ({differs})" if differs else chain
    stems = [_stem(group) for group in groups]
    for group, stem in zip(groups, stems):
        group.label = (
            stem if stem and stems.count(stem) == 1 else f"{group.runs[0][0].parent.name}/{group.runs[0][0].name}"
        )


def _stem(group: Group) -> str:
    """What the folders of a group are called, without the seed at the end; empty where they have nothing in common."""
    found = set()
    for path, report in group.runs:
        pattern = rf"(^|[-_. ])(seed|s)?[-_. ]?{report.seed}$"
        path = path.resolve()
        found.add(re.sub(pattern, "", path.name) or path.parent.name)
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*found))
    stem = "".join(letters[0] for letters in same).rstrip("-_. ")
    return stem if len(found) == 1 or len(stem) > 2 else ""


def _flat(report: Report) -> dict[str, Any]:
    """Every field of a run by a short name."""
    found: dict[str, Any] = {}
    for record in report.methods:
        for key, value in record.fields.items():
            name = key if key not in found else f"{base(record.id)} {key}"
            found[name if name not in found else f"{record.id} {key}"] = value
    recipe = recipe_of(report)
    limits = recipe.get("budget") or {line["name"]: line["asked"] for line in report.budget}
    found |= {f"{name} ≤": value for name, value in limits.items()}
    found |= {f"training {name}": value for name, value in recipe.get("training", {}).items()}
    return found | {"model": report.model, "task": report.task}


def _warnings(runs: Sequence[tuple[Path, Report]]) -> list[str]:
    """One line for everything that keeps runs from being comparable."""
    found = []

    def differs(what: str, of: Callable[[Report], Any], written: Callable[[Any], str] = str) -> bool:
        values: dict[Any, Path] = {}
        for path, report in runs:
            values.setdefault(of(report), path)
        if len(values) > 1:
            told = [f"{written(value)} in {path}" for value, path in list(values.items())[:3]]
            more = f" and {len(values) - 3} more" if len(values) > 3 else ""
            found.append(f"not comparable, {what} differs: {', '.join(told)}{more}")
        return len(values) > 1

    if not differs("the task", lambda r: (r.task, *_metric(r)), lambda v: f"{v[0]} ({v[1]})"):
        differs("the number of samples of the metric", lambda r: r.after.metric.n, "{:,}".format)
    if not differs("the dense network", _network, lambda v: f"{v[0]} ({v[1] or 0:,} parameters)"):
        for seed in sorted({report.seed for _, report in runs}):
            scores = {origin(r).metric.value: path for path, r in runs if r.seed == seed}
            if len(scores) > 1:
                low, high = min(scores), max(scores)
                found.append(
                    f"not comparable, the dense network differs: with seed {seed} it scores {low:.2f} in {scores[low]} "
                    f"and {high:.2f} in {scores[high]}"
                )
                break
    return found
