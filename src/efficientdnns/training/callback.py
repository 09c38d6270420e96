"""The hooks through which a method lives in a training run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from efficientdnns.data.split import Batch

if TYPE_CHECKING:
    from efficientdnns.training.trainer import Trainer


class Callback:
    """State and behaviour of one method during one training run; override only what is needed.

    Order of a run: ``setup`` (before the optimizer exists: insert modules, add parameters), ``start``; per epoch
    ``epoch_start``, per step ``batch``, ``task_loss``, ``penalty``, ``after_backward``, ``after_step``, then
    ``epoch_end``, then ``validation`` and the checkpoint; at the end ``finish``. A hook that is not overridden costs nothing.
    """

    structural: bool = False
    """True if ``finish`` changes the architecture; such callbacks finish last."""

    def setup(self, trainer: Trainer) -> None:
        """Prepare the model. Runs again, before the checkpoint is loaded, when a run is resumed."""

    def parameter_groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Optimizer groups of its own (``{"params": [...], "lr": ..., "weight_decay": ...}``), taken out of the main group."""
        return []

    def start(self, trainer: Trainer) -> None:
        """Before the first step (not when resumed)."""

    def epoch_start(self, trainer: Trainer) -> None:
        """Before the first step of each epoch."""

    def batch(self, trainer: Trainer, batch: Batch) -> Batch:
        """Change a batch."""
        return batch

    def training_step(self, trainer: Trainer, batch: Batch) -> Tensor:
        """Own the step: do every forward, backward and update of one batch and return the loss. One callback a run may."""
        return trainer.training_step(batch)

    def task_loss(self, trainer: Trainer, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        """Rewrite the loss of the task, for example mix it with a distillation term."""
        return loss

    def penalty(self, trainer: Trainer) -> Tensor | None:
        """A term added to the loss whatever others made of the task's part."""
        return None

    def learning_rate(self, trainer: Trainer) -> float | None:
        """Share of the peak learning rate for this step in place of the schedule's."""
        return None

    def after_backward(self, trainer: Trainer) -> None:
        """Change gradients before the optimizer sees them."""

    def after_step(self, trainer: Trainer) -> None:
        """Change parameters after the optimizer moved them."""

    def epoch_end(self, trainer: Trainer) -> None:
        """After the last step of each epoch, before validation."""

    def validation(self, trainer: Trainer) -> AbstractContextManager[Any]:
        """A context in which ``trainer.model`` is what would be deployed now; on leaving it the model is as it was."""
        return nullcontext()

    def finish(self, trainer: Trainer) -> None:
        """Make ``trainer.model`` what the run is to hand over. Runs again on a run that is skipped because it was complete."""

    def state_dict(self) -> dict[str, Any]:
        """All state that a resumed run needs, as tensors, numbers, strings and containers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state again; called before the model's own state is loaded."""


def overriding(callbacks: list[Callback], hook: str) -> list[Callback]:
    """The callbacks that override ``hook``."""
    return [callback for callback in callbacks if getattr(type(callback), hook) is not getattr(Callback, hook)]
