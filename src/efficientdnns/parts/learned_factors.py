"""Methods that learn a factor for every channel and drive it to exactly zero: how factors decide what goes.

Without a budget exactly the channels of zero factor go. With one (or a ratio) the penalty decides what goes first and the
budget how much: channels go in the order of their factors, whatever group they are in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from efficientdnns.budget import Plan, blocks, widths
from efficientdnns.errors import ConfigurationError
from efficientdnns.method import Ratio
from efficientdnns.parts.budgets import limits_of, meet
from efficientdnns.parts.channel_pruning import ChannelCallback, ChannelTraining, Scores
from efficientdnns.parts.criteria import channel_scores
from efficientdnns.parts.structured import Scope, Selection, WidthCosts, Widths, cut, holders, weakest
from efficientdnns.surgery import ChannelGraph, Group
from efficientdnns.training import Trainer


class FactorOptions(ChannelTraining):
    """Fields of the methods that learn factors."""

    pruning_ratio: Ratio = 0.0
    """Share of channels that goes at least, those of smallest factor first; 0 takes exactly those at zero."""
    scope: Scope = "global"
    """How many go from each group: as the factors of all groups say, or one ratio for every group."""

    def offer(self, scores: Scores) -> Widths:
        if self.scope == "layer":
            return super().offer(scores)
        offer = Widths.of(scores, scope="layer", round_to=self.round_to, ratios=self.ratios)
        total = max(1, sum(len(score) for score in scores.values()))
        offer.offered = [
            block
            for name, score in scores.items()
            if name not in self.ratios
            for block in blocks(name, (score.sort().values / total).tolist(), self.round_to)
        ]
        return offer


class FactorCallback(ChannelCallback):
    """Removes the channels of zero factor, or as many as the budget says. A subclass gives `magnitudes`."""

    method: FactorOptions

    def magnitudes(self, trainer: Trainer) -> dict[str, Tensor]:
        """(size,) magnitude of the factors of every group, on the CPU."""
        raise ConfigurationError(f"{type(self).__name__} is abstract: it has no factors")

    def scores(self, trainer: Trainer) -> Scores:
        return ranks(self.magnitudes(trainer), channel_scores(trainer.model, self.groups, "l2"))

    def plan(self, scores: Scores) -> Plan:
        session, method = self.session, self.method
        if self.kept or not limits_of(session, method):
            return super().plan(scores)
        offer = method.offer(scores)
        return meet(
            session,
            method,
            propose=offer.propose,
            estimate=WidthCosts(session, session.model, offer.full, {g.name: holders(g) for g in self.groups}),
            # Those that really go: channels that stay at zero cost fewer bytes.
            build=lambda plan: cut(
                session, self.graph, {n: weakest(s, len(s) - plan[n]) for n, s in scores.items()}, verify=False
            ),
            least=offer.least,
            full=offer.full,
        )

    def select(self, trainer: Trainer) -> Selection:
        scores, magnitudes = self.scores(trainer), self.magnitudes(trainer)
        plan = self.plan(scores)
        if not limits_of(self.session, self.method):
            for group in self.groups:
                if group.name not in self.method.ratios:
                    alive = int(magnitudes[group.name].count_nonzero())
                    kept = next(w for w in widths(group.size, self.method.round_to) if w >= alive)
                    plan[group.name] = min(plan[group.name], kept)
        return {group.name: weakest(scores[group.name], group.size - plan[group.name]) for group in self.groups}


def ranks(magnitudes: Mapping[str, Tensor], ties: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The place 1, 2, ... of every channel among those of all groups, by magnitude and among equal ones by ``ties``."""
    if not magnitudes:
        return {}
    names = list(magnitudes)
    first = torch.cat([ties[name].detach().float().cpu() for name in names]).sort(stable=True).indices
    values = torch.cat([magnitudes[name].detach().double().cpu() for name in names])
    order = first[values[first].sort(stable=True).indices]
    places = torch.empty(len(order), dtype=torch.float64)
    places[order] = torch.arange(1, len(order) + 1, dtype=torch.float64)
    return dict(zip(names, places.split([len(magnitudes[name]) for name in names]), strict=True))


def left_whole(graph: ChannelGraph, groups: Sequence[Group]) -> list[str]:
    """Names of the groups that could be cut but are not among ``groups``, for the report."""
    chosen = {group.name for group in groups}
    return [group.name for group in graph.groups if group.size > 1 and group.name not in chosen]


def adopt(model: nn.Module, name: str, factors: Sequence[Tensor]) -> list[nn.Parameter]:
    """Give a network parameters for the time of a run, so that they are trained, checkpointed and shared by processes."""
    parameters = [nn.Parameter(factor) for factor in factors]
    for number, parameter in enumerate(parameters):
        model.register_parameter(f"{name}_{number}", parameter)
    return parameters


def release(model: nn.Module, name: str) -> None:
    """Take the parameters of `adopt` away again."""
    for key in [key for key in model._parameters if key.startswith(f"{name}_")]:
        del model._parameters[key]
