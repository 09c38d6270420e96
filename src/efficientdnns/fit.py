"""Plain training: as a step of a recipe and as a function."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from efficientdnns.errors import ConfigurationError
from efficientdnns.method import TrainingMethod
from efficientdnns.progress import Progress
from efficientdnns.session import Session
from efficientdnns.task import Task
from efficientdnns.training import Callback, TrainingSettings


class Fit(TrainingMethod):
    """Ordinary training on the task's own loss: to make the dense network, or to fine-tune after a method."""

    name: ClassVar[str] = "fit"
    kind: ClassVar[str] = "training"

    def callback(self, session: Session) -> Callback:
        return Callback()


def fit(
    model: nn.Module,
    task: Task,
    epochs: int = 10,
    *,
    seed: int = 0,
    device: str | None = None,
    quiet: bool = False,
    checkpoints: str | Path | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train ``model`` in place and return the history, one dict an epoch.

    ``settings`` are those of `TrainingSettings` (``learning_rate``, ``optimizer``, ``batch_size``, ...). With a folder
    for ``checkpoints`` an interrupted call goes on from its last epoch.

    >>> fit(model, Task.from_name("digits"), epochs=5, learning_rate=0.1)  # doctest: +SKIP
    """
    torch.manual_seed(seed)
    session = Session(
        model=model,
        task=task,
        original=model,
        settings=TrainingSettings(**settings),
        seed=seed,
        accelerator=make_accelerator(device, settings.get("mixed_precision", "no")),
        progress=Progress(quiet=quiet),
        directory=Path(checkpoints) if checkpoints else None,
    )
    return session.train(epochs=epochs)


def make_accelerator(device: str | None = None, mixed_precision: str = "no") -> Accelerator:
    """The devices and processes of a run: what `accelerate launch` set up, else one GPU, else the CPU; or ``device``."""
    if device not in (None, "auto", "cpu", "cuda", "mps"):
        raise ConfigurationError(f"device is '{device}', expected one of auto, cpu, cuda, mps")
    there: dict[str | None, Any] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device in there and not there[device]():
        raise ConfigurationError(f"device '{device}' is not available on this machine; write cpu or auto")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # Accelerate keeps device and precision for the life of a process; here every run chooses its own.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision)
