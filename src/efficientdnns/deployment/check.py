"""The one check that every result must pass: saved, loaded again, exported, opened, compared."""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from efficientdnns.deployment.export import FORMATS, SIZES, Exported, compare, of_shape
from efficientdnns.deployment.inputs import noise
from efficientdnns.deployment.integers import has_integers
from efficientdnns.deployment.opened import in_batches
from efficientdnns.errors import FileFormatError, ModelError
from efficientdnns.measurement.inference import Forward

if TYPE_CHECKING:
    from efficientdnns.result import Result


def check_result(
    result: Result | str | Path,
    *,
    inputs: Any = None,
    model: nn.Module | None = None,
    forward: Forward | None = None,
    needs: tuple[str, ...] = ("pt2", "onnx"),
) -> list[Exported]:
    """Check a result, saved or to be saved, and return what was exported of it.

    It is loaded from its folder as anybody would, every exported file is opened anew, and both must give the same
    outputs on batches of two sizes.

    Args:
        result: a result, which is saved to a folder that is thrown away, or the folder of a saved one.
        inputs: real inputs; for a folder by default noise of the shape that the report states.
        model: what `load` needs for a network of the caller's.
        forward: how the network is called, for a folder.
        needs: formats that must be there.

    Raises:
        ModelError, FileFormatError: what is wrong, in one line.
    """
    from efficientdnns.result import Result

    if isinstance(result, Result):
        with tempfile.TemporaryDirectory() as folder:
            result.save(folder)
            given = result.samples(sum(SIZES)) if inputs is None else inputs
            return check_result(folder, inputs=given, model=result.original, forward=result.forward, needs=needs)
    return _check_folder(Path(result), inputs, model, forward, needs)


def _check_folder(
    folder: Path, inputs: Any, model: nn.Module | None, forward: Forward | None, needs: tuple[str, ...]
) -> list[Exported]:
    from efficientdnns.result import load

    factory = json.loads((folder / "structure.json").read_text())["factory"]
    network = load(folder, model if factory is None else None)
    report = json.loads((folder / "report.json").read_text())
    if not report["reload_exact"]:
        raise ModelError(f"{folder} was not loaded again to the same outputs")
    exports = [Exported(**entry) for entry in report["exports"]]
    samples = noise(report["inputs"], sum(SIZES)) if inputs is None else inputs
    for exported in exports:
        if exported.error:
            continue
        known = FORMATS[exported.format]
        path = folder / known.file
        if not path.is_file():
            raise FileFormatError(f"{path} is named in the report but not there; save the result again")
        file = importlib.import_module(f"efficientdnns.deployment.{known.module}").open_file(path)
        opened = file if exported.batch is None else in_batches(file, exported.batch)
        fitting = (
            samples if exported.sizes is None else of_shape(samples, exported.sizes) or [torch.zeros(exported.sizes)]
        )
        # Integers are computed with other kernels everywhere but in model.pt2.
        exact = known.exact and (exported.format == "pt2" or not has_integers(network))
        compare(network, opened, fitting, forward=forward, exact=exact)
    for name in needs:
        found = next((exported for exported in exports if exported.format == name), None)
        if found is None or found.error:
            raise ModelError(f"{folder} has no {FORMATS[name].file}: {found.error if found else 'not asked for'}")
    return exports
