"""Structured probabilistic pruning: groups of weights are hidden at random, with probabilities that rise and fall by rank.

A group that keeps a low rank ends at probability one and is gone; one that was ranked low by bad luck recovers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from efficientdnns.data.split import Batch
from efficientdnns.errors import ConfigurationError
from efficientdnns.method import Paper
from efficientdnns.parts.budgets import limits_of, require_reachable
from efficientdnns.parts.channel_pruning import ChannelCallback, ChannelTraining
from efficientdnns.parts.columns import column_norms, column_weights, columns_kept, without_columns
from efficientdnns.parts.criteria import channel_scores
from efficientdnns.parts.dead import remove_dead_channels
from efficientdnns.parts.sparse_budgets import kept_weights, trim
from efficientdnns.parts.structured import Selection
from efficientdnns.session import Session
from efficientdnns.training import Callback, Trainer

Positive = Annotated[float, Field(gt=0, le=1)]
Flatness = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Shape = Literal["exponential", "linear"]


def increment(
    ranks: Tensor, target: float, amount: float = 0.05, flatness: float = 0.25, shape: Shape = "exponential"
) -> Tensor:
    r"""How much the pruning probability of a group of this rank changes in one update.

    With :math:`\alpha = (\log 2 - \log u) / T` and :math:`N = -\log(u) / \alpha`

    .. math:: \Delta(r) = A e^{-\alpha r} \; (r \le N), \qquad \Delta(r) = 2 u A - A e^{-\alpha (2 N - r)} \; (r > N),

    which falls from A at rank 0 through u A at N, its centre of symmetry, to 0 at rank T and below; or, as a straight line,
    :math:`\Delta(r) = A - A r / T`.

    Args:
        ranks: 0 for the group of least norm.
        target: T > 0, how many groups are still to go.
        amount: A > 0.
        flatness: u in (0, 1); the smaller, the flatter around the target.
        shape: of the curve.

    Returns:
        Increments in float64, not below -1 (more cannot matter to a probability).
    """
    ranks = ranks.double()
    if shape == "linear":
        return (amount - amount * ranks / target).clamp_min(-1.0)
    alpha = (math.log(2) - math.log(flatness)) / target
    centre = -math.log(flatness) / alpha
    low = amount * (-alpha * ranks).exp()
    # Far beyond the target the exponent is of the order of thousands; 50 is far more than a probability can lose.
    high = 2 * flatness * amount - amount * (-alpha * (2 * centre - ranks)).clamp_max(50.0).exp()
    return torch.where(ranks <= centre, low, high).clamp_min(-1.0)


def updated(probabilities: Tensor, scores: Tensor, goal: int, **curve: Any) -> Tensor:
    """Pruning probabilities after one update of one layer.

    Groups at 1 stay there and out of the ranking; once ``goal`` groups are at 1 all others go to 0.

    Args:
        probabilities: (n,) float64.
        scores: (n,) norms of the groups; ties are ranked by position.
        goal: how many groups are to go in the end.
        curve: ``amount``, ``flatness`` and ``shape`` of `increment`.
    """
    undecided = probabilities < 1
    remaining = goal - int((~undecided).sum())
    if remaining > 0:
        open_scores = scores[undecided].double()
        ranks = torch.empty_like(open_scores)
        ranks[open_scores.argsort(stable=True)] = torch.arange(len(ranks), dtype=ranks.dtype, device=ranks.device)
        steps = increment(ranks, remaining, **curve)
        steps = torch.where(ranks >= remaining, steps.clamp_max(0.0), steps)  # rounding must not lift rank T above 0
        probabilities = probabilities.clone()
        moved = (probabilities[undecided] + steps).clamp(0.0, 1.0)
        probabilities[undecided] = torch.where(moved > 1 - 1e-9, torch.ones_like(moved), moved)  # 20 times 0.05
        remaining = goal - int((probabilities >= 1).sum())
    return (
        torch.where(probabilities < 1, torch.zeros_like(probabilities), probabilities)
        if remaining <= 0
        else probabilities
    )


class StructuredProbabilisticPruning(ChannelTraining):
    r"""Structured probabilistic pruning, `Wang et al., BMVC 2018 <https://arxiv.org/abs/1709.06994>`_.

    Every group g of weights of a layer has a pruning probability p, at first 0. In every step the groups are hidden at
    random, :math:`m_g \sim \mathrm{Bernoulli}(1 - p_g)`: the network computes with :math:`m_g w_g`, and hidden groups come
    back unchanged after the step. Every ``interval`` steps the groups are ranked by the L1 norm of their weights (rank 0
    for the smallest; groups at p = 1 are gone and take no part) and

    .. math:: p_g \leftarrow \min(\max(p_g + \Delta(r_g), 0), 1),

    with :math:`\Delta` from A at rank 0 to 0 at the target rank and below zero for all others (see `increment`). When as
    many groups of a layer have reached 1 as are to go, the others go to 0. ``unit`` says what a group is: a 'filter' (all
    that makes and reads one channel) or a 'column' of the matrix that a convolution or linear layer multiplies with, that is
    one input position in all filters. Columns become zeros, and channels that nothing reads any more are removed.

    The first group can be gone after 1/A updates: ``interval`` / ``amount`` steps, 3,600 with the paper's values.

    Deviations:
        What is undecided at the share ``end`` of the run is decided by probability. Hidden channels are hidden from their
        readers, so that batch-norm statistics stay those of the filters. During training validation sees every group
        weighted with 1 - p. The share pruned is one for all layers, or, for filters, one threshold for all of them
        (``scope=global``) settled before the run; ceil(R n) columns go and floor(R n) filters. Grouped and transposed
        convolutions have no columns here. A budget of parameters or
        bytes can be solved for with either unit, MACs and latency with filters only.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="structured-probabilistic-pruning",
        title="Structured Probabilistic Pruning for Convolutional Neural Network Acceleration",
        authors="Huan Wang, Qiming Zhang, Yuehai Wang, Haoji Hu",
        venue="BMVC",
        year=2018,
        url="https://arxiv.org/abs/1709.06994",
    )
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 2, "interval": 1, "amount": 0.3, "learning_rate": 0.01}

    unit: Literal["filter", "column"] = "filter"
    """What is hidden and removed together: all that belongs to a channel, or one input position of a layer."""
    amount: Positive = 0.05
    """A: what one update adds to the probability of the weakest group."""
    flatness: Flatness = 0.25
    """u: the increment at the centre of the curve is u A."""
    interval: PositiveInt = 180
    """t: steps between two updates of the probabilities."""
    shape: Shape = "exponential"
    """The centre-symmetric exponential curve, or a straight line."""
    end: Share = 0.75
    """Share of the run after which everything is decided; the rest repairs."""

    @property
    def solves(self) -> frozenset[str]:
        return self.budgets if self.unit == "filter" else self.budgets & {"params", "bytes"}

    def check(self, session: Session) -> None:
        super().check(session)
        if self.unit == "column" and (self.scope == "global" or self.round_to > 1):
            raise ConfigurationError(
                f"{self.name}: scope=global and round_to need unit=filter; leave them out with columns"
            )

    def check_network(self, session: Session) -> None:
        if self.unit == "filter":
            super().check_network(session)
            return
        weights = column_weights(session.model, self.skip, self.name)
        columns_kept(weights, 0.0, self.ratios, self.name)
        if limits_of(session, self):
            require_reachable(session, self, lambda: without_columns(session, dict.fromkeys(weights, 1)))

    def columns(self, session: Session) -> dict[str, int]:
        """How many columns of every weight stay."""
        weights = column_weights(session.model, self.skip, self.name)
        if not limits_of(session, self):
            return columns_kept(weights, self.pruning_ratio, self.ratios, self.name)
        total = sum(weight.numel() for weight in weights.values())

        def plan(count: int) -> dict[str, int]:
            return columns_kept(weights, 1 - count / total, self.ratios, self.name)

        return plan(kept_weights(session, self, lambda count: without_columns(session, plan(count)), 0, total))

    def callback(self, session: Session) -> Callback:
        return HiddenGroups(self, session)


@dataclass(frozen=True)
class Place:
    """Where the groups of a layer lie in one tensor.

    Attributes:
        layer: name of the groups.
        tensor: parameter name.
        dim: dimension along which they lie; for columns 1, all others behind it taken together.
        index: (groups, k) positions along it.
        reads: whether the group contributes through these entries; without them it is hidden.
    """

    layer: str
    tensor: str
    dim: int
    index: Tensor
    reads: bool

    def spread(self, values: Tensor, like: Tensor, columns: bool) -> Tensor:
        """One value for each group, for the entries of the tensor it stands at (1 elsewhere), shaped to broadcast."""
        length = like[0].numel() if columns else like.shape[self.dim]
        along = torch.ones(length, dtype=values.dtype)
        along[self.index.flatten()] = values[:, None].expand(self.index.shape).flatten()
        shape = [1] * like.dim()
        shape[self.dim] = -1
        return along.to(like.device).view((1, *like.shape[1:]) if columns else shape)


class HiddenGroups(ChannelCallback):
    """Pruning probabilities of the groups of all layers; groups are hidden for a step and come back as they were."""

    method: StructuredProbabilisticPruning

    def setup(self, trainer: Trainer) -> None:
        self.columns = self.method.unit == "column"
        if self.columns:
            kept: Mapping[str, int] = self.method.columns(self.session)
            weights = {name: trainer.model.get_parameter(name) for name in kept}
            sizes = {name: weight[0].numel() for name, weight in weights.items()}
            self.places = [Place(name, name, 1, torch.arange(size)[:, None], True) for name, size in sizes.items()]
        else:
            super().setup(trainer)
            kept = self.plan(channel_scores(trainer.model, self.groups))
            sizes = {group.name: group.size for group in self.groups}
            own = dict(trainer.model.named_parameters(remove_duplicate=False))
            members = [(group.name, m) for group in self.groups for m in group.members if m.tensor in own]
            self.places = [Place(name, m.tensor, m.dim, m.index, m.role == "in") for name, m in members]
        self.goals = {name: size - kept[name] for name, size in sizes.items()}
        self.p = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        self.last = max(1, round(self.method.end * trainer.total_steps))
        self.hidden: dict[str, tuple[Tensor, Tensor]] = {}
        """By parameter name: the value before, and which entries go back to it."""
        self.forced = 0
        steps = self.method.interval / self.method.amount
        if trainer.epochs and steps > self.last:
            self.session.say(
                f"no group can reach probability 1 in {self.last} steps; it takes interval / amount = {steps:.0f}"
            )

    def norms(self, model: nn.Module) -> dict[str, Tensor]:
        """L1 norms of the groups of every layer."""
        if self.columns:
            return {name: column_norms(model.get_parameter(name)).cpu() for name in self.p}
        return channel_scores(model, self.groups)

    def sample(self) -> dict[str, Tensor]:
        """One draw of the masks: 0 with probability p."""
        sizes = [len(p) for p in self.p.values()]
        parts = torch.rand(sum(sizes), dtype=torch.float64).split(sizes)
        return {name: (part >= p).float() for (name, p), part in zip(self.p.items(), parts, strict=True)}

    @torch.no_grad()
    def hide(self, trainer: Trainer, stay: Mapping[str, Tensor]) -> None:
        """Weight what the groups contribute until `restore`; what belongs to groups of weight 0 is held as it is."""
        parameters = dict(trainer.model.named_parameters(remove_duplicate=False))
        factors: dict[str, Tensor] = {}
        held: dict[str, Tensor] = {}
        for place in self.places:
            if (stay[place.layer] == 1).all():
                continue
            factor = place.spread(stay[place.layer], parameters[place.tensor], self.columns)
            held[place.tensor] = held.get(place.tensor, torch.zeros_like(factor, dtype=torch.bool)) | (factor == 0)
            if place.reads:
                factors[place.tensor] = factors.get(place.tensor, 1.0) * factor
        self.hidden = {name: (parameters[name].detach().clone(), mask) for name, mask in held.items()}
        for name, factor in factors.items():
            parameters[name].mul_(factor)

    @torch.no_grad()
    def restore(self, trainer: Trainer, whole: bool = False) -> None:
        """Put back what was held, or everything that `hide` changed."""
        parameters = dict(trainer.model.named_parameters(remove_duplicate=False))
        for name, (value, mask) in self.hidden.items():
            parameters[name].copy_(value if whole else torch.where(mask, value, parameters[name]))
        self.hidden = {}

    def batch(self, trainer: Trainer, batch: Batch) -> Batch:
        if trainer.step == self.last:
            self.decide(self.norms(trainer.model))
        elif trainer.step < self.last and trainer.step % self.method.interval == 0:
            norms = self.norms(trainer.model)
            curve = {"amount": self.method.amount, "flatness": self.method.flatness, "shape": self.method.shape}
            self.p = {name: updated(p, norms[name], self.goals[name], **curve) for name, p in self.p.items()}
        self.hide(trainer, self.sample())
        return batch

    @torch.no_grad()
    def after_backward(self, trainer: Trainer) -> None:
        for name, (_, mask) in self.hidden.items():
            gradient = trainer.model.get_parameter(name).grad
            if gradient is not None:
                gradient.masked_fill_(mask, 0.0)

    def after_step(self, trainer: Trainer) -> None:
        self.restore(trainer)

    @contextmanager
    def validation(self, trainer: Trainer) -> Iterator[None]:
        self.hide(trainer, {name: (1 - p).float() for name, p in self.p.items()})
        try:
            yield
        finally:
            self.restore(trainer, whole=True)

    def decide(self, norms: Mapping[str, Tensor]) -> None:
        """Let the groups of highest probability go where not enough are at 1 yet, of equal ones those of least norm."""
        for name, p in self.p.items():
            order = norms[name].argsort(stable=True)
            order = order[p[order].argsort(descending=True, stable=True)]
            self.forced += max(0, self.goals[name] - int((p >= 1).sum()))
            self.p[name] = torch.zeros_like(p).index_fill(0, order[: self.goals[name]], 1.0)

    def select(self, trainer: Trainer) -> Selection:
        self.decide(self.norms(trainer.model))
        self.session.report(undecided_at_the_end=self.forced)
        return {name: (p >= 1).nonzero().flatten() for name, p in self.p.items()}

    def finish(self, trainer: Trainer) -> None:
        if not self.columns:
            super().finish(trainer)
            return
        session = self.session
        session.model = trainer.model
        self.select(trainer)
        self.hide(trainer, {name: (p < 1).float() for name, p in self.p.items()})
        self.hidden = {}
        for name in self.p:
            trainer.model.get_parameter(name).detach().add_(0.0)  # no -0.0, which would have to be stored
        trim(session, self.method, trainer.model, self.p)
        trainer.model = session.model = remove_dead_channels(trainer.model, session.example_input)
        parameters = dict(trainer.model.named_parameters())
        session.sparse.update(name for name in self.p if name in parameters)
        session.report(columns={n: [len(p), int((p < 1).sum())] for n, p in self.p.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"p": self.p, "forced": self.forced, "goals": self.goals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.p, self.forced, self.goals = state["p"], state["forced"], state["goals"]
