"""From a recipe to a result on disk: what `efficientdnns run` and `efficientdnns compress` do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from efficientdnns.compress import compress
from efficientdnns.errors import ConfigurationError
from efficientdnns.models import build
from efficientdnns.recipe import Recipe
from efficientdnns.result import Result
from efficientdnns.task import Task


def make_task(description: dict[str, Any]) -> Task:
    """The task of a recipe: a name, folder, parquet file or ``file.py:factory`` with its options."""
    options = {key: value for key, value in description.items() if key != "name"}
    return Task.from_spec(description["name"], **options)


def make_model(description: dict[str, Any], task: Task | None = None) -> nn.Module:
    """The model of a recipe; its number of outputs follows the task unless the recipe fixes it."""
    options = {key: value for key, value in description.items() if key not in ("name", "weights")}
    if task is not None and task.num_classes is not None:
        options.setdefault("num_classes", task.num_classes)
    return build(description["name"], weights=description.get("weights"), **options)


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    seed: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    quiet: bool = False,
    latency: bool = True,
    runtimes: Sequence[str] = ("pytorch-eager",),
) -> Result:
    """Run ``recipe`` and save its result in ``out``. A killed run goes on with ``resume`` and ends with the same result.

    ``latency`` and ``runtimes`` are those of `compress`.
    """
    out = Path(out)
    seed = recipe.seed if seed is None else seed
    checkpoints = out / ".checkpoints"
    identity = json.dumps(
        [recipe.model, recipe.task, [m.fields_as_data() | {"": m.name} for m in recipe.methods], seed],
        default=str,
        sort_keys=True,
    )
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"{out} is a file, expected a folder for the result; choose another --out")
    marker = checkpoints / "recipe.json"
    if resume and checkpoints.is_dir() and (not marker.is_file() or marker.read_text() != identity):
        raise ConfigurationError(
            f"{out} holds checkpoints of another recipe or seed; choose another --out or leave out --resume"
        )
    task = make_task(recipe.task)
    torch.manual_seed(seed)  # the network's initial weights belong to the run
    model = make_model(recipe.model, task)
    if not resume and int(os.environ.get("RANK", "0")) == 0:
        shutil.rmtree(checkpoints, ignore_errors=True)
    # The marker is written with the first checkpoint's folder, after every check has passed.
    result = compress(
        model,
        task,
        recipe.methods,
        budget=recipe.budget,
        training=recipe.training,
        seed=seed,
        device=device,
        threads=threads,
        quiet=quiet,
        checkpoints=checkpoints,
        identity=identity,
        latency=latency,
        runtimes=runtimes,
    )
    result.report.recipe = replace(recipe, seed=seed).as_data()
    state = PartialState()  # under `accelerate launch` every process has the result, one writes it
    if state.is_main_process:
        result.save(out)
        shutil.rmtree(checkpoints, ignore_errors=True)
    state.wait_for_everyone()
    return result
