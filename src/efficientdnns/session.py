"""Everything that a method may touch while it works."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from efficientdnns.budget import Budget
from efficientdnns.data import nested
from efficientdnns.errors import DataError
from efficientdnns.measurement.latency import Runner, measure_latency
from efficientdnns.measurement.runtimes import runner
from efficientdnns.progress import Progress
from efficientdnns.storage import unshare
from efficientdnns.task import Task
from efficientdnns.training import Callback, Trainer, TrainingSettings
from efficientdnns.training.sparsity import KeepZeros


@dataclass
class Session:
    """The state of one `compress` run, handed to every method in turn.

    A method changes ``model`` (in place or by assignment), trains through `train`, scores candidates through `evaluate`
    on the calibration split, tries things on a `branch`, and records what it found with `report`.
    """

    model: nn.Module
    """The network being compressed."""
    task: Task
    """Data, loss and metric. Methods see the train and calibration splits; the evaluation split is the report's alone."""
    original: nn.Module
    """The network as it was before the first method, frozen, in eval mode: the default teacher."""
    budget: Budget = field(default_factory=Budget)
    settings: TrainingSettings = field(default_factory=TrainingSettings)
    seed: int = 0
    accelerator: Accelerator = field(default_factory=lambda: Accelerator(cpu=True))
    progress: Progress = field(default_factory=lambda: Progress(quiet=True))
    directory: Path | None = None
    """Where checkpoints go; None keeps none."""
    label: str = "fit"
    """Name of the method at work, for progress and history."""
    history: list[dict[str, Any]] = field(default_factory=list)
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each method reported about its work, by label."""
    codecs: dict[str, Any] = field(default_factory=dict)
    """How tensors of the final file are to be coded, by state-dict name; the rest is coded by what is smallest."""
    sparse: set[str] = field(default_factory=set)
    """Parameters whose zeros later training must keep."""
    runs: int = 0
    """Training runs so far; numbers the checkpoints."""
    solvers: dict[str, Any] = field(default_factory=dict)
    """For each limit of the budget the method that has to meet it: the last one of the chain that can."""
    original_latency: float | None = None
    """Milliseconds of the original in the budget's runtime, once it was timed."""
    _original_runner: tuple[nn.Module, Runner] | None = field(default=None, init=False, repr=False)
    """The original in the budget's runtime, exported once."""

    @property
    def device(self) -> torch.device:
        """Where the work happens."""
        return self.accelerator.device

    def train(
        self,
        callbacks: Sequence[Callback] = (),
        *,
        epochs: int,
        task: Task | None = None,
        model: nn.Module | None = None,
        validate: bool = True,
        seed: int | None = None,
        start: int = 0,
        until: int | None = None,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """One training run of ``model`` (default: the session's) and its history.

        ``settings`` override the session's `TrainingSettings`. A finished run is not repeated when a session is
        resumed: its last checkpoint is loaded and ``finish`` of its callbacks runs again. Every run has an order of data
        of its own unless ``seed`` says otherwise; ``start`` and ``until`` run only a stretch of it (`Trainer`).
        """
        self.runs += 1
        self.unshare(model)
        # Zeros of earlier pruning survive; methods that only change the loss need not know.
        keep = [KeepZeros(self.sparse)] if self.sparse and model is None else []
        trainer = Trainer(
            self.model if model is None else model,
            task or self.task,
            [*callbacks, *keep],
            epochs=epochs,
            settings=self.settings.override(**settings),
            accelerator=self.accelerator,
            seed=self.seed * 1000 + self.runs if seed is None else seed,
            label=self.label,
            checkpoint=self.directory / f"run-{self.runs:03d}.safetensors" if self.directory else None,
            progress=self.progress,
            validate=validate,
            start=start,
            until=until,
        )
        history = trainer.fit()
        if model is None:
            self.model = trainer.model
        self.history.extend(history)
        return history

    def unshare(self, model: nn.Module | None = None) -> None:
        """Give ``model`` (default: the session's) tensors of its own where it still shares memory with the original.

        Called before training and before methods that write in place (`Method.in_place`).
        """
        model = self.model if model is None else model
        if model is not self.original:
            unshare(model, self.original)

    def branch(self) -> Session:
        """A copy that can be changed, trained, scored and thrown away without a trace in this session."""
        return Session(
            model=copy.deepcopy(self.model),
            task=self.task,
            original=self.original,
            budget=self.budget,
            settings=self.settings,
            seed=self.seed,
            accelerator=self.accelerator,
            label=f"{self.label} (branch)",
            sparse=set(self.sparse),
        )

    def evaluate(self, model: nn.Module | None = None, *, limit: int | None = None) -> float:
        """The task's metric on the calibration split: for choices, never for claims."""
        return self.task.evaluate(model or self.model, "calibration", device=self.device, limit=limit).value

    def latency(self, model: nn.Module, times: int = 1) -> float:
        """Median milliseconds of one call of ``model`` in the runtime of the budget.

        It is timed in turn with the original, and what counts is how they compare: the figure is the original's first
        median times the ratio of the tenth percentiles, which (unlike the ratio of the medians) stays within a few per
        cent on a machine that is busy with other things. So the figures of several calls can be compared. With ``times``
        it is the median of as many measurements of a second each.
        """
        if self._original_runner is None or self._original_runner[0] is not self.original:
            self._original_runner = self.original, runner_for(self.budget.runtime, self.original, self.task)
        runners = [self._original_runner[1], runner_for(self.budget.runtime, model, self.task)]
        ratios = []
        for _ in range(times):
            before, after = measure_latency(runners, self.task.example_input, repeats=500, seconds=1.0)
            self.original_latency = self.original_latency or before.median
            ratios.append(after.p10 / before.p10)
        assert self.original_latency is not None
        return self.original_latency * statistics.median(ratios)

    def calibration(self, samples: int, batch_size: int = 128) -> Iterator[Any]:
        """Inputs of the first ``samples`` calibration samples, in batches on the session's device."""
        if self.task.calibration is None:
            raise DataError(f"task '{self.task.name}' has no calibration split; give one or more training data")
        seen = 0
        for batch in self.task.calibration.batches(min(batch_size, samples)):
            inputs = nested.first(batch.inputs, samples - seen)
            seen += nested.length(inputs)
            yield nested.to_device(inputs, self.device)
            if seen >= samples:
                return

    def teacher(self, network: Any = "original") -> nn.Module:
        """A frozen network in eval mode: ``"original"``, a model name, a saved result or an ``nn.Module``."""
        if isinstance(network, nn.Module):
            teacher = copy.deepcopy(network)
        elif network == "original":
            teacher = self.original
        else:
            from efficientdnns.models import build

            teacher = build(network, num_classes=self.task.num_classes)
        return teacher.to(self.device).eval().requires_grad_(False)

    @property
    def example_input(self) -> Any:
        """A batch of one on the session's device."""
        return nested.to_device(self.task.example_input, self.device)

    def report(self, **finding: Any) -> None:
        """Record what the method at work found (JSON-able); it stands in the report under the method's name."""
        self.findings.setdefault(self.label, {}).update(finding)

    def say(self, text: str) -> None:
        """One line of progress."""
        self.progress.say(f"{self.label}: {text}")


def runner_for(runtime: str, model: nn.Module, task: Task) -> Runner:
    """``model`` in a runtime, on the CPU, as `efficientdnns.measurement.latency.measure_latency` takes it."""
    if any(p.device.type != "cpu" for p in model.parameters()):
        model = copy.deepcopy(model).cpu()
    return runner(runtime, model, task.example_input, task.outputs)
