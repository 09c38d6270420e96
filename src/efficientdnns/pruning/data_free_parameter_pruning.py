"""Data-free parameter pruning: of two channels with nearly the same weights one goes, and its twin takes its readers over.

Neither data nor training is needed; the network itself tells how far merging can go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from efficientdnns.errors import ConfigurationError
from efficientdnns.method import Paper
from efficientdnns.parts.channel_merging import incoming_weights, merge_outgoing, outgoing_rows
from efficientdnns.parts.channel_pruning import Scores, sweep
from efficientdnns.parts.own_width import OwnWidth
from efficientdnns.parts.structured import Selection
from efficientdnns.parts.weight_sets import WeightSets, squared_distances, weight_sets
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group, absorb_constants, remove

Similarity = Literal["euclidean", "normalized", "ratio"]
TINY = 1e-12


def differences(sets: WeightSets, similarity: Similarity) -> tuple[Tensor, Tensor]:
    r"""Squared differences :math:`\|\epsilon_{ij}\|^2` (n, n) of weight-sets and their scales :math:`\alpha` (n,).

    ``euclidean``: of weights and biases as they are, alpha = 1. ``normalized``: of both divided by alpha = ||W||.
    ``ratio``: with alpha = ||w||, the norm without the biases, and weights and biases of equal influence,

    .. math:: \|\epsilon_{ij}\| = \frac{\|\hat w_i - \hat w_j\|}{\|\hat w_i + \hat w_j\|}
              + \frac{|\hat b_i - \hat b_j|}{|\hat b_i + \hat b_j|}
    """
    weights, biases = sets.weights, sets.biases
    together = torch.cat([weights, biases], 1)
    if similarity == "euclidean":
        return squared_distances(together), weights.new_ones(len(weights))
    alpha = (weights if similarity == "ratio" else together).norm(dim=1)
    scale = alpha.clamp_min(TINY)[:, None]
    if similarity == "normalized":
        return squared_distances(together / scale), alpha
    parts = [_ratio(weights / scale)]
    if (biases != 0).any():
        parts.append(_ratio(biases / scale))
    return sum(parts).square(), alpha  # type: ignore[union-attr]


def _ratio(vectors: Tensor) -> Tensor:
    """||u - v|| / ||u + v|| of every pair of rows; large where they are opposite."""
    count = len(vectors)
    sums = squared_distances(torch.cat([vectors, -vectors]))[:count, count:]
    return squared_distances(vectors).sqrt() / (sums.sqrt() + TINY)


@dataclass
class Merging:
    r"""The merges of one layer, cheapest first.

    Merging j into i costs :math:`s_{ij} = \langle a_j^2 \rangle \|\epsilon_{ij}\|^2`, where :math:`\langle a_j^2 \rangle`
    is the mean square of the outgoing weights of the neuron that goes; then :math:`a_i \leftarrow a_i + a_j`.

    Attributes:
        differences: (n, n) squared differences of the weight-sets.
        outgoing: (n, m) outgoing weights times alpha; changed by the merges.
        blocked: (n,) neurons that none may be merged into.
        pairs: (kept, gone) of every merge.
        costs: saliency of every merge.
    """

    differences: Tensor
    outgoing: Tensor
    blocked: Tensor | None = None
    pairs: list[tuple[int, int]] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.differences = self.differences.detach().double().clone().fill_diagonal_(torch.inf)
        self.outgoing = self.outgoing.detach().double().clone()
        if self.blocked is not None:
            self.differences[self.blocked] = torch.inf
        self.power = (
            self.outgoing.square().mean(1) if self.outgoing.shape[1] else self.outgoing.new_zeros(len(self.outgoing))
        )
        self.alive = torch.ones(len(self.outgoing), dtype=torch.bool, device=self.outgoing.device)
        self.nearest, self.twin = self.differences.min(0)

    @property
    def saliency(self) -> Tensor:
        """S (n, n): row kept, column gone; infinite on the diagonal and where one is gone already."""
        return torch.where(self.differences.isinf(), torch.inf, self.power[None, :] * self.differences)

    @property
    def least(self) -> float:
        """The cost of the next merge."""
        return float(self._columns().min())

    def _columns(self) -> Tensor:
        """The least of every column of S."""
        return torch.where(self.alive & self.nearest.isfinite(), self.power * self.nearest, torch.inf)

    def merge(self) -> tuple[int, int]:
        """Merge the cheapest pair; returns (kept, gone)."""
        costs = self._columns()
        gone = int(costs.argmin())
        kept = int(self.twin[gone])
        self.pairs.append((kept, gone))
        self.costs.append(float(costs[gone]))
        self.outgoing[kept] += self.outgoing[gone]
        self.power[kept] = self.outgoing[kept].square().mean() if self.outgoing.shape[1] else 0.0
        self.alive[gone] = False
        self.differences[gone, :] = torch.inf
        self.differences[:, gone] = torch.inf
        orphans = (self.twin == gone) & self.alive
        if orphans.any():
            self.nearest[orphans], self.twin[orphans] = self.differences[:, orphans].min(0)
        return kept, gone

    def coefficients(self, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What merge_outgoing takes: gone (g,), kept (k,), and (g, k) alpha_gone / alpha_kept where one went into the other."""
        into = torch.arange(len(self.alive))
        for kept, gone in reversed(self.pairs):  # the last merge decides where the earlier ones end
            into[gone] = into[kept]
        gone_ones, kept_ones = (~self.alive).nonzero().flatten().cpu(), self.alive.nonzero().flatten().cpu()
        column = torch.searchsorted(kept_ones, into[gone_ones])
        found = torch.zeros(len(gone_ones), len(kept_ones), dtype=torch.float64)
        found[torch.arange(len(gone_ones)), column] = (alpha[gone_ones] / alpha[into[gone_ones]].clamp_min(TINY)).cpu()
        return gone_ones, kept_ones, found


def mode_of_saliencies(saliency: Tensor, bins: int = 100) -> float:
    """The mode of the bulk of a saliency matrix: the centre of the fullest of ``bins`` bins up to its 95th percentile."""
    values = saliency[saliency.isfinite()].cpu().numpy()
    if not len(values):
        return 0.0
    counts, edges = np.histogram(values, bins=bins, range=(0.0, max(float(np.quantile(values, 0.95)), 1e-300)))
    fullest = int(counts.argmax())
    return float(edges[fullest] + edges[fullest + 1]) / 2


class DataFreeParameterPruning(OwnWidth):
    r"""Data-free parameter pruning, `Srinivas and Babu, BMVC 2015 <https://arxiv.org/abs/1507.06149>`_.

    Neuron i has incoming weights and bias :math:`W_i` and outgoing weights :math:`a_i`. Removing j and adding
    :math:`a_j` to :math:`a_i` changes the next pre-activations by at most

    .. math:: s_{ij} = \langle a_j^2 \rangle \, \|W_i - W_j\|_2^2

    up to a common factor (mean over the next layer's units; activations are 1-Lipschitz). The pair of least s is merged,
    the column of i is computed anew, and so on. Positive homogeneity, h(c v) = c h(v), lets weight-sets be compared by
    direction: with :math:`\alpha = \|W\|` the difference is that of :math:`W / \alpha`, the outgoing weights count times
    :math:`\alpha`, and :math:`a_i \leftarrow a_i + (\alpha_j / \alpha_i)\, a_j`.

    Without ``pruning_ratio`` and budget each layer is merged as long as the least saliency is below the mode of its
    first saliency matrix, which needs no data either. Channels that are constant (no weights but a bias) go first, into
    the biases of their readers. Layers are treated in the order of execution.

    Deviations:
        Convolutions, residual streams and attention heads are merged like neurons: the weight-set of a channel is
        everything that makes it, batch norm folded in. Where scaling a channel's weights does not scale the channel
        (sigmoid, GELU, softmax, another norm on the way), weight-sets are compared as they are, and the report names
        the layer under ``compared_as_they_are``. The mode is that of the entries up to the 95th percentile. With
        ``scope: global`` channels are ordered over layers by the cost of their merge in the unpruned network.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="data-free-parameter-pruning",
        title="Data-free Parameter Pruning for Deep Neural Networks",
        authors="Suraj Srinivas, R. Venkatesh Babu",
        venue="BMVC",
        year=2015,
        url="https://arxiv.org/abs/1507.06149",
    )
    contract_fields: ClassVar[dict[str, Any]] = {"pruning_ratio": 0.5}

    similarity: Similarity = "normalized"
    """How weight-sets are compared: as they are, by direction, or by the paper's practical ratio; see `differences`."""
    surgery: bool = True
    """Whether the outgoing weights of a channel that goes are added to its twin's; without it as a control."""
    cutoff_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the merges that the mode of the saliencies predicts; the paper takes 0.25 to 0.75 for large networks."""
    bins: PositiveInt = 100
    """Bins of the histogram whose mode is the cut-off."""

    def check_network(self, session: Session) -> None:
        super().check_network(session)
        if "similarity" in self.model_fields_set and self.similarity != "euclidean":
            graph, groups = self.groups(session)
            if not any(weight_sets(session.model, graph, group).scalable for group in groups):
                raise ConfigurationError(
                    f"{self.name}: similarity {self.similarity} needs activations with h(cx) = c h(x), such as ReLU, which "
                    f"{type(session.model).__name__} does not have; write similarity: euclidean"
                )

    def apply(self, session: Session) -> None:
        self.remove_constants(session)
        super().apply(session)

    def remove_constants(self, session: Session) -> None:
        """Drop channels without weights; their readers' biases take over what they carry."""
        graph, groups = self.groups(session)
        constant = {
            g.name: (incoming_weights(session.model, graph, g)[0] == 0).all(1).nonzero().flatten() for g in groups
        }
        constant = {g.name: constant[g.name].cpu() for g in groups if 0 < len(constant[g.name]) < g.size}
        if constant:
            absorbed, selection, varying = absorb_constants(session.model, session.example_input, constant, graph)
            selection = {name: units for name, units in selection.items() if name not in varying}
            if selection:
                session.model = remove(absorbed, session.example_input, selection)
                session.report(constant={name: len(units) for name, units in selection.items()})

    def merging(self, session: Session, graph: ChannelGraph, group: Group) -> tuple[Merging, Tensor]:
        """The merges of a group as the network is now, and alpha."""
        sets = weight_sets(session.model, graph, group)
        squares, alpha = differences(sets, self.similarity if sets.scalable else "euclidean")
        return Merging(squares, outgoing_rows(session.model, group) * alpha[:, None], alpha == 0), alpha

    def scores(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Scores:
        """What merging each channel costs, never less than the merges before it."""
        found = {}
        for group in groups:
            merging, _ = self.merging(session, graph, group)
            score = torch.full((group.size,), torch.inf, dtype=torch.float64)
            while merging.least < torch.inf:
                _, gone = merging.merge()
                score[gone] = max(merging.costs)
            found[group.name] = torch.where(score.isinf(), 2 * max(merging.costs, default=0.0) + TINY, score)
        return found

    def select(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Selection:
        scores = self.scores(session, graph, groups) if self.scope == "global" else None
        plan = self.plan(session, graph, groups, scores)
        curves: dict[str, list[float]] = {}
        pairs: dict[str, list[tuple[int, int]]] = {}
        unscaled: list[str] = []

        def choose(group: Group, keep: int) -> Tensor:
            merging, alpha = self.merging(session, graph, group)
            if self.similarity != "euclidean" and bool((alpha == 1).all()):
                unscaled.append(group.name)
            for _ in range(group.size - (keep or self.width(merging))):
                if merging.least == torch.inf:  # nothing is left to be merged into
                    break
                merging.merge()
            gone, kept, coefficients = merging.coefficients(alpha)
            if self.surgery:
                merge_outgoing(session.model, group, gone, kept, coefficients)
            curves[group.name] = merging.costs[:: 1 + len(merging.costs) // 100]
            pairs[group.name] = merging.pairs[:10]
            return gone

        selection = sweep(session, groups, plan, choose)
        session.report(saliency=curves, first_pairs=pairs, compared_as_they_are=unscaled)
        return selection

    def width(self, merging: Merging) -> int:
        """How many channels stay by the mode of the saliencies."""
        size = len(merging.alive)
        cutoff = mode_of_saliencies(merging.saliency, self.bins)
        trial = Merging(merging.differences, merging.outgoing)
        while len(trial.pairs) < size - 1 and trial.least < cutoff:
            trial.merge()
        return self.rounded(size - max(1, int(len(trial.pairs) * self.cutoff_fraction)), size)
