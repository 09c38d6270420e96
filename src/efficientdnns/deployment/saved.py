"""Exporting a saved result: what ``efficientdnns export`` does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from efficientdnns.deployment.export import SIZES, Exported, check_format, export
from efficientdnns.deployment.extras import need
from efficientdnns.deployment.files import replacing
from efficientdnns.deployment.inputs import noise
from efficientdnns.errors import ConfigurationError, DataError, FileFormatError

if TYPE_CHECKING:
    from efficientdnns.task import Task


def export_saved(
    directory: str | Path,
    format: str,
    *,
    file: str | Path | None = None,
    batch: int | None = None,
    task: Task | None = None,
    model: nn.Module | None = None,
) -> Exported:
    """Load the result in ``directory`` and write it in ``format``, beside it unless ``file`` says where.

    A file beside the result is listed in its ``report.json``.

    Args:
        batch: fix the batch to this size.
        task: the data to compare on (and to calibrate with); by default the data set that the report names, where it is
            one that this library knows and finds, else noise of the shape and range that the report states.
        model: what `efficientdnns.load` needs for a network of the caller's.

    Raises:
        ConfigurationError: an unknown format, a package that is not installed, or no way to know the inputs.
        FileFormatError: the folder holds no result. ModelError: it cannot be exported.
    """
    from efficientdnns.result import load

    known = check_format(format)
    need(known.extra, *known.packages)
    directory = Path(directory)
    network = load(directory, model)
    report = _report(directory)
    task = task or _task_of(report)
    samples, forward = None, None
    calibration: Iterable[Any] = ()
    if task is not None:
        split = task.evaluation or task.calibration or task.train
        example, forward = task.example_input, task.outputs
        if split is not None:
            samples = next(iter(split.batches(sum(SIZES)))).inputs
        if task.calibration is not None:
            calibration = (part.inputs for part in task.calibration.batches(32))
    elif report.get("inputs") is not None:
        example, samples = noise(report["inputs"], 1), noise(report["inputs"], sum(SIZES))
    else:
        raise ConfigurationError(f"{directory} does not say what its inputs look like; add --task with the data")
    exported = export(
        network,
        example,
        directory,
        format,
        file=file,
        batch=batch,
        forward=forward,
        samples=samples,
        calibration=calibration,
    )
    if task is None:
        exported = exported.model_copy(update={"note": "; ".join(filter(None, [exported.note, "compared on noise"]))})
    if file is None and report:
        others = [entry for entry in report.get("exports", []) if entry["format"] != format]
        report["exports"] = [*others, exported.model_dump()]
        with replacing(directory / "report.json") as partial:
            partial.write_text(json.dumps(report, indent=1))
    return exported


def _report(directory: Path) -> dict[str, Any]:
    path = directory / "report.json"
    if not path.is_file():
        return {}
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError:
        raise FileFormatError(f"{path} is not a report of this library; save the result again") from None
    return report


def _task_of(report: dict[str, Any]) -> Task | None:
    """The task of the report, where it is a data set that can be had again."""
    from efficientdnns.data.named import names
    from efficientdnns.task import Task

    name = report.get("task")
    if name not in names():
        return None
    try:
        task = Task.from_name(name)
    except DataError:
        return None
    return task if _fits(report.get("inputs"), task.example_input) else None


def _fits(description: Any, example: Any) -> bool:
    """Whether the inputs of the data set, as it is by default, are those that the network takes."""
    from efficientdnns.deployment.inputs import describe

    if description is None:
        return True
    found = describe(example)
    return all(found.get(key) == description.get(key) for key in ("shape", "dtype"))
