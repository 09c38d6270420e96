"""Global and dynamic filter pruning: one mask over the filters of all layers, decided anew again and again.

Masked filters go on being trained, so that one that was dropped by mistake can come back; then the mask is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.budget import Plan
from efficientdnns.method import Paper, Ratio
from efficientdnns.parts.budgets import limits_of
from efficientdnns.parts.channel_gates import ChannelGates, gateable
from efficientdnns.parts.channel_pruning import ChannelCallback, ChannelTraining, Scores
from efficientdnns.parts.criteria import channel_scores, loss_gradients
from efficientdnns.parts.structured import Scope, Selection, weakest
from efficientdnns.session import Session
from efficientdnns.surgery import Group
from efficientdnns.training import Callback, Trainer

Share = Annotated[float, Field(gt=0, le=1)]


class GlobalDynamicFilterPruning(ChannelTraining):
    r"""Global and dynamic filter pruning, `Lin et al., IJCAI 2018 <https://doi.org/10.24963/ijcai.2018/336>`_.

    Over all filters W of all layers a mask m of zeros and ones minimises

    .. math:: L(D; W \odot m), \qquad \|m\|_0 \le \beta \sum_l C_l,

    with :math:`\beta` = 1 - ``pruning_ratio``. Every filter, masked or not, gets the gradient
    :math:`\partial L / \partial (m W)`, as if its mask were one (straight through). Every ``interval`` steps the saliency

    .. math:: \Theta_k = \sum_j \left| \frac{\partial L}{\partial W_{kj}} W_{kj} \right|

    (entry by entry, from the current batch; W is not masked) is sorted over all layers and the mask is one for the highest.
    Once ``stable`` updates in a row change nothing, or after the share ``freeze`` of the run, the mask stays as it is, the
    rest of the run trains what is left, and the masked filters are removed.

    A masked filter gets a gradient but the loss does not see what becomes of it, so it may grow until it is let in again and
    upsets the network: gradients are clipped to ``clip_norm``, without which LeNet-5 diverged at a learning rate of 0.01 with
    momentum 0.9 (and did not at 0.002, or without momentum).

    ``epochs=0`` is the one-shot cut by the same saliency, averaged over ``samples`` training samples.

    Deviations:
        The full text was not at hand: equations from outlines of the solver. Clipping is ours. Masks act on channels
        where they are read, behind batch norm and activation: masked ones are exactly zero there, and gradients pass
        the mask on their way to earlier layers as well. Channels read by anything but linear layers and convolutions
        (recurrent layers, attention projections) cannot be masked so; their groups stay whole and are listed under
        ``not_masked``. With a budget the number of channels is solved for before the first update, and which of them
        when the mask is frozen.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="global-dynamic-filter-pruning",
        title="Accelerating Convolutional Networks via Global & Dynamic Filter Pruning",
        authors="Shaohui Lin, Rongrong Ji, Yuchao Li, Yongjian Wu, Feiyue Huang, Baochang Zhang",
        venue="IJCAI",
        year=2018,
        url="https://doi.org/10.24963/ijcai.2018/336",
    )
    comparable: ClassVar[bool] = True
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 2, "interval": 2, "learning_rate": 0.01}

    pruning_ratio: Ratio = 0.4
    """Share of channels removed, 1 - beta; solved for when the run has a budget."""
    scope: Scope = "global"
    """One mask over the saliencies of all layers as they are, or ('layer') the same ratio for every group of channels."""
    interval: PositiveInt = 100
    """Steps between two updates of the mask."""
    freeze: Share = 0.5
    """Share of the run after which the mask stays as it is."""
    stable: PositiveInt = 5
    """Updates in a row that change nothing after which the mask is frozen earlier."""
    criterion: Literal["taylor", "magnitude"] = "taylor"
    """Saliency: Theta, or the sum of magnitudes."""
    average: Ratio = 0.0
    """Share of the previous saliency in a moving average over updates; 0 takes the current batch alone."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the gradient of all parameters together; None takes the session's."""
    samples: PositiveInt = 512
    """Training samples for the saliency where no training precedes the cut."""

    def settings(self) -> dict[str, Any]:
        own = {} if self.clip_norm is None else {"clip_norm": self.clip_norm}
        return own | super().settings()

    def able(self, model: nn.Module, groups: Sequence[Group]) -> list[Group]:
        return gateable(model, groups)

    def callback(self, session: Session) -> Callback:
        return GlobalMask(self, session)


class GlobalMask(ChannelCallback):
    """Masks channels where they are read, decides anew which, and removes them at the end."""

    method: GlobalDynamicFilterPruning

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        ones = {group.name: torch.ones(group.size, device=trainer.device) for group in self.groups}
        self.gates = ChannelGates(trainer.model, self.groups, ones, straight_through=True).attach()
        self.last = max(1, round(self.method.freeze * trainer.total_steps))
        self.averages: dict[str, Tensor] = {}
        self.share = self.method.pruning_ratio
        self.frozen, self.unchanged = False, 0
        self.history: list[list[int]] = []
        """[step, filters that came back, filters that went] of every update."""

    def after_backward(self, trainer: Trainer) -> None:
        if self.frozen:
            return
        if trainer.step < self.last and trainer.step % self.method.interval == 0:
            self.update(trainer)
        if self.unchanged >= self.method.stable or trainer.step + 1 >= self.last:
            self.freeze(trainer)

    def update(self, trainer: Trainer) -> None:
        """Take the current batch's saliency and mask the channels that have least."""
        scores, average = self.scores(trainer), self.method.average
        if self.averages:
            scores = {name: average * self.averages[name] + (1 - average) * score for name, score in scores.items()}
        if not self.averages and self.kept is None and limits_of(self.session, self.method):
            plan = self._solved(scores)
            self.share = 1 - sum(plan.values()) / sum(group.size for group in self.groups)
        self.averages = dict(scores)
        plan = self.kept or self.method.offer(scores).at(self.share)
        back, went = self.mask(plan)
        self.unchanged = self.unchanged + 1 if back == went == 0 and len(self.history) > 0 else 0
        self.history.append([trainer.step, back, went])

    def mask(self, plan: Plan) -> tuple[int, int]:
        """Open the gates of the channels of highest saliency; returns how many were opened and how many closed."""
        back = went = 0
        for group in self.groups:
            gate = torch.ones(group.size)
            gate[weakest(self.averages[group.name], group.size - plan[group.name])] = 0.0
            before = self.gates.gates[group.name].cpu()
            back, went = back + int((gate > before).sum()), went + int((gate < before).sum())
            self.gates.gates[group.name] = gate.to(self.session.device)
        return back, went

    def freeze(self, trainer: Trainer) -> None:
        """Settle the mask, within the budget; masked channels get no gradient any more."""
        if not self.averages:
            self.averages = dict(self.scores(trainer))
        limited = bool(limits_of(self.session, self.method)) and self.kept is None
        self.mask(
            self._solved(self.averages) if limited else self.kept or self.method.offer(self.averages).at(self.share)
        )
        self.frozen, self.gates.straight_through = True, False

    def _solved(self, scores: Scores) -> Plan:
        """The widths within the budget; candidates are cut from the network as it is without gates."""
        self.gates.detach()
        plan = self.method.plan(self.session, self.graph, self.groups, scores)
        self.gates.attach()
        return plan

    def scores(self, trainer: Trainer) -> Scores:
        model = trainer.model
        if self.method.criterion == "magnitude":
            return channel_scores(model, self.groups, "l1")
        gradients = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
        if not trainer.step and not gradients:
            gradients = loss_gradients(self.session, model, self.method.samples, absolute=True)
        return channel_scores(model, self.groups, "taylor", gradients)

    def select(self, trainer: Trainer) -> Selection:
        if not self.frozen:
            self.freeze(trainer)
        self.gates.detach()
        names = {group.name for group in self.groups}
        self.session.report(
            updates=self.history,
            recoveries=sum(back for _, back, _ in self.history),
            not_masked=sorted(group.name for group in self.graph.groups if group.name not in names),
        )
        return {name: (gate == 0).nonzero().flatten().cpu() for name, gate in self.gates.gates.items()}

    def state_dict(self) -> dict[str, Any]:
        names = ("averages", "share", "frozen", "unchanged", "history")
        return {name: getattr(self, name) for name in names} | {"gates": self.gates.gates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages, self.share, self.frozen = state["averages"], state["share"], state["frozen"]
        self.unchanged, self.history = state["unchanged"], state["history"]
        self.gates.gates = {name: gate.to(self.session.device) for name, gate in state["gates"].items()}
        self.gates.straight_through = not self.frozen
