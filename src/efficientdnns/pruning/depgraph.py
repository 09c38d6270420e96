"""DepGraph: everything that must go with a channel forms a group, and the whole group decides how important it is.

Sparse training first pushes unimportant groups towards zero together, so that removing them hardly hurts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from efficientdnns.method import Paper
from efficientdnns.parts.channel_pruning import ChannelCallback, ChannelTraining, Scores
from efficientdnns.parts.criteria import Normalization, group_importance
from efficientdnns.parts.structured import Selection, weakest
from efficientdnns.session import Session
from efficientdnns.surgery import Group, Member
from efficientdnns.training import Callback, Trainer

NonNegative = Annotated[float, Field(ge=0)]


def decay_factors(importance: Tensor, alpha: float = 4.0) -> Tensor:
    r""":math:`\gamma_k = 2^{\alpha (I_{max} - I_k) / (I_{max} - I_{min})}`; 1 where all are equal."""
    spread = importance.max() - importance.min()
    if spread <= 0:
        return torch.ones_like(importance)
    return 2 ** (alpha * (importance.max() - importance) / spread)


class DepGraph(ChannelTraining):
    r"""DepGraph, `Fang et al., CVPR 2023 <https://arxiv.org/abs/2301.12900>`_.

    Layers whose channels can only be removed together form a group g (the library's surgery finds them); the importance
    of its channel k is that of everything that goes with it,

    .. math:: I_{g,k} = \sum_{w \in g} \|w[k]\|_2^2, \qquad
        R(g) = \frac{\lambda}{2} \sum_k \gamma_k I_{g,k}, \qquad
        \gamma_k = 2^{\alpha (I_g^{max} - I_{g,k}) / (I_g^{max} - I_g^{min})}

    During ``epochs`` epochs of sparse training R decays all weights of unimportant channels, consistently over the group,
    up to :math:`2^\alpha` times as much as those of important ones; the channels of least importance are then removed in
    ``iterative_steps`` steps, with importance measured anew in each, and ``retrain_epochs`` follow. ``epochs=0`` prunes a
    trained network at once.

    Deviations:
        Groups are found in the exported graph rather than by walking gradient functions. Importance is averaged over the
        layers of a group before it is normalised, as in the official code. It is measured every ``every`` steps rather
        than in each. How many channels each group keeps is settled before the first of the ``iterative_steps``. Weight
        decay is off during sparse training unless it is asked for. The classifier keeps its classes, and groups that
        reach the network's outputs stay whole.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="depgraph",
        title="DepGraph: Towards Any Structural Pruning",
        authors="Gongfan Fang, Xinyin Ma, Mingli Song, Michael Bi Mi, Xinchao Wang",
        venue="CVPR",
        year=2023,
        url="https://arxiv.org/abs/2301.12900",
    )
    comparable: ClassVar[bool] = True
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 2, "learning_rate": 0.01, "iterative_steps": 2}

    epochs: NonNegativeInt = 100
    """Epochs of sparse training; 0 prunes at once."""
    reg: NonNegative = 5e-4
    """Strength lambda of the decay; 0 leaves sparse training out of it."""
    alpha: NonNegative = 4.0
    """Range of the decay: the least important channels get 2^alpha times that of the most important."""
    normalize: Normalization = "mean"
    """What makes groups comparable with scope=global: the mean importance of the group, its 'max' (the paper's CIFAR runs), or
    the mean of its upper half ('top')."""
    iterative_steps: PositiveInt = 1
    """Steps in which channels are removed; importance is measured anew in each."""
    every: PositiveInt = 10
    """Training steps between two measurements of the decay factors."""

    def settings(self) -> dict[str, Any]:
        return {"weight_decay": 0.0} | super().settings()

    def callback(self, session: Session) -> Callback:
        return GroupSparsity(self, session)


class GroupSparsity(ChannelCallback):
    """Adds the gradient of R; removes the channels of least group importance."""

    method: DepGraph

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        self.decays: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_backward(self, trainer: Trainer) -> None:
        if not self.method.reg:
            return
        parameters = dict(trainer.model.named_parameters(remove_duplicate=False))
        if trainer.step % self.method.every == 0 or not self.decays:
            self.decays = self.measure(parameters)
        for name, decay in self.decays.items():
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.addcmul_(parameters[name], decay, value=self.method.reg)

    def measure(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """gamma for every entry of every tensor of the groups, shaped to broadcast over it; summed over dimensions."""
        values = {name: p.detach() for name, p in parameters.items()}
        total: dict[str, Tensor] = {}
        for group in self.groups:
            gamma = decay_factors(group_importance(group, values, "mean").sqrt(), self.method.alpha)
            for member in regularised(group):
                if member.tensor in values:
                    value = values[member.tensor]
                    along = value.new_zeros(value.shape[member.dim])
                    index = member.index.to(value.device)
                    along[index.flatten()] = gamma.to(value)[:, None].expand(index.shape).flatten()
                    shape = [1] * value.dim()
                    shape[member.dim] = -1
                    along = along.view(shape)
                    total[member.tensor] = total[member.tensor] + along if member.tensor in total else along
        return total

    def state_dict(self) -> dict[str, Any]:
        return {"decays": self.decays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decays = {name: decay.to(self.session.device) for name, decay in state["decays"].items()}

    def scores(self, trainer: Trainer) -> Scores:
        return importances(trainer.model, self.groups, {}, self.method.normalize)

    def select(self, trainer: Trainer) -> Selection:
        final = self.plan(self.scores(trainer))
        selection: Selection = {group.name: torch.empty(0, dtype=torch.long) for group in self.groups}
        for step in range(1, self.method.iterative_steps + 1):
            scores = importances(trainer.model, self.groups, selection, self.method.normalize)
            for group in self.groups:
                count = round((group.size - final[group.name]) * step / self.method.iterative_steps)
                selection[group.name] = weakest(scores[group.name], count)
        return selection


def regularised(group: Group) -> Iterator[Member]:
    """The slices of a group that are decayed: weights that make and read its channels, and norm scales; no biases."""
    return (member for member in group.members if "bias" not in member.attribute)


@torch.no_grad()
def importances(
    model: nn.Module, groups: Sequence[Group], gone: Selection, normalize: Normalization = "mean"
) -> dict[str, Tensor]:
    """Importance of the channels of every group once those in ``gone`` are removed, which themselves rank below all others."""
    values = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    touched = {m.tensor for g in groups for m in g.members if len(gone.get(g.name, ())) and m.tensor in values}
    values |= {name: values[name].clone() for name in touched}
    for group in groups:
        for member in group.members:
            if member.tensor in touched and len(gone.get(group.name, ())):
                rows = member.index[gone[group.name]].flatten()
                values[member.tensor].index_fill_(member.dim, rows.to(values[member.tensor].device), 0.0)
    scores = {}
    for group in groups:
        score = group_importance(group, values, "mean", normalize).cpu()
        score[gone.get(group.name, torch.empty(0, dtype=torch.long))] = -1.0
        scores[group.name] = score
    return scores
