"""Any criterion with any schedule at any granularity: the parts of the published methods, to be combined freely.

Without a paper of its own: the control that papers are compared with (plain magnitude, random), and a place to try ideas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.errors import ConfigurationError, DataError, SurgeryError
from efficientdnns.method import Need, Ratio, TrainingMethod
from efficientdnns.parts.channel_pruning import ChannelCallback, ChannelOptions, Scores, fine_tune, unit_masks
from efficientdnns.parts.criteria import (
    NEEDS_GRADIENTS,
    ChannelCriterion,
    WeightCriterion,
    channel_scores,
    loss_gradients,
)
from efficientdnns.parts.sparsity_schedule import scheduled_sparsity
from efficientdnns.parts.structured import Selection, weakest
from efficientdnns.parts.weight_pruning import Granularity, Regrowth, ScheduledMasks, WeightOptions
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group
from efficientdnns.training import Callback, Trainer
from efficientdnns.training.sparsity import apply_masks

Share = Annotated[float, Field(ge=0, le=1)]


class Schedule(TrainingMethod):
    """When how much goes, and what follows; ``epochs=0`` does it at once."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    epochs: NonNegativeInt = 0
    """Epochs of training while pruning; 0 prunes at once."""
    begin: Share = 0.0
    """The first pruning, as a share of the run."""
    end: Share = 0.75
    """The last pruning, as a share of the run; with end=begin all goes in one step and the rest of the run repairs it."""
    frequency: PositiveInt = 20
    """Steps between prunings."""
    exponent: PositiveFloat = 3.0
    """Exponent of the schedule s = s_f (1 - (1 - p)^e): 3 prunes most early, 1 evenly."""
    retrain_epochs: NonNegativeInt = 0
    """Fine-tuning epochs after it."""
    retrain_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the fine-tuning; None takes a tenth of the session's."""

    def check(self, session: Session) -> None:
        super().check(session)
        if self.begin > self.end:
            raise ConfigurationError(f"{self.name}: begin={self.begin} is after end={self.end}; swap them")
        train = session.task.train
        if (self.epochs or self.retrain_epochs) and (train is None or not train.has_labels):
            raise DataError(f"{self.name}: epochs need labelled training data, but task '{session.task.name}' has none")

    def afterwards(self, session: Session) -> None:
        fine_tune(session, self.retrain_epochs, self.retrain_learning_rate)


class PruneWeights(WeightOptions, Schedule):
    """Zero single weights, rows or N:M patterns: any criterion on any schedule, with or without regrowth.

    Weights stay zero in later training, and the file stores what is left.
    """

    name: ClassVar[str] = "prune-weights"

    criterion: WeightCriterion = "magnitude"
    """|w|, |g w| with the gradient of the current batch ('taylor'), or chance ('random')."""
    granularity: Granularity = "weights"
    """What goes together: 'weights', 'rows', or at most N of M consecutive input channels, such as '2:4'."""
    initial_sparsity: Ratio = 0.0
    """Sparsity of the first pruning."""
    regrowth: Regrowth = "none"
    """What may come back between prunings: nothing, what grew again ('soft'), where the gradient is largest, or by chance."""
    regrown: Share = 0.3
    """With regrowth by gradient or chance, the share of the kept weights that changes place at first; it falls to zero."""

    @property
    def solves(self) -> frozenset[str]:
        return frozenset() if ":" in self.granularity else self.budgets

    def check(self, session: Session) -> None:
        super().check(session)
        if not self.epochs and (self.criterion in NEEDS_GRADIENTS or self.regrowth != "none"):
            what = f"criterion {self.criterion}" if self.criterion in NEEDS_GRADIENTS else f"regrowth {self.regrowth}"
            raise ConfigurationError(f"{self.name}: {what} works during training; write epochs=1 or more")
        if ":" in self.granularity:
            n, m = map(int, self.granularity.split(":"))
            if n >= m:
                raise ConfigurationError(f"{self.name}: {self.granularity} keeps all; write fewer than {m}, as in 2:4")
            if self.model_fields_set & {"sparsity", "sparsities"}:
                raise ConfigurationError(f"{self.name}: {self.granularity} fixes what stays; leave out sparsity")
        if self.granularity != "weights" and self.regrowth in ("gradient", "random"):
            raise ConfigurationError(
                f"{self.name}: regrowth {self.regrowth} moves single weights, which breaks {self.granularity}; "
                "write regrowth=soft or granularity=weights"
            )
        if self.initial_sparsity > self.sparsity and ":" not in self.granularity:
            raise ConfigurationError(
                f"{self.name}: initial_sparsity={self.initial_sparsity} is above sparsity={self.sparsity}; lower it"
            )

    def callback(self, session: Session) -> Callback:
        return ScheduledMasks(
            self,
            session,
            criterion=self.criterion,
            granularity=self.granularity,
            initial=self.initial_sparsity,
            begin=self.begin,
            end=self.end,
            frequency=self.frequency,
            exponent=self.exponent,
            regrowth=self.regrowth,
            regrown=self.regrown,
        )


class PruneChannels(ChannelOptions, Schedule):
    """Remove filters, neurons or attention heads: any criterion on any schedule, with or without regrowth."""

    name: ClassVar[str] = "prune-channels"
    in_place: ClassVar[bool] = False

    criterion: ChannelCriterion = "l1"
    """What scores a channel: norms of its weights or its group, batch-norm scales, |g w|, distance to the others, chance."""
    granularity: Literal["channels", "heads"] = "channels"
    """'channels' are whatever can go (filters, neurons, heads); 'heads' leaves all but attention heads alone."""
    regrowth: Literal["none", "soft"] = "none"
    """Whether zeroed channels stay zero until they are removed, or go on being trained and may return ('soft')."""
    samples: PositiveInt = 512
    """Training samples for the gradients of the criterion 'taylor'."""

    def check(self, session: Session) -> None:
        super().check(session)
        train = session.task.train
        if self.criterion in NEEDS_GRADIENTS and (train is None or not train.has_labels):
            raise DataError(
                f"{self.name}: criterion {self.criterion} needs labelled training data, but task '{session.task.name}' has "
                "none; choose group-norm, for example"
            )

    def groups(self, session: Session) -> tuple[ChannelGraph, list[Group]]:
        graph, groups = super().groups(session)
        if self.granularity == "heads":
            groups = [group for group in groups if made_of_heads(session.model, group)]
            if not groups:
                raise SurgeryError(
                    f"{self.name}: {type(session.model).__name__} has no attention heads that can be removed"
                )
        return graph, groups

    def apply(self, session: Session) -> None:
        if self.epochs:
            return super().apply(session)
        graph, groups = self.groups(session)
        scores = self.scores(session, session.model, groups)
        self.remove(session, graph, groups, self.weakest(session, graph, groups, scores))
        self.afterwards(session)

    def callback(self, session: Session) -> Callback:
        return GradualChannels(self, session)

    def scores(self, session: Session, model: nn.Module, groups: Sequence[Group], step: int = 0) -> dict[str, Tensor]:
        """Scores by the criterion."""
        gradients = loss_gradients(session, model, self.samples) if self.criterion in NEEDS_GRADIENTS else None
        chance = torch.Generator().manual_seed(session.seed * 1_000_003 + step)
        return channel_scores(model, groups, self.criterion, gradients, chance)


def made_of_heads(model: nn.Module, group: Group) -> bool:
    """Whether the units of a group are attention heads: several rows of a linear layer make one."""
    made = [member for member in group.members if member.role == "out"]
    return bool(made) and all(
        member.index.shape[1] > 1 and not isinstance(model.get_submodule(member.module), nn.RNNBase) for member in made
    )


class GradualChannels(ChannelCallback):
    """Zeroes the weakest channels on a schedule and removes them at the end."""

    method: PruneChannels

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        self.gone: dict[str, Tensor] = {group.name: torch.empty(0, dtype=torch.long) for group in self.groups}
        self.masks: dict[str, Tensor] = {}
        self.first = min(trainer.total_steps - 1, round(self.method.begin * trainer.total_steps))
        last = min(trainer.total_steps - 1, round(self.method.end * trainer.total_steps))
        self.prunings = max(0, last - self.first) // self.method.frequency
        self.final = self.kept

    def after_backward(self, trainer: Trainer) -> None:
        number, rest = divmod(trainer.step - self.first, self.method.frequency)
        if not rest and 0 <= number <= self.prunings:
            self.prune(trainer, number / self.prunings if self.prunings else 1.0)

    def after_step(self, trainer: Trainer) -> None:
        apply_masks(trainer.model, self.masks)

    def epoch_end(self, trainer: Trainer) -> None:
        if self.method.regrowth == "soft" and any(len(gone) for gone in self.gone.values()):
            self.zero(trainer.model)

    @torch.no_grad()
    def prune(self, trainer: Trainer, progress: float) -> None:
        """Choose and zero the weakest channels."""
        scores = self.method.scores(self.session, trainer.model, self.groups, trainer.step)
        if self.final is None:  # with one threshold for all, the scores at the first pruning share the channels out
            self.final = self.plan(scores)
        share = scheduled_sparsity(progress, 1.0, exponent=self.method.exponent)
        for group in self.groups:
            score = scores[group.name].clone()
            if self.method.regrowth == "none":
                score[self.gone[group.name]] = -1.0
            self.gone[group.name] = weakest(score, round((group.size - self.final[group.name]) * share))
        self.zero(trainer.model)

    def zero(self, model: nn.Module) -> None:
        """Zero what makes the channels, so that they are zero, and mask it unless it may grow again."""
        masks = unit_masks(model, self.groups, self.gone)
        apply_masks(model, masks)
        self.masks = {} if self.method.regrowth == "soft" else masks

    def select(self, trainer: Trainer) -> Selection:
        if self.method.regrowth == "soft":
            self.prune(trainer, 1.0)
        return self.gone

    def scores(self, trainer: Trainer) -> Scores:
        return self.method.scores(self.session, trainer.model, self.groups)

    def state_dict(self) -> dict[str, Any]:
        return {"gone": self.gone, "masks": self.masks, "final": self.final}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gone, self.final = state["gone"], state["final"]
        self.masks = {name: mask.to(self.session.device) for name, mask in state["masks"].items()}
