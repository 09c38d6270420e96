"""One training run: a thin loop over Accelerate with hooks, a checkpoint every epoch and exact resumption."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from efficientdnns.data.split import Batch
from efficientdnns.errors import ConfigurationError, DataError, ModelError
from efficientdnns.layout import arrange_state, arranged, fitting_layout, lay_out
from efficientdnns.progress import Progress
from efficientdnns.storage import keeping_memory
from efficientdnns.training.callback import Callback, overriding
from efficientdnns.training.checkpoint import load_state, random_state, restore_random_state, save_state
from efficientdnns.training.schedule import factor
from efficientdnns.training.settings import TrainingSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from efficientdnns.task import Task

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "nesterov": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


class Trainer:
    """Trains ``model`` on ``task.train`` while the callbacks act.

    Attributes that callbacks may read: ``model`` (may be replaced in ``finish``), ``task``, ``settings``, ``optimizer``,
    ``device``, ``epoch`` (from 0), ``epochs``, ``step`` (optimizer steps so far), ``steps_per_epoch``, ``total_steps``,
    ``samples`` (training-set size N), ``accelerator``, ``batch`` and ``outputs`` of the current step.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        callbacks: Sequence[Callback] = (),
        *,
        epochs: int,
        settings: TrainingSettings | None = None,
        accelerator: Accelerator,
        seed: int = 0,
        label: str = "training",
        checkpoint: Path | None = None,
        progress: Progress | None = None,
        validate: bool = True,
        start: int = 0,
        until: int | None = None,
    ) -> None:
        """Data, settings and hooks of one run of ``epochs`` epochs.

        With ``start`` and ``until`` (optimizer steps) only that stretch of it is run: schedule and data order are those
        of the whole.
        """
        # A run of no epochs (a method that may work at once) draws no batch.
        split = task.train if task.train is not None or epochs else task.evaluation
        if split is None:
            raise DataError(f"{label} needs training data, but task '{task.name}' has none; give a train split")
        self.model, self.task, self.callbacks = model, task, list(callbacks)
        self.epochs, self.settings, self.seed, self.label = epochs, settings or TrainingSettings(), seed, label
        self.accelerator, self.checkpoint, self.progress = accelerator, checkpoint, progress or Progress(quiet=True)
        self.validate = validate and task.calibration is not None and task.has_labels
        self.device: torch.device = accelerator.device
        self.train_split = split
        self.samples = len(self.train_split)
        self.steps_per_epoch = self.train_split.number_of_batches(
            self.settings.batch_size, world_size=accelerator.num_processes, drop_last=self._drop_last
        )
        self.total_steps = max(1, self.steps_per_epoch * epochs)
        self.epoch, self.step = start // max(1, self.steps_per_epoch), start
        self.until = self.total_steps if until is None else until
        self.history: list[dict[str, Any]] = []
        self.batch: Batch | None = None
        self.outputs: Any = None
        owners = overriding(self.callbacks, "training_step")
        if len(owners) > 1:
            names = " and ".join(type(owner).__name__ for owner in owners)
            raise ConfigurationError(f"{names} both own the training step; run them one after the other")
        self._own_step = owners[0].training_step if owners else None
        self._hooks = {
            hook: overriding(self.callbacks, hook)
            for hook in ("batch", "task_loss", "penalty", "learning_rate", "after_backward", "after_step", "validation")
        }

    @property
    def _drop_last(self) -> bool:
        return self.samples >= self.settings.batch_size

    def fit(self) -> list[dict[str, Any]]:
        """Run to the end (from the checkpoint where there is one) and return the history, one entry an epoch."""
        self.model.to(self.device)
        self.layout = torch.contiguous_format
        if self.epochs:
            self.layout = fitting_layout(self.model, self.task.example_input, self.task.outputs)
        lay_out(self.model, self.layout)  # before callbacks see the weights, which they may hold on to
        for callback in self.callbacks:
            callback.setup(self)
        self.model.to(self.device)
        self.optimizer = self._make_optimizer()
        distributed = self.accelerator.num_processes > 1
        self.network = self.accelerator.prepare_model(self.model) if distributed else self.model
        self._stepper = self.accelerator.prepare_optimizer(self.optimizer)
        if not self._resume():
            for callback in self.callbacks:
                callback.start(self)
        whole = self.epochs * self.steps_per_epoch
        with keeping_memory(), self.progress.task(self.label, whole, done=self.step) as bar:
            while self.epoch < self.epochs and self.step < self.until:
                self._train_epoch(bar)
        self.model.eval()
        for callback in sorted(self.callbacks, key=lambda callback: callback.structural):
            callback.finish(self)
        lay_out(self.model.eval(), torch.contiguous_format)
        return self.history

    def training_step(self, batch: Batch) -> Tensor:
        """Forward, loss, backward, update: the ordinary step."""
        loss = self.loss(batch, self.forward(batch))
        self.update(loss)
        return loss

    def forward(self, batch: Batch) -> Any:
        """Outputs of the model in training mode under the run's precision."""
        with self.accelerator.autocast():
            self.outputs = self.task.outputs(self.network, batch.inputs, batch.targets)
        return self.outputs

    def loss(self, batch: Batch, outputs: Any) -> Tensor:
        """Task loss as the callbacks rewrite it, plus their penalties."""
        with self.accelerator.autocast():
            loss = (
                self.task.loss(outputs, batch.targets)
                if batch.targets is not None
                else torch.zeros((), device=self.device)
            )
            for callback in self._hooks["task_loss"]:
                loss = callback.task_loss(self, batch, outputs, loss)
            for callback in self._hooks["penalty"]:
                penalty = callback.penalty(self)
                loss = loss if penalty is None else loss + penalty
        return loss

    def update(self, loss: Tensor) -> None:
        """Backward and one optimizer step on ``loss`` with all hooks."""
        self._stepper.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        for callback in self._hooks["after_backward"]:
            callback.after_backward(self)
        if self.settings.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self._stepper.step()
        for callback in self._hooks["after_step"]:
            callback.after_step(self)

    def _train_epoch(self, bar: Any) -> None:
        started = time.perf_counter()
        for callback in self.callbacks:
            callback.epoch_start(self)
        self.network.train()
        total, count = torch.zeros((), device=self.device), 0
        batches = self.train_split.batches(
            self.settings.batch_size,
            shuffle=True,
            seed=self.seed,
            epoch=self.epoch,
            augment=self.settings.augment,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            drop_last=self._drop_last,
        )
        step = self._own_step or (lambda _, batch: self.training_step(batch))
        # Empty but in a run that starts within an epoch.
        for _ in zip(range(self.step - self.epoch * self.steps_per_epoch), batches):
            pass
        for batch in batches:
            if self.step >= self.until:
                break
            batch = to_device(batch, self.device)
            for callback in self._hooks["batch"]:
                batch = callback.batch(self, batch)
            batch = batch._replace(inputs=arranged(batch.inputs, self.layout))
            self.batch = batch
            self._set_learning_rate()
            loss = step(self, batch)
            self.step += 1
            total += loss.detach()
            count += 1
            bar.advance(lambda: f"loss {total.item() / max(1, count):.4f}")  # noqa: B023
        for callback in self.callbacks:
            callback.epoch_end(self)
        entry = {"run": self.label, "epoch": self.epoch + 1, "loss": total.item() / max(1, count)}
        entry["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        entry["steps"], entry["step_seconds"] = count, (time.perf_counter() - started) / max(1, count)
        if self.validate:
            with ExitStack() as deployed:
                for callback in self._hooks["validation"]:
                    deployed.enter_context(callback.validation(self))
                value = self.task.evaluate(self.model, "calibration", device=self.device)
            entry[value.name], entry["split"] = value.value, value.split
            bar.note(f"{value.name} {value.value:.2f}")
        entry["seconds"] = time.perf_counter() - started
        self.history.append(entry)
        self.progress.epoch(entry, self.epochs)
        self.epoch += 1
        self._save()

    def _set_learning_rate(self) -> None:
        warmup = min(1.0, self.settings.warmup_epochs * self.steps_per_epoch / self.total_steps)
        share = factor(self.settings.schedule, self.step / self.total_steps, warmup)
        for callback in self._hooks["learning_rate"]:
            own = callback.learning_rate(self)
            share = share if own is None else own
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share

    def _make_optimizer(self) -> torch.optim.Optimizer:
        groups = [group for callback in self.callbacks for group in callback.parameter_groups(self)]
        taken = {id(p) for group in groups for p in group["params"]}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in taken]
        groups = ([{"params": rest}] if rest else []) + groups
        if not groups:
            raise ModelError(
                f"{self.label}: a {type(self.model).__name__} has nothing to train; put this step before the one that made it"
            )
        s = self.settings
        options: dict[str, Any] = {"lr": s.learning_rate, "weight_decay": s.weight_decay}
        if s.optimizer in ("sgd", "nesterov"):
            options |= {"momentum": s.momentum, "nesterov": s.optimizer == "nesterov" and s.momentum > 0}
        optimizer = OPTIMIZERS[s.optimizer](groups, **options)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def _save(self) -> None:
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
            "random": random_state(),
            "history": self.history,
        }
        save_state(self.checkpoint, state)

    def _resume(self) -> bool:
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        state = load_state(self.checkpoint)
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(saved)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        arrange_state(self.optimizer)
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        restore_random_state(state["random"])
        return True


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with all its tensors on ``device``."""
    if device.type == "cpu":
        return batch

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, tuple | list):
            return type(value)(move(v) for v in value)
        if isinstance(value, dict):
            return {key: move(v) for key, v in value.items()}
        return value

    return Batch(move(batch.inputs), move(batch.targets), batch.indices)
