"""Nonredundant feature clustering: channels whose weights point the same way form a cluster, and one of each stays.

A threshold on the cosine says how many different channels a layer has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from efficientdnns.budget import blocks
from efficientdnns.method import Paper
from efficientdnns.parts.channel_clusters import Dendrogram, Linkage
from efficientdnns.parts.channel_merging import merge_outgoing
from efficientdnns.parts.channel_pruning import Scores, sweep
from efficientdnns.parts.own_width import OwnWidth
from efficientdnns.parts.structured import Scope, Selection, Widths
from efficientdnns.parts.weight_sets import weight_sets
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group

Representative = Literal["medoid", "random", "last"]
TAUS = (0.3, 0.5, 0.7, 0.9)
"""Thresholds at which the report counts the different channels of every layer."""


def representatives(
    labels: Tensor, cosines: Tensor, rule: Representative = "medoid", generator: torch.Generator | None = None
) -> Tensor:
    """(clusters,) index of the one that stays of each cluster, ascending by cluster.

    Args:
        labels: (n,) cluster of each.
        cosines: (n, n).
        rule: the one closest to the others of its cluster, any, or the last.
        generator: for 'random'.
    """
    found = []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        if rule == "random":
            position = int(torch.randint(len(members), (1,), generator=generator))
        else:
            position = int(cosines[members][:, members].sum(1).argmax()) if rule == "medoid" else len(members) - 1
        found.append(members[position])
    return torch.stack(found)


class NonredundantFeatureClustering(OwnWidth):
    r"""Clustering of receptive fields, `Ayinde and Zurada, Neural Networks 2017
    <https://www.sciencedirect.com/science/article/pii/S0893608017300928>`_.

    The weight vectors of a layer's units are joined from the bottom up as long as clusters are alike enough,

    .. math:: \cos(w_i, w_j) = \frac{w_i^T w_j}{\|w_i\| \|w_j\|} \ge \tau

    for every pair of a cluster (complete linkage) or on average over the pairs. The number of clusters is the number
    :math:`n_f` of different features; one unit of each stays, and the readers of the others are added to its own. The
    report counts the different channels of every layer at several thresholds before anything is removed.

    With a ratio or a budget tau is solved for by cutting the dendrograms higher or lower.

    Deviations:
        Reconstructed from the authors' code of later work. The representative is by default the medoid, where the code
        takes the last of a cluster. The weight vector of a channel is everything that makes it, batch norm folded in, and
        depthwise filters behind it. Summed readers are exact for channels that are equal; ``compensate: scaled`` also
        makes up for different norms, as ReLU allows.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="nonredundant-feature-clustering",
        title="Nonredundant Sparse Feature Extraction using Autoencoders with Receptive Fields Clustering",
        authors="Babajide O. Ayinde, Jacek M. Zurada",
        venue="Neural Networks",
        year=2017,
        url="https://www.sciencedirect.com/science/article/pii/S0893608017300928",
    )

    scope: Scope = "global"
    """One tau for all groups, or one ratio for each of them; without effect on what a given tau does."""
    tau: Annotated[float, Field(ge=-1, lt=1)] = 0.5
    """Cosine from which channels count as the same; not used with a ratio or a budget."""
    linkage: Linkage = "complete"
    """Every pair of a cluster reaches tau ('complete'), their mean does, or their mean directions do."""
    representative: Representative = "medoid"
    """Which channel of a cluster stays."""
    compensate: Literal["none", "sum", "scaled"] = "sum"
    """What the readers of the representative get: nothing, those of its cluster, or those times the ratio of the norms."""
    bias: bool = False
    """Whether biases are part of the weight vectors."""

    def dendrogram(self, session: Session, graph: ChannelGraph, group: Group) -> tuple[Dendrogram, Tensor]:
        """The merges of a group as the network is now, and the norms of its weight vectors."""
        weights, biases, _ = weight_sets(session.model, graph, group)
        vectors = torch.cat([weights, biases], 1) if self.bias else weights
        return Dendrogram(vectors, self.linkage), vectors.norm(dim=1).cpu()

    def scores(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Scores:
        """Distances of the merges, ascending; the last channel never goes."""
        end = torch.tensor([torch.inf], dtype=torch.float64)
        found = {g.name: torch.from_numpy(self.dendrogram(session, graph, g)[0].heights) for g in groups}
        return {name: torch.cat([heights, end]) for name, heights in found.items()}

    def offer(self, scores: Scores) -> Widths:
        if self.scope == "layer":
            return super().offer(scores)
        free = {name: score for name, score in scores.items() if name not in self.ratios}
        ends = Widths.of(scores, scope="layer", round_to=self.round_to, ratios=self.ratios)
        everything = torch.cat([*free.values(), torch.zeros(0, dtype=torch.float64)]).sort().values
        keys = {n: (torch.searchsorted(everything, s, right=True) / len(everything)).tolist() for n, s in free.items()}
        return Widths(ends.least, ends.full, [b for name in free for b in blocks(name, keys[name], self.round_to)])

    def select(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Selection:
        found = {group.name: self.dendrogram(session, graph, group)[0] for group in groups}
        distinct = {
            name: {f"{tau:g}": tree.count - tree.merged_at(tau) for tau in TAUS} for name, tree in found.items()
        }
        scores = self.scores(session, graph, groups) if self.scope == "global" else None
        plan = self.plan(session, graph, groups, scores)
        generator = torch.Generator().manual_seed(session.seed)
        taus: dict[str, float] = {}

        def choose(group: Group, keep: int) -> Tensor:
            tree, norms = self.dendrogram(session, graph, group)
            keep = keep or self.rounded(group.size - tree.merged_at(self.tau), group.size)
            merged = group.size - keep
            labels = tree.labels(merged)
            kept = representatives(labels, tree.cosines, self.representative, generator)
            gone = torch.tensor(sorted(set(range(group.size)) - set(kept.tolist())), dtype=torch.long)
            if len(gone):
                taus[group.name] = 1 - float(tree.heights[merged - 1])
                if self.compensate != "none":
                    alpha = (labels[gone][:, None] == labels[kept][None, :]).double()
                    if self.compensate == "scaled":
                        alpha *= norms[gone][:, None] / norms[kept][None, :].clamp_min(1e-12)
                    merge_outgoing(session.model, group, gone, kept, alpha)
            return gone

        selection = sweep(session, groups, plan, choose)
        session.report(distinct=distinct, least_cosine_merged=taus)
        return selection
