"""Cardinality: the groups of grouped convolutions as things that can be removed whole (ResNeXt)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from efficientdnns.surgery import ChannelGraph, Group, Member


def cardinality_groups(model: nn.Module, graph: ChannelGraph) -> list[Group]:
    """For each grouped convolution a `Group` whose units are its groups, with all that goes with one of them.

    Those are the channels that feed it (rows of the layer before, its batch norm), its own filters, their batch norm, and
    what reads them. Left out are depthwise convolutions, and those whose channels are tied to others.
    """
    found = []
    for name in graph.order:
        layer = model.get_submodule(name)
        if (
            not isinstance(layer, nn.modules.conv._ConvNd)
            or layer.transposed
            or not 1 < layer.groups < layer.in_channels
        ):
            continue
        touching = [g for g in graph.groups if any(m.tensor == f"{name}.weight" for m in g.members)]
        members = [_along_groups(m, layer.groups) for g in touching for m in g.members if not _reads_itself(m, name)]
        # One family of channels goes in and one comes out, and each splits evenly.
        if len(touching) != 2 or any(m is None for m in members) or len(graph.groups_of(name)) != 1:
            continue
        norm = graph.batch_norm_after(name)
        if norm is not None and getattr(model.get_submodule(norm), "weight", None) is None:
            continue  # a factor would have nothing to be folded into
        if any(group.in_statistics or len(graph.producers(group)) != 1 for group in touching):
            continue
        if any(_grouped(model, m.module) and m.module != name for m in members if m is not None):
            continue
        units = np.arange(layer.groups)
        found.append(Group(name, layer.groups, tuple(m for m in members if m is not None), units))
    return found


def _reads_itself(member: Member, name: str) -> bool:
    """The convolution's own input dimension, which counts channels inside one group."""
    return member.tensor == f"{name}.weight" and member.dim == 1


def _grouped(model: nn.Module, name: str) -> bool:
    return getattr(model.get_submodule(name), "groups", 1) > 1


def _along_groups(member: Member, groups: int) -> Member | None:
    """The member with one unit a group; positions of a channel are in the order of the groups."""
    size, k = member.index.shape
    if k % groups:
        return None
    index = member.index.view(size, groups, k // groups).transpose(0, 1).reshape(groups, -1)
    return replace(member, index=index.sort(1).values)


@torch.no_grad()
def without_groups(model: nn.Module, groups: list[Group], gone: Mapping[str, Tensor]) -> nn.Module:
    """A copy without the selected groups of grouped convolutions; at least one of each has to stay.

    Args:
        model: left as it is.
        groups: of `cardinality_groups`.
        gone: name of the convolution -> indices of its groups.
    """
    smaller = copy.deepcopy(model)
    for group in groups:
        lost = gone.get(group.name)
        if lost is None or not len(lost):
            continue
        for member in group.members:
            _cut(smaller.get_submodule(member.module), member, lost)
        layer: Any = smaller.get_submodule(group.name)
        layer.groups = group.size - len(lost)
        for name in dict.fromkeys(member.module for member in group.members):
            _fit(smaller.get_submodule(name))
    return smaller


def _cut(module: nn.Module, member: Member, lost: Tensor) -> None:
    tensor: Tensor = getattr(module, member.attribute)
    kept = torch.ones(tensor.shape[member.dim], dtype=torch.bool)
    kept[member.index[lost].flatten()] = False
    narrow = tensor.detach().index_select(member.dim, kept.nonzero().flatten().to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        setattr(module, member.attribute, nn.Parameter(narrow, tensor.requires_grad))
    else:
        module.register_buffer(member.attribute, narrow)


def _fit(module: Any) -> None:
    """Set the sizes that a module keeps beside its tensors."""
    if isinstance(module, nn.modules.conv._ConvNd):
        module.in_channels, module.out_channels = module.weight.shape[1] * module.groups, module.weight.shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(module.weight if module.weight is not None else module.running_mean)
