"""The weight-set of a channel: everything that decides what it computes, and whether scaling it only scales the channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from efficientdnns.parts.channel_merging import incoming_weights
from efficientdnns.surgery import ChannelGraph, Group

HOMOGENEOUS = frozenset(
    {"relu", "relu_", "leaky_relu", "leaky_relu_", "dropout", "dropout_", "feature_dropout", "cat", "mean", "sum"}
    | {"max_pool1d", "max_pool2d", "max_pool2d_with_indices", "avg_pool1d", "avg_pool2d", "getitem", "amax"}
    | {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "add", "add_"}
    | {"flatten", "view", "reshape", "_unsafe_view", "permute", "transpose", "contiguous", "clone", "alias", "detach"}
    | {"squeeze", "unsqueeze", "slice", "select", "expand", "t", "upsample_nearest2d"}
)
"""Operations f with f(c x) = c f(x) for every c > 0. Padding is none of them: the trace does not say with what."""


class WeightSets(NamedTuple):
    """The weight-sets of a group."""

    weights: Tensor
    """(size, entries), in float64; batch norm behind a producer is folded in."""
    biases: Tensor
    """(size, layers), in float64."""
    scalable: bool
    """Whether a weight-set (and its bias) times c > 0 makes c times the channel at every reader."""


def weight_sets(model: nn.Module, graph: ChannelGraph, group: Group) -> WeightSets:
    """What makes each channel of a group.

    Parameters that act on single channels on the way to the readers (depthwise filters, a batch norm behind a sum) are
    part of the weight-set, for only channels that agree in them too are alike.
    """
    weights, biases = incoming_weights(model, graph, group)
    producers = graph.producers(group)
    folded = {norm for name in producers if (norm := graph.batch_norm_after(name)) is not None}
    known = {f"{name}.bias" for name in producers}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    extra = [
        tensors[m.tensor].detach().movedim(m.dim, 0).flatten(1)[m.index.to(weights.device)].flatten(1)
        if tensors[m.tensor].dim() > 1
        else tensors[m.tensor].detach()[m.index.to(weights.device)]
        for m in group.members
        if m.role == "vector"
        and m.module not in folded
        and m.tensor not in known
        and tensors[m.tensor].is_floating_point()
    ]
    scalable = not extra and _homogeneous(graph, group, folded)
    return WeightSets(torch.cat([weights, *extra], 1).double(), biases.double(), scalable)


def _homogeneous(graph: ChannelGraph, group: Group, folded: set[str]) -> bool:
    """Whether everything between the producers of a group and its readers is positively homogeneous."""
    made = {member.tensor for member in group.members if member.role == "out"}
    read = {member.tensor for member in group.members if member.role == "in"}
    if made & read:
        return False
    flowing: set[str] = set()
    for node in graph.nodes:
        if made & set(node.parameters):
            flowing.add(node.name)
        elif flowing & set(node.inputs) and not read & set(node.parameters):
            # Something else, a parameter or a number (which is no input) may be added: that does not scale.
            alone = len(node.inputs) > 1 and not node.parameters and flowing.issuperset(node.inputs)
            both = node.operation not in ("add", "add_") or alone
            if not (node.module in folded and node.operation == "batch_norm") and not (
                node.operation in HOMOGENEOUS and both
            ):
                return False
            flowing.add(node.name)
    return bool(flowing)


def squared_distances(vectors: Tensor) -> Tensor:
    """(n, n) squared Euclidean distances of the rows, by one Gram matrix in float64; zeros on the diagonal."""
    vectors = vectors.double()
    squares = vectors.square().sum(1)
    found = (squares[:, None] + squares[None, :] - 2 * vectors @ vectors.T).clamp_min(0.0)
    return found.fill_diagonal_(0.0)
