"""The common course of methods that remove channels: which may go, how many, which of them, the cut, and what repairs it.

Channels are what surgery finds in a network: filters, neurons, attention heads, whatever a residual stream ties together.
A one-shot method is a `ChannelPruning` with a score; one that works during training is a `ChannelTraining` whose callback
is a `ChannelCallback`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.budget import Plan
from efficientdnns.errors import ConfigurationError, SurgeryError
from efficientdnns.method import Method, Ratio, TrainingMethod
from efficientdnns.parts.structured import (
    Scope,
    Selection,
    Widths,
    cut,
    kept_report,
    kept_widths,
    prunable,
    require_widths,
    weakest,
)
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group
from efficientdnns.training import Callback, Trainer

Scores = Mapping[str, Tensor]
"""Group name -> (size,) importance of its channels."""


class ChannelOptions(Method):
    """Fields of every method that removes channels; with a budget in the run the ratio is solved for."""

    kind: ClassVar[str] = "pruning"
    budgets: ClassVar[frozenset[str]] = frozenset({"macs", "params", "bytes", "latency"})
    comparable: ClassVar[bool] = False
    """Whether the method's scores of different groups mean the same: ``scope=global`` then compares them as they are."""

    pruning_ratio: Ratio = 0.5
    """Share of channels removed; solved for when the run has a budget."""
    scope: Scope = "layer"
    """One ratio for every group of channels, or one threshold for all: on scores divided by the mean of their group."""
    round_to: PositiveInt = 1
    """Every group keeps a multiple of this many channels, or all of them."""
    ratios: dict[str, Ratio] = {}
    """Ratios of single groups by name, in place of `pruning_ratio`."""
    skip: tuple[str, ...] = ()
    """Layers left whole, as name patterns."""

    def check_network(self, session: Session) -> None:
        graph, groups = self.groups(session)
        require_widths(session, self, graph, groups, self.offer({g.name: torch.zeros(g.size) for g in groups}))

    def groups(self, session: Session) -> tuple[ChannelGraph, list[Group]]:
        """The channel graph of the session's network, and the groups that may be pruned."""
        graph, groups = prunable(session, self.skip, f"{self.name}: skip")
        able = self.able(session.model, groups)
        if not able:
            raise SurgeryError(
                f"{self.name}: no channels of {type(session.model).__name__} are read by linear layers or convolutions alone; "
                "choose a method that does not act where channels are read, such as depgraph"
            )
        return graph, able

    def able(self, model: nn.Module, groups: Sequence[Group]) -> list[Group]:
        """Those of the groups that the method can treat; the others are left whole."""
        return list(groups)

    def offer(self, scores: Scores) -> Widths:
        """The widths to choose from."""
        return Widths.of(
            scores, scope=self.scope, round_to=self.round_to, ratios=self.ratios, comparable=self.comparable
        )

    def plan(
        self, session: Session, graph: ChannelGraph, groups: Sequence[Group], scores: Scores | None = None
    ) -> Plan:
        """How many channels every group keeps: what the budget allows, or all but the share ``pruning_ratio``.

        With one ratio for every group no scores are needed, for what a network costs depends on how many channels stay.
        """
        scores = scores or {group.name: torch.zeros(group.size) for group in groups}
        return kept_widths(session, self, graph, groups, self.offer(scores), self.pruning_ratio)

    def weakest(self, session: Session, graph: ChannelGraph, groups: Sequence[Group], scores: Scores) -> Selection:
        """The channels of lowest score that have to go by the plan."""
        plan = self.plan(session, graph, groups, scores)
        return {group.name: weakest(scores[group.name], group.size - plan[group.name]) for group in groups}

    def remove(self, session: Session, graph: ChannelGraph, groups: Sequence[Group], selection: Selection) -> nn.Module:
        """Cut the session's network and report the widths."""
        session.model = cut(session, graph, selection)
        session.report(**kept_report(graph, groups, selection))
        return session.model


class ChannelPruning(ChannelOptions):
    """A one-shot method: score, cut, fine-tune. A subclass gives `scores`, or decides group by group in `select`."""

    epochs: NonNegativeInt = 0
    """Fine-tuning epochs after the cut."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of the fine-tuning; None takes a tenth of the session's."""

    def scores(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Scores:
        """Importance of the channels of every group."""
        raise ConfigurationError(f"{type(self).__name__} is abstract: it scores no channels")

    def select(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Selection:
        """Indices of the channels that go; the weights of ``session.model`` may be changed to make up for them."""
        return self.weakest(session, graph, groups, self.scores(session, graph, groups))

    def apply(self, session: Session) -> None:
        graph, groups = self.groups(session)
        self.remove(session, graph, groups, self.select(session, graph, groups))
        fine_tune(session, self.epochs, self.learning_rate)


class ChannelTraining(ChannelOptions, TrainingMethod):
    """A method that prepares the network for the cut during training, and may train on after it."""

    retrain_epochs: NonNegativeInt = 0
    """Fine-tuning epochs of the small network."""
    retrain_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the fine-tuning; None takes a tenth of the session's."""

    def afterwards(self, session: Session) -> None:
        fine_tune(session, self.retrain_epochs, self.retrain_learning_rate)


class ChannelCallback(Callback):
    """Knows the groups of the network during the run and removes channels at its end.

    A subclass gives `scores`, by which the weakest go, or `select`; ``kept`` is how many stay of each group where one
    ratio or budget for all decides before the run (None with ``scope="global"``: then `scores` at the end decide).
    """

    structural = True

    def __init__(self, method: ChannelOptions, session: Session) -> None:
        self.method, self.session = method, session
        self.kept: Plan | None = None

    def setup(self, trainer: Trainer) -> None:
        self.graph, self.groups = self.method.groups(self.session)
        if self.method.scope == "layer":
            self.kept = self.method.plan(self.session, self.graph, self.groups)

    def scores(self, trainer: Trainer) -> Scores:
        """Importance of the channels of every group as the weights are now."""
        raise ConfigurationError(f"{type(self).__name__} is abstract: it scores no channels")

    def plan(self, scores: Scores) -> Plan:
        """How many channels every group keeps."""
        return self.kept or self.method.plan(self.session, self.graph, self.groups, scores)

    def select(self, trainer: Trainer) -> Selection:
        """Indices of the channels that go."""
        scores = self.scores(trainer)
        plan = self.plan(scores)
        return {group.name: weakest(scores[group.name], group.size - plan[group.name]) for group in self.groups}

    def finish(self, trainer: Trainer) -> None:
        self.session.model = trainer.model
        trainer.model = self.method.remove(self.session, self.graph, self.groups, self.select(trainer))


def fine_tune(session: Session, epochs: int, learning_rate: float | None, **settings: Any) -> None:
    """Train the network as it is; by default at a tenth of the session's peak learning rate."""
    if epochs:
        rate = learning_rate or session.settings.learning_rate / 10
        session.train(epochs=epochs, learning_rate=rate, **settings)


def sweep(
    session: Session,
    groups: Sequence[Group],
    plan: Plan,
    choose: Callable[[Group, int], Tensor],
    label: str = "layers",
) -> Selection:
    """Decide group by group in the order of execution, each with what went before it already silent.

    Args:
        session: its network is changed: nothing reads the channels that are to go.
        groups: in the order of execution.
        plan: how many channels each keeps.
        choose: (group, number to keep) -> indices that go; may change weights to make up for them.
        label: for the progress bar.

    Returns:
        What is to be cut; cutting it changes nothing any more, but for statistics over channels such as a layer norm's.
    """
    selection: Selection = {}
    with session.progress.task(f"{session.label}: {label}", len(groups)) as bar:
        for group in groups:
            if plan[group.name] < group.size:
                selection[group.name] = choose(group, plan[group.name])
                silence(session.model, group, selection[group.name])
            bar.advance(lambda: group.name)  # noqa: B023
    return selection


@torch.no_grad()
def silence(model: nn.Module, group: Group, units: Tensor) -> None:
    """Zero every weight that reads these channels."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for member in group.members:
        if member.role == "in":
            tensor = tensors[member.tensor]
            tensor.index_fill_(member.dim, member.index[units].flatten().to(tensor.device), 0.0)


def unit_masks(model: nn.Module, groups: Sequence[Group], gone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks by parameter name that zero everything that makes the channels ``gone`` (group name -> indices)."""
    masks: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in groups:
        for member in group.members:
            if member.role != "in" and member.tensor in parameters and len(gone.get(group.name, ())):
                mask = masks.setdefault(member.tensor, torch.ones_like(parameters[member.tensor]))
                rows = member.index[gone[group.name]].flatten().to(mask.device)
                mask.index_fill_(member.dim, rows, 0.0)
    return masks


@torch.no_grad()
def switch_off(model: nn.Module, group: Group, units: Tensor) -> None:
    """Zero everything that makes these channels (weights, biases, batch-norm scales and shifts), so that they are zero."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for member in group.members:
        if member.role != "in" and member.tensor in parameters:
            tensor = parameters[member.tensor]
            tensor.index_fill_(member.dim, member.index[units].flatten().to(tensor.device), 0.0)
