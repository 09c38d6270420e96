"""Auto-balanced filter pruning: weak filters are decayed, strong ones grow, in balance.

Before the cut what the network can do moves from the filters that are to go into those that stay.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.budget import Plan
from efficientdnns.method import Paper
from efficientdnns.parts.channel_pruning import ChannelCallback, ChannelTraining, Scores, unit_masks
from efficientdnns.parts.criteria import unit_rows
from efficientdnns.parts.structured import Selection, weakest
from efficientdnns.session import Session
from efficientdnns.surgery import Group, Member
from efficientdnns.training import Callback, Trainer
from efficientdnns.training.sparsity import apply_masks

SMALLEST = 1e-12
"""Added to a score before its logarithm is taken."""


def balance_factors(scores: Tensor, keep: int) -> Tensor:
    r"""lambda of every filter: :math:`1 + \log(\theta / M)` where the score M is below the ``keep``-th largest score theta,
    else :math:`-1 - \log(M / \theta)`.

    Args:
        scores: (n,) M, not negative.
        keep: how many are to stay, from 1 to n.

    Returns:
        (n,) values above 1 for filters that are to go and from -1 downwards for those that stay.
    """
    threshold = scores.sort(descending=True).values[keep - 1]
    distance = ((threshold + SMALLEST) / (scores + SMALLEST)).log()
    return torch.where(scores < threshold, 1 + distance, -1 + distance)


def balance(factors: Tensor, squares: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""The two sums of a layer and the weight that balances them.

    :math:`S_P = \sum_{\lambda_j > 0} \lambda_j \|F_j\|^2`, :math:`S_R = \sum_{\lambda_j < 0} \lambda_j \|F_j\|^2` and
    :math:`\tau = -\alpha S_P / S_R`, so that :math:`\alpha S_P + \tau S_R = 0`; tau is 0 where nothing is to grow.

    Args:
        factors: (n,) lambda.
        squares: (n,) squared norms of the filters.
        alpha: strength of the decay.
    """
    terms = factors * squares
    weak, strong = terms.clamp_min(0).sum(), terms.clamp_max(0).sum()
    return weak, strong, torch.where(strong < 0, -alpha * weak / strong.clamp_max(-1e-30), torch.zeros_like(weak))


class AutoBalancedFilterPruning(ChannelTraining):
    r"""Auto-balanced filter pruning, `Ding et al., AAAI 2018 <https://doi.org/10.1609/aaai.v32i1.12262>`_.

    When a round begins, the L1 norms M of the filters F of a layer fix which are to go (P: all below the r-th largest norm
    :math:`\theta`) and which stay (R), and how strongly they are treated:

    .. math:: \lambda_j = 1 + \log(\theta / M_j) \;(j \in P), \qquad \lambda_j = -1 - \log(M_j / \theta) \;(j \in R)

    While it lasts the loss of every layer has the term :math:`\alpha S_P + \tau S_R`,

    .. math:: S_P = \sum_{j \in P} \lambda_j \|F_j\|_2^2, \quad S_R = \sum_{j \in R} \lambda_j \|F_j\|_2^2, \quad
        \tau = -\alpha S_P / S_R

    which is zero in value (tau is a constant for the gradient, computed anew in every step) but shrinks P and lets R grow:
    the gradient gets :math:`2 \alpha \lambda_j F_j` and :math:`2 \tau \lambda_j F_j`. Alpha takes the place of weight decay
    on these layers. At its end the filters of least norm are removed. With several ``rounds`` all layers get a little
    narrower together in each; ``retrain_epochs`` follow the last.

    In a residual stream the layer that first writes to it sets the pace: its norms choose, the others follow, each with its
    own tau. Plain gradient steps shrink P as long as :math:`2 \eta \alpha \lambda_j < 1`, where lambda is 30 at the most.

    Deviations:
        Between rounds what is to go is held at zero (filters, biases, scales and shifts) and cut only after the last: all
        rounds share one run. "Filters" are whatever makes a channel: neurons, attention heads, gates of an LSTM. Groups
        that no layer makes are chosen by the vectors on them and not regularised. The scores do not look at batch norms:
        where one follows, growth of the filters is without effect on the function, and so is part of the transfer.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="auto-balanced-filter-pruning",
        title="Auto-balanced Filter Pruning for Efficient Convolutional Neural Networks",
        authors="Xiaohan Ding, Guiguang Ding, Jungong Han, Sheng Tang",
        venue="AAAI",
        year=2018,
        url="https://doi.org/10.1609/aaai.v32i1.12262",
    )
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 2, "rounds": 2, "learning_rate": 0.01, "alpha": 0.01}

    alpha: PositiveFloat = 5e-4
    """Strength of the decay of what is to go; a short run needs 0.01 to 0.03."""
    rounds: PositiveInt = 1
    """Rounds in which all groups get narrower together; the epochs are shared out over them."""

    def callback(self, session: Session) -> Callback:
        return AutoBalance(self, session)


class AutoBalance(ChannelCallback):
    """Adds the gradients of the balanced decay; zeroes the weakest filters after every round and removes them at the end."""

    method: AutoBalancedFilterPruning

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        self.final: Plan = self.plan(self.scores(trainer))
        self.round = 0
        self.factors: dict[str, Tensor] = {}
        """lambda of every row of every regularised tensor, shaped to broadcast over it; 0 where nothing is done."""
        self.gone: Selection = {group.name: torch.empty(0, dtype=torch.long) for group in self.groups}
        self.masks: dict[str, Tensor] = {}
        self.energy: list[dict[str, float]] = []

    def parameter_groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        names = {member.tensor for group in self.groups for member in _writers(group)}
        own = [p for name, p in trainer.model.named_parameters() if name in names and p.requires_grad]
        return [{"params": own, "weight_decay": 0.0}] if own else []

    def start(self, trainer: Trainer) -> None:
        self.begin(trainer)

    @torch.no_grad()
    def begin(self, trainer: Trainer) -> None:
        """Fix the factors of a round by the norms as they are now."""
        self.round += 1
        self.factors = {}
        scores = self.scores(trainer)
        parameters = dict(trainer.model.named_parameters(remove_duplicate=False))
        for group in self.groups:
            left = torch.ones(group.size, dtype=torch.bool)
            left[self.gone[group.name]] = False
            factors = torch.zeros(group.size)
            factors[left] = balance_factors(scores[group.name][left], self.width(group))
            for member in _writers(group):
                if member.tensor in parameters:
                    self._spread(member, factors, parameters[member.tensor])
        self.energy.append(self.measure(trainer.model))

    def width(self, group: Group) -> int:
        """How many channels the group keeps after this round."""
        return group.size - round((group.size - self.final[group.name]) * self.round / self.method.rounds)

    def _spread(self, member: Member, factors: Tensor, value: Tensor) -> None:
        shape = [1] * value.dim()
        shape[member.dim] = -1
        along = self.factors.setdefault(member.tensor, value.new_zeros(value.shape[member.dim]).view(shape))
        index = member.index.to(value.device)
        along.view(-1)[index.flatten()] = factors.to(value)[:, None].expand(index.shape).flatten()

    @torch.no_grad()
    def after_backward(self, trainer: Trainer) -> None:
        alpha = self.method.alpha
        for name, factors in self.factors.items():
            weight = trainer.model.get_parameter(name)
            if weight.grad is None:
                continue
            others = [dim for dim in range(weight.dim()) if factors.shape[dim] == 1]
            _, _, tau = balance(
                factors, weight.square().sum(others, keepdim=True) if others else weight.square(), alpha
            )
            weight.grad.addcmul_(weight, 2 * factors * torch.where(factors > 0, alpha, tau))

    def after_step(self, trainer: Trainer) -> None:
        apply_masks(trainer.model, self.masks)
        if self.round < self.method.rounds and trainer.step + 1 == round(
            trainer.total_steps * self.round / self.method.rounds
        ):
            self.end(trainer)
            self.begin(trainer)

    def end(self, trainer: Trainer) -> None:
        """Choose by the norms as they are now what goes after this round, and hold it at zero."""
        scores = self.scores(trainer)
        for group in self.groups:
            score = scores[group.name].clone()
            score[self.gone[group.name]] = -1.0
            self.gone[group.name] = weakest(score, group.size - self.width(group))
        self.masks = unit_masks(trainer.model, self.groups, self.gone)
        apply_masks(trainer.model, self.masks)

    @torch.no_grad()
    def scores(self, trainer: Trainer) -> Scores:
        values = {name: p.detach() for name, p in trainer.model.named_parameters(remove_duplicate=False)}
        return {group.name: _norms(group, values, 1).cpu() for group in self.groups}

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Share of the squared weight that lies in the filters that will stay if nothing changes."""
        values = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
        shares = {}
        for group in self.groups:
            squares, norms = _norms(group, values, 2).cpu().square(), _norms(group, values, 1).cpu()
            stay = norms.sort(descending=True, stable=True).indices[: self.final[group.name]]
            shares[group.name] = float(squares[stay].sum() / squares.sum().clamp_min(SMALLEST))
        return shares

    def select(self, trainer: Trainer) -> Selection:
        self.round = self.method.rounds
        self.energy.append(self.measure(trainer.model))
        self.end(trainer)
        self.session.report(rounds=self.method.rounds, energy_in_kept=self.energy)
        return self.gone

    def state_dict(self) -> dict[str, Any]:
        names = ("final", "round", "factors", "gone", "masks", "energy")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.final, self.round, self.gone, self.energy = (state[n] for n in ("final", "round", "gone", "energy"))
        self.factors, self.masks = (
            {name: value.to(self.session.device) for name, value in state[key].items()} for key in ("factors", "masks")
        )


def _writers(group: Group) -> list[Member]:
    return [member for member in group.members if member.role == "out" and "bias" not in member.attribute]


def _norms(group: Group, values: dict[str, Tensor], order: int) -> Tensor:
    """Norms of the filters of the layer that sets the pace; of the vectors on the channels where no layer makes them."""
    made = [member for member in _writers(group) if member.tensor in values]
    if not made:
        return unit_rows(group, values, ("vector",)).norm(p=order, dim=1)
    rows = values[made[0].tensor].movedim(made[0].dim, 0)
    rows = rows.reshape(len(rows), -1)
    return rows[made[0].index.to(rows.device)].flatten(1).norm(p=order, dim=1)
