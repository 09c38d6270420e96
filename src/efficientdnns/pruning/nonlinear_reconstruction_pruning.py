"""Nonlinear reconstruction pruning: channels go whose loss changes the activated responses behind them least.

Layer by layer, greedy elimination and gradient descent on the remaining weights take turns; no labels are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from efficientdnns.method import Need, Paper
from efficientdnns.parts.channel_pruning import ChannelPruning, Scores, sweep
from efficientdnns.parts.criteria import channel_scores
from efficientdnns.parts.learned_factors import left_whole
from efficientdnns.parts.reconstruction import (
    Reading,
    descend,
    frozen_copy,
    gather,
    least_squares,
    readable,
    removal_errors,
    start_from_least_squares,
    total_error,
    write_back,
)
from efficientdnns.parts.structured import Selection, weakest
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group


def eliminate(readings: Sequence[Reading], keep: int, drop_fraction: float = 0.05, steps: int = 10) -> Tensor:
    """Indices of the ``keep`` channels that are left by greedy elimination, with gradient descent between its rounds.

    In every round :math:`q = \\min(|S| - K, \\max(1, \\lceil p |S| \\rceil))` channels go whose removal, with the other
    weights as they are, leaves the smallest error summed over the readers.

    Args:
        readings: of all readers; their weights are changed.
        keep: K.
        drop_fraction: p.
        steps: of gradient descent after every round.
    """
    kept = torch.arange(readings[0].weight.shape[0])
    while len(kept) > keep:
        errors = removal_errors(readings, kept)
        count = min(len(kept) - keep, max(1, math.ceil(drop_fraction * len(kept))))
        going = weakest(errors, count)
        kept = kept[~torch.isin(torch.arange(len(kept)), going)]
        for reading in readings:
            descend(reading, kept, steps)
    return kept


class NonlinearReconstructionPruning(ChannelPruning):
    r"""Nonlinear reconstruction, `Jiang et al., IJCAI 2018 <https://doi.org/10.24963/ijcai.2018/318>`_.

    With :math:`X_j` what the next layer sees of channel j in the network pruned so far, :math:`W_j` the weights that read
    it and :math:`Y^*` the activated response of the original network on the same inputs,

    .. math:: \min_{S, W} \frac{1}{2n} \Big\| Y^* - f\Big(\sum_{j \in S} X_j W_j + b\Big) \Big\|_F^2
        \quad \text{s.t. } |S| \le K

    where f is what follows: the batch norm (frozen) and the activation, or nothing. From the first layer to the last
    channels are eliminated greedily, a few at a time, with full-batch gradient descent with backtracking on W and b between
    the rounds (`eliminate`); the refinement at the end starts from the least-squares fit of the linear response where that is
    better. Where several layers read the channels, their errors are added.

    Deviations:
        The paper's text was not at hand: all beyond "minimise the reconstruction error of nonlinear units layer by layer by
        greedy selection and gradient descent" is a reconstruction. Groups that something else than linear layers and
        ungrouped convolutions reads are left whole and named in the report. With ``scope=global`` norms of weights decide
        how many go from each group.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="nonlinear-reconstruction-pruning",
        title="Efficient DNN Neuron Pruning by Minimizing Layer-wise Nonlinear Reconstruction Error",
        authors="Chunhui Jiang, Guiying Li, Chao Qian, Ke Tang",
        venue="IJCAI",
        year=2018,
        url="https://doi.org/10.24963/ijcai.2018/318",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration data"})
    contract_fields: ClassVar[dict[str, Any]] = {
        "samples": 64, "points": 4, "drop_fraction": 0.3, "steps": 2, "refine_steps": 5
    }  # fmt: skip

    criterion: Literal["nonlinear", "linear"] = "nonlinear"
    """The error of the activated response, or as a control that of the linear one, solved by least squares."""
    drop_fraction: Annotated[float, Field(gt=0, le=1)] = 0.05
    """p: share of the remaining channels that go in one round."""
    steps: NonNegativeInt = 10
    """Gradient steps after every round."""
    refine_steps: NonNegativeInt = 100
    """Most gradient steps of the final refinement of a layer."""
    tolerance: Annotated[float, Field(ge=0)] = 1e-4
    """The refinement ends when a step lowers the error by a smaller share of it."""
    samples: PositiveInt = 2000
    """Calibration inputs; labels are not used."""
    points: PositiveInt = 10
    """Places of a feature map used of each input."""

    def able(self, model: nn.Module, groups: Sequence[Group]) -> list[Group]:
        return readable(model, groups)

    def scores(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Scores:
        return channel_scores(session.model, groups, "l1")

    def select(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Selection:
        plan = self.plan(session, graph, groups, self.scores(session, graph, groups))
        original, errors = frozen_copy(session.model), dict[str, dict[str, float]]()

        def choose(group: Group, keep: int) -> Tensor:
            readings = gather(session, original, session.model, graph, group, self.samples, self.points)
            kept = self.fit(readings, keep)
            write_back(session.model, readings)
            errors[group.name] = {
                "activated": total_error(readings, kept),
                "linear": total_error([reading.without_activation() for reading in readings], kept),
            }
            return torch.tensor(sorted(set(range(group.size)) - set(kept.tolist())), dtype=torch.long)

        selection = sweep(session, groups, plan, choose)
        session.report(errors=errors, not_read=left_whole(graph, groups))
        return selection

    def fit(self, readings: list[Reading], keep: int) -> Tensor:
        """Indices of the channels that stay; the weights of the readings are those that make up for the others."""
        if self.criterion == "linear":
            linear = [reading.without_activation() for reading in readings]
            kept = eliminate(linear, keep, self.drop_fraction, self.steps)
            for reading in readings:
                weight, reading.bias = least_squares(reading, kept)
                reading.weight[kept] = weight
            return kept
        kept = eliminate(readings, keep, self.drop_fraction, self.steps)
        start_from_least_squares(readings, kept)
        for reading in readings:
            descend(reading, kept, self.refine_steps, self.tolerance)
        return kept
