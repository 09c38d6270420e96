"""DivNet: a determinantal point process picks neurons that are active and unlike each other; the rest is fused into them.

Only unlabelled samples are needed, and no training follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.method import Need, Paper
from efficientdnns.parts.channel_activations import reader_inputs
from efficientdnns.parts.channel_merging import merge_outgoing, outgoing_rows
from efficientdnns.parts.channel_pruning import Scores, sweep
from efficientdnns.parts.determinantal import (
    expected_size,
    gaussian_kernel,
    inclusion_probabilities,
    linear_kernel,
    sample,
)
from efficientdnns.parts.own_width import OwnWidth
from efficientdnns.parts.structured import Selection
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group


def fusing_coefficients(
    values: Tensor, gone: Tensor, kept: Tensor, intercept: bool = False, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    r"""Least squares :math:`v_i \approx \alpha_{i0} + \sum_{j \in Y} \alpha_{ij} v_j` for every channel that goes.

    Args:
        values: (rows, size).
        gone: (g,) indices.
        kept: (k,) indices, Y.
        intercept: whether :math:`\alpha_{i0}` is fitted; else it is 0.
        ridge: of the squared coefficients, relative to the mean square of the kept columns.

    Returns:
        (g, k) and (g,), in float64; the solution of least norm where the columns of Y are not independent.
    """
    values = values.double().cpu()
    left, right = values[:, kept], values[:, gone]
    if intercept:
        means = left.mean(0), right.mean(0)
        left, right = left - means[0], right - means[1]
    if ridge:
        weight = (ridge * left.square().sum(0).mean()).sqrt()
        left = torch.cat([left, weight * torch.eye(len(kept), dtype=left.dtype)])
        right = torch.cat([right, right.new_zeros(len(kept), len(gone))])
    alpha = torch.linalg.lstsq(left, right, rcond=1e-12, driver="gelsd").solution.T
    return alpha, means[1] - alpha @ means[0] if intercept else alpha.new_zeros(len(gone))


def takes_constants(model: nn.Module, graph: ChannelGraph, group: Group) -> bool:
    """Whether every reader of a group has a bias, or a batch norm behind it, that can take constants over."""
    return all(_shift(model, graph, name) is not None for name in graph.consumers(group))


@torch.no_grad()
def add_constants(model: nn.Module, graph: ChannelGraph, group: Group, units: Tensor, constants: Tensor) -> None:
    """Let the readers' biases make up for constants (u,) in these units (u,).

    At the border of a padded convolution, where it reads zeros, this is not exact.
    """
    for member in group.members:
        if member.role == "in":
            module = model.get_submodule(member.module)
            weight: Tensor = getattr(module, member.attribute)
            shift = _shift(model, graph, member.module)
            assert shift is not None
            columns = weight.movedim(member.dim, 0)[member.index[units].to(weight.device)].sum(1)  # (u, outputs, ...)
            change = torch.einsum(
                "u,uo->o", constants.to(columns), columns.flatten(2).sum(2) if columns.dim() > 2 else columns
            )
            shift[0].add_(change, alpha=shift[1])


def _shift(model: nn.Module, graph: ChannelGraph, name: str) -> tuple[Tensor, float] | None:
    """The tensor that takes a constant at the output of a layer, and the sign with which it does."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    if module.bias is not None:
        return module.bias, 1.0
    norm = graph.batch_norm_after(name)
    mean = None if norm is None else model.get_submodule(norm).running_mean
    return None if mean is None else (mean, -1.0)  # type: ignore[return-value]


class DivNet(OwnWidth):
    r"""Diversity networks, `Mariet and Sra, ICLR 2016 <https://arxiv.org/abs/1511.05077>`_.

    Neuron i is described by its activations :math:`v_i` on N samples. The neurons Y that stay are drawn from a
    determinantal point process,

    .. math:: P(Y) = \frac{\det L_Y}{\det(L + I)}, \qquad
        L_{ij} = \exp(-\beta \|v_i - v_j\|_2^2) + \epsilon\,[i = j]

    or from the k-DPP of the same kernel where the width is given. Every other neuron is fused into them: with the least
    squares :math:`v_i \approx \sum_{j \in Y} \alpha_{ij} v_j` the next layer's weights become
    :math:`\tilde W_{oj} = W_{oj} + \sum_{i \notin Y} \alpha_{ij} W_{oi}`. Layers are treated from input to output, with
    activations computed anew.

    Without ``pruning_ratio`` and budget the process chooses the width, :math:`\sum_i \lambda_i/(1+\lambda_i)` on average.

    Deviations:
        Activations are read where the next layer reads them, so feature maps, residual streams and attention heads work
        too: a place of a map, or a token, counts as a sample (``positions`` of them, chosen once). A group whose
        readers cannot be observed is pruned by its outgoing weights and not fused; the report lists it under ``unseen``.
        Intercepts are left out where a reader has neither bias nor batch norm to take them over. With ``scope: global``
        channels are ordered over layers by their probability of being in a sample.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="divnet",
        title="Diversity Networks: Neural Network Compression Using Determinantal Point Processes",
        authors="Zelda Mariet, Suvrit Sra",
        venue="ICLR",
        year=2016,
        url="https://arxiv.org/abs/1511.05077",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration data"})
    contract_fields: ClassVar[dict[str, Any]] = {"samples": 48, "positions": 4}

    samples: PositiveInt = 2000
    """Calibration samples; labels are not used."""
    positions: PositiveInt = 16
    """Places of a feature map, or tokens, used of each sample."""
    kernel: Literal["rbf", "linear"] = "rbf"
    """Similarity of activation vectors: Gaussian, or their inner product."""
    beta: PositiveFloat | None = None
    """Of the Gaussian kernel; None takes the paper's 10 / N."""
    eps: PositiveFloat = 0.01
    """Added to the diagonal, so that sets larger than the kernel's rank stay possible."""
    selection: Literal["dpp", "random", "importance"] = "dpp"
    """Which neurons stay: a sample of the process, or as controls any of the same number or those with the largest sum of
    absolute outgoing weights."""
    fuse: bool = True
    """Whether the neurons that go are fused into those that stay."""
    intercept: bool = False
    """Whether least squares has an intercept, which the next layer's biases absorb: good for saturated neurons."""
    ridge: Annotated[float, Field(ge=0)] = 0.0
    """Ridge of the least squares, relative to the mean square of the kept activations; 0 is the paper's."""

    def similarities(self, values: Tensor) -> Tensor:
        """The kernel L (size, size) of activations (rows, size)."""
        vectors = values.double().cpu().T
        if self.kernel == "linear":
            return linear_kernel(vectors, self.eps)
        return gaussian_kernel(vectors, self.beta or 10 / vectors.shape[1], self.eps)

    def read(self, session: Session, group: Group) -> Tensor:
        """Activations (rows, size) as the network is now."""
        return reader_inputs(session, session.model, group, self.samples, self.positions)

    def scores(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Scores:
        """The probability of every channel of being in a sample."""
        found = {group.name: self.read(session, group) for group in groups}
        return {
            n: inclusion_probabilities(self.similarities(v)) if len(v) else torch.ones(v.shape[1])
            for n, v in found.items()
        }

    def select(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Selection:
        scores = self.scores(session, graph, groups) if self.scope == "global" else None
        plan = self.plan(session, graph, groups, scores)
        generator = torch.Generator().manual_seed(session.seed)
        found: dict[str, dict[str, float]] = {}
        unseen: list[str] = []

        def choose(group: Group, keep: int) -> Tensor:
            values = self.read(session, group)
            importance = outgoing_rows(session.model, group).abs().sum(1).cpu()
            if not len(values):
                unseen.append(group.name)
                return (
                    importance.argsort()[: group.size - keep].sort().values
                    if keep
                    else torch.empty(0, dtype=torch.long)
                )
            similarities = self.similarities(values)
            off = (similarities.sum() - similarities.trace()) / (group.size * (group.size - 1))
            found[group.name] = {"expected_size": expected_size(similarities), "mean_similarity": float(off)}
            kept = self.draw(similarities, keep, importance, generator)
            gone = torch.tensor(sorted(set(range(group.size)) - set(kept.tolist())), dtype=torch.long)
            if self.fuse and len(gone):
                intercept = self.intercept and takes_constants(session.model, graph, group)
                alpha, constants = fusing_coefficients(values, gone, kept, intercept, self.ridge)
                if intercept:
                    add_constants(session.model, graph, group, gone, constants)
                merge_outgoing(session.model, group, gone, kept, alpha)
            return gone

        selection = sweep(session, groups, plan, choose)
        session.report(kernels=found, unseen=unseen)
        return selection

    def draw(self, similarities: Tensor, keep: int, importance: Tensor, generator: torch.Generator) -> Tensor:
        """Ascending indices of the neurons that stay; ``keep`` of them, or with 0 as many as the process says."""
        size = len(similarities)
        if not keep:
            free = sample(similarities, None, generator)
            keep = self.rounded(len(free), size)
            if self.selection == "dpp" and keep == len(free):
                return free
        if self.selection == "random":
            return torch.randperm(size, generator=generator)[:keep].sort().values
        if self.selection == "importance":
            return importance.argsort(descending=True, stable=True)[:keep].sort().values
        return sample(similarities, keep, generator)
