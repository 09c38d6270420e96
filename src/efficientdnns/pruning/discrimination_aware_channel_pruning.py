"""Discrimination-aware channel pruning: channels are chosen one by one for what they add to telling the classes apart.

Auxiliary classifiers in the middle of the network say what that is; the layer that reads them is trained on as they come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.budget import Plan, widths
from efficientdnns.data.nested import length
from efficientdnns.data.split import Batch
from efficientdnns.errors import DataError
from efficientdnns.method import Need, Paper
from efficientdnns.parts.auxiliary_heads import (
    AuxiliaryHead,
    AuxiliaryTraining,
    auxiliary_layers,
    listen,
)
from efficientdnns.parts.channel_gates import gateable
from efficientdnns.parts.channel_pruning import ChannelPruning, Scores, sweep
from efficientdnns.parts.criteria import channel_scores, unit_rows
from efficientdnns.parts.learned_factors import left_whole
from efficientdnns.parts.reconstruction import frozen_copy
from efficientdnns.parts.structured import Selection
from efficientdnns.parts.tap import evaluating
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group
from efficientdnns.training.trainer import to_device


def stopped(losses: Sequence[float], epsilon: float) -> bool:
    r"""DCP-Adapt's rule: :math:`|L(W^{t-1}) - L(W^t)| / L(W^0) \le \epsilon`; ``losses`` begin with the empty selection's."""
    return len(losses) > 1 and abs(losses[-2] - losses[-1]) <= epsilon * losses[0]


class DiscriminationAwareChannelPruning(ChannelPruning):
    r"""Discrimination-aware channel pruning (DCP), `Zhuang et al., NeurIPS 2018 <https://arxiv.org/abs/1810.11809>`_.

    ``losses`` auxiliary classifiers, spread evenly, are trained with the whole network for ``auxiliary_epochs``: for every
    batch a step on their cross-entropies and then one on the network's own loss. From the first layer to the last the
    channels that a layer reads are then chosen, starting from none of them, by

    .. math:: L(W) = \frac{1}{2Q} \sum \|O^b - O\|^2 + \lambda L_S^p(W), \qquad
        k = \arg\max_{j \notin A} \Big\| \frac{\partial L}{\partial W_{\cdot j}} \Big\|_F

    with the layer's output O, that of the network before pruning :math:`O^b`, and the loss :math:`L_S^p` of the next classifier
    behind the layer (at last the network's own). :math:`W_{\cdot k}` starts at its old value, and :math:`W_A` and the bias are
    trained on after every addition, with batch norms frozen. It ends with as many channels as the ratio or budget says, or,
    with ``epsilon`` (DCP-Adapt), when :math:`|L(W^{t-1}) - L(W^t)| / L(W^0) \le \epsilon`.

    Deviations:
        All classifiers are trained in one run, weighted by their depth, before any layer is pruned, as in the official code.
        Selection and re-optimisation use ``samples`` images and ``steps`` steps rather than epochs over the training set.
        Channels that several layers read are chosen by the gradients of all of them. Groups that something else than
        linear layers and ungrouped convolutions reads are left whole and named in the report.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="discrimination-aware-channel-pruning",
        title="Discrimination-aware Channel Pruning for Deep Neural Networks",
        authors=(
            "Zhuangwei Zhuang, Mingkui Tan, Bohan Zhuang, Jing Liu, Yong Guo, Qingyao Wu, Junzhou Huang, Jinhui Zhu"
        ),
        venue="NeurIPS",
        year=2018,
        url="https://arxiv.org/abs/1810.11809",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "training data"})
    contract_fields: ClassVar[dict[str, Any]] = {
        "losses": 1, "auxiliary_epochs": 1, "added": 0.2, "steps": 1, "samples": 64
    }  # fmt: skip

    losses: NonNegativeInt = 3
    """P: auxiliary classifiers; fewer where the network has fewer layers."""
    auxiliary_epochs: NonNegativeInt = 100
    """Epochs of the training with auxiliary classifiers."""
    auxiliary_learning_rate: PositiveFloat | None = None
    """Peak learning rate of that training; None takes the session's."""
    reconstruction_weight: NonNegativeFloat = 1.0
    """Weight of the reconstruction loss; 0 leaves the classifiers alone to decide."""
    auxiliary_weight: NonNegativeFloat = 1.0
    """lambda: weight of the classifier's loss; 0 leaves reconstruction alone."""
    epsilon: Annotated[float, Field(gt=0)] | None = None
    """DCP-Adapt: stop adding channels when one lowers the loss by no more than this share of its start; replaces the ratio."""
    added: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of a group's channels that is added at once; at least one, as in the paper."""
    steps: NonNegativeInt = 10
    """SGD steps on the layer after every addition."""
    layer_learning_rate: PositiveFloat = 0.01
    """Their learning rate."""
    samples: PositiveInt = 2000
    """Labelled training samples for selection."""
    order: Literal["gradient", "random", "l1"] = "gradient"
    """How channels are chosen: as above, or as controls with the same training of the layer by chance or by the norm of W."""
    epochs: NonNegativeInt = 0
    """Fine-tuning epochs after the cut (400 in the paper's CIFAR runs)."""

    @property
    def solves(self) -> frozenset[str]:
        return self.budgets if self.epsilon is None else frozenset()

    def check(self, session: Session) -> None:
        super().check(session)
        if session.task.kind != "classification" or session.task.num_classes is None:
            raise DataError(
                f"{self.name} tells classes apart, but task '{session.task.name}' is of kind {session.task.kind}"
            )

    def able(self, model: nn.Module, groups: Sequence[Group]) -> list[Group]:
        return gateable(model, groups)

    def scores(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Scores:
        return channel_scores(session.model, groups, "l1")

    def select(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Selection:
        places = auxiliary_layers(session.model, graph, self.losses)
        training = AuxiliaryTraining(session, places)
        if self.auxiliary_epochs:
            rate = self.auxiliary_learning_rate or session.settings.learning_rate
            session.train([training], epochs=self.auxiliary_epochs, learning_rate=rate)
        plan: Plan = {group.name: 1 for group in groups}
        if self.epsilon is None:
            plan = self.plan(session, graph, groups, self.scores(session, graph, groups))
        chooser = Chooser(self, session, graph, training.heads)
        with evaluating(session.model):
            selection = sweep(session, groups, plan, chooser)
        session.report(classifiers=list(places), losses=chooser.losses, not_read=left_whole(graph, groups))
        return selection


class Chooser:
    """Chooses the channels of one group after the other: (group, number to keep) -> indices that go.

    Attributes:
        losses: by group, the loss on the selection data before every addition and at the end.
    """

    def __init__(
        self,
        method: DiscriminationAwareChannelPruning,
        session: Session,
        graph: ChannelGraph,
        heads: Mapping[str, AuxiliaryHead],
    ) -> None:
        self.method, self.session, self.model, self.graph = method, session, session.model, graph
        self.heads = {name: head.eval().requires_grad_(False) for name, head in heads.items()}
        self.before = frozen_copy(session.model)
        self.random = torch.Generator().manual_seed(session.seed)
        self.losses: dict[str, list[float]] = {}
        self.batches: list[Batch] = []
        assert session.task.train is not None
        seen = 0
        for batch in session.task.train.batches(min(128, method.samples), shuffle=True, seed=session.seed):
            self.batches.append(to_device(batch, session.device))
            seen += length(batch.inputs)
            if seen >= method.samples:
                break

    def __call__(self, group: Group, keep: int) -> Tensor:
        layer = Layer(self, group)
        try:
            chosen = self.grow(layer, group, keep)
        finally:
            layer.close()
        return (~chosen).nonzero().flatten()

    def grow(self, layer: Layer, group: Group, keep: int) -> Tensor:
        """Mask of the channels that stay."""
        method, chosen = self.method, torch.zeros(group.size, dtype=torch.bool)
        losses = self.losses[group.name] = []
        allowed = set(widths(group.size, method.round_to))
        many = max(1, math.ceil(method.added * group.size))
        while True:
            loss, slopes = layer.loss_and_slopes()
            losses.append(loss)
            count = int(chosen.sum())
            if method.epsilon is None or group.name in method.ratios:
                done = count >= keep
            else:
                done = count in allowed and stopped(losses, method.epsilon)
            if done or count == group.size:
                return chosen
            left = (
                group.size - count if method.epsilon is not None and group.name not in method.ratios else keep - count
            )
            ranked = slopes.masked_fill(chosen, -1.0)
            new = ranked.sort(descending=True, stable=True).indices[: min(many, left)]
            chosen[new] = True
            layer.admit(new)
            layer.train(chosen)

    def auxiliary_after(self, group: Group) -> str | None:
        """The first classifier behind all readers of a group; None: the network's own loss."""
        last = max(self.graph.order.index(name) for name in self.graph.consumers(group))
        return next((name for name in self.heads if self.graph.order.index(name) >= last), None)


class Layer:
    """The layers that read one group, from no channel to as many as are admitted."""

    def __init__(self, chooser: Chooser, group: Group) -> None:
        self.chooser, self.method, self.model, self.group = chooser, chooser.method, chooser.model, group
        self.readers = list(dict.fromkeys(chooser.graph.consumers(group)))
        modules: dict[str, Any] = {name: self.model.get_submodule(name) for name in self.readers}
        self.weights = {f"{name}.weight": module.weight for name, module in modules.items()}
        self.biases = [module.bias for module in modules.values() if module.bias is not None]
        self.warm = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.members = [m for m in group.members if m.role == "in"]
        self.auxiliary = chooser.auxiliary_after(group)
        self.taps: dict[str, Tensor] = {}
        self.handles = [
            listen(self.model, name, self.taps) for name in {*self.readers, *filter(None, [self.auxiliary])}
        ]
        self.targets = self.responses_before()
        self.at = 0
        with torch.no_grad():
            for member in self.members:
                index = member.index.flatten().to(self.weights[member.tensor].device)
                self.weights[member.tensor].index_fill_(member.dim, index, 0.0)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def responses_before(self) -> list[dict[str, Tensor]]:
        """What the readers made of every batch in the network before pruning."""
        found = []
        with ExitStack() as stack:
            seen: dict[str, Tensor] = {}
            for name in self.readers:
                stack.callback(listen(self.chooser.before, name, seen).remove)
            for batch in self.chooser.batches:
                self.chooser.session.task.outputs(self.chooser.before, batch.inputs, batch.targets)
                found.append(dict(seen))
        return found

    def loss(self, number: int) -> Tensor:
        """L on one batch."""
        batch, method, task = self.chooser.batches[number], self.method, self.chooser.session.task
        outputs = task.outputs(self.model, batch.inputs, batch.targets)
        total = torch.zeros((), device=self.chooser.session.device)
        if method.reconstruction_weight:
            for name in self.readers:
                error = (self.taps[name] - self.targets[number][name]).square().mean() / 2
                total = total + method.reconstruction_weight * error
        if method.auxiliary_weight:
            logits = (
                outputs if self.auxiliary is None else self.chooser.heads[self.auxiliary](self.taps[self.auxiliary])
            )
            total = total + method.auxiliary_weight * task.loss(logits, batch.targets)
        return total

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Of the weights, also where they are zero because their channel is not chosen; and of the biases."""
        names = [*self.weights, *(f"bias {n}" for n in range(len(self.biases)))]
        variables = [*self.weights.values(), *self.biases]
        found = torch.autograd.grad(loss, variables, allow_unused=True)
        return {n: torch.zeros_like(v) if g is None else g for n, v, g in zip(names, variables, found, strict=True)}

    def loss_and_slopes(self) -> tuple[float, Tensor]:
        """The loss over all selection data, and by what its gradient ranks every channel."""
        method, batches = self.method, self.chooser.batches
        total, count, sums = 0.0, 0, {name: torch.zeros_like(w) for name, w in self.weights.items()}
        for number, batch in enumerate(batches):
            size = length(batch.inputs)
            with torch.enable_grad():
                loss = self.loss(number)
                gradients = self.gradients(loss) if method.order == "gradient" else {}
            total, count = total + float(loss.detach()) * size, count + size
            for name in sums:
                sums[name] += gradients[name] * size if gradients else 0.0
        if method.order == "random":
            slopes = torch.rand(self.group.size, generator=self.chooser.random)
        else:
            rows = unit_rows(self.group, sums if method.order == "gradient" else self.warm, ("in",))
            slopes = rows.norm(dim=1) if method.order == "gradient" else rows.abs().sum(1)
        return total / max(1, count), slopes.cpu()

    @torch.no_grad()
    def admit(self, units: Tensor) -> None:
        """Give these channels their old weights."""
        for member in self.members:
            index = member.index[units].flatten().to(self.weights[member.tensor].device)
            warm = self.warm[member.tensor].index_select(member.dim, index)
            self.weights[member.tensor].index_copy_(member.dim, index, warm)

    def train(self, chosen: Tensor) -> None:
        """SGD on the weights of the chosen channels and the biases."""
        masks = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        for member in self.members:
            index = member.index[chosen].flatten().to(masks[member.tensor].device)
            masks[member.tensor].index_fill_(member.dim, index, 1.0)
        for _ in range(self.method.steps):
            with torch.enable_grad():
                gradients = self.gradients(self.loss(self.at % len(self.chooser.batches)))
            self.at += 1
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.sub_(masks[name] * gradients[name], alpha=self.method.layer_learning_rate)
                for number, bias in enumerate(self.biases):
                    bias.sub_(gradients[f"bias {number}"], alpha=self.method.layer_learning_rate)
