"""Take channels out of a network for real: a new, narrower network that computes what the old one computes without
them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from efficientdnns.errors import SurgeryError
from efficientdnns.surgery.graph import ChannelGraph
from efficientdnns.surgery.trace import Inputs, tensors_of

Selection = Mapping[str, Tensor | Sequence[int]]
"""Group name -> positions of the units to remove, each in [0, group.size)."""


def remove(
    model: nn.Module,
    example_inputs: Inputs,
    selection: Selection,
    graph: ChannelGraph | None = None,
    verify: bool = True,
) -> nn.Module:
    """Remove channels.

    Args:
        model: Left untouched.
        example_inputs: One input tensor or a tuple of positional arguments.
        selection: What to remove, by group name.
        graph: The channel graph of ``model`` if at hand; traced otherwise.
        verify: Compare the outputs with those of the network with these channels' contributions zeroed (float64, 1e-9;
            see :mod:`~efficientdnns.surgery.reference`). Without it only the output shapes are compared.

    Returns:
        A new network: sliced parameters, buffers and gradients, module attributes (``out_channels``, ``num_features``,
        ...) that fit, the same train/eval flags, dtypes, devices, ``requires_grad`` and ties between parameters.

    Raises:
        SurgeryError: An unknown group, a position out of range, all units of a group, or a network that fails after the
            removal (the message names the module).
    """
    from efficientdnns.surgery.verify import failing_among, tried

    graph = graph or ChannelGraph.trace(model, example_inputs)
    plan = checked_selection(selection, graph)
    smaller, reason = tried(model, plan, graph, example_inputs, exact=verify)
    if reason is not None or smaller is None:
        culprits = failing_among(model, example_inputs, graph, plan) or dict.fromkeys(plan, str(reason))
        name, reason = next(iter(culprits.items()))
        raise SurgeryError(
            f"removing channels of {name!r} breaks the network: {reason}; leave this group out of the selection"
        )
    return smaller


def zero_contributions(model: nn.Module, selection: Selection, graph: ChannelGraph) -> nn.Module:
    """A copy of the full network in which nothing reads the selected channels: their columns in every consumer are
    zero.

    The smaller network must give the same outputs, unless the channels take part in statistics
    (``Group.in_statistics``), which are those of the channels that are left; see
    :func:`~efficientdnns.surgery.reference.reference_outputs`.
    """
    copied = clone(model)
    tensors = tensors_of(copied)
    for name, units in checked_selection(selection, graph).items():
        for member in graph.group(name).members:
            if member.role == "in":
                positions = member.index[units].reshape(-1)
                tensor = tensors[member.tensor]
                tensor.data.index_fill_(member.dim, positions.to(tensor.device), 0.0)
    return copied


def checked_selection(selection: Selection, graph: ChannelGraph) -> dict[str, Tensor]:
    """Sorted distinct positions by group name; groups of which nothing is removed are left out."""
    plan: dict[str, Tensor] = {}
    for name, given in selection.items():
        group = graph.group(name)
        units = torch.as_tensor(given).detach().cpu()
        if units.numel() == 0:
            continue
        if units.dtype in (torch.bool, torch.float16, torch.float32, torch.float64):
            raise SurgeryError(
                f"positions of {name!r} are {units.dtype}: give integers, e.g. mask.nonzero().flatten() for a mask"
            )
        units = units.long().reshape(-1).unique()
        if int(units.min()) < 0 or int(units.max()) >= group.size:
            raise SurgeryError(
                f"positions of {name!r} must lie in 0..{group.size - 1}, got {int(units.min())}..{int(units.max())}"
            )
        if len(units) == group.size:
            raise SurgeryError(f"all {group.size} channels of {name!r} are selected: leave at least one")
        plan[name] = units
    return plan


def clone(model: nn.Module, instead: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A deep copy, with other tensors in place of those whose id is named; raises SurgeryError where the network cannot
    be copied."""
    try:
        return copy.deepcopy(model, dict(instead or {}))
    except Exception as error:
        raise SurgeryError(
            f"the network cannot be copied ({error}): keep only parameters, buffers and plain values in it"
        ) from error


def sliced(model: nn.Module, plan: Mapping[str, Tensor], graph: ChannelGraph) -> nn.Module:
    """A copy of the network without the units of ``plan``, not yet tried."""
    tensors = tensors_of(model)
    gone: dict[str, dict[int, list[Tensor]]] = {}
    removed = [np.empty(0, dtype=np.int64)]
    for name, units in plan.items():
        group = graph.group(name)
        removed.append(group.units[units.numpy()])
        for member in group.members:
            gone.setdefault(member.tensor, {}).setdefault(member.dim, []).append(member.index[units].reshape(-1))
    cut: dict[int, Tensor] = {}  # given to the copy in place of the wide ones, which are never copied
    for name, dims in gone.items():
        cut[id(tensors[name])] = _cut(tensors[name], {dim: torch.cat(positions) for dim, positions in dims.items()})
    for name, pointed in graph.gathers.items():
        index = cut.get(id(tensors[name]), tensors[name])
        cut[id(tensors[name])] = _renumbered(index, torch.from_numpy(~np.isin(pointed, np.concatenate(removed))))
    copied = clone(model, cut)
    for old, new in zip(model.parameters(), copied.parameters(), strict=True):  # deep copies have no gradients
        if id(old) not in cut:
            new.grad = None if old.grad is None else old.grad.clone()
    changed = {id(tensor) for tensor in cut.values()}
    for module in copied.modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        if any(id(tensor) in changed for tensor in own):
            _fit_attributes(module)
    return copied


def _cut(tensor: Tensor, gone: Mapping[int, Tensor]) -> Tensor:
    """A narrower parameter (or buffer) with its gradient."""

    def without(values: Tensor) -> Tensor:
        for dim, positions in gone.items():
            kept = torch.ones(values.shape[dim], dtype=torch.bool)
            kept[positions] = False
            values = values.index_select(dim, kept.nonzero().flatten().to(values.device))
        return values

    narrow = without(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        narrow = nn.Parameter(narrow, tensor.requires_grad)
        narrow.grad = None if tensor.grad is None else without(tensor.grad)
    return narrow


def _renumbered(index: Tensor, kept: Tensor) -> Tensor:
    """An index buffer that points to the same channels after the removed ones are gone."""
    new = torch.cumsum(kept, 0) - 1
    return new.to(index.device, index.dtype)[index % len(kept)]


def _fit_attributes(module: nn.Module) -> None:
    """Set the sizes that a module keeps beside its tensors."""
    own: Any = module
    if isinstance(module, nn.modules.conv._ConvNd):
        _fit_convolution(module)
    elif isinstance(module, nn.Linear):
        own.out_features, own.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        known = module.running_mean if module.running_mean is not None else module.weight
        own.num_features = known.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        own.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        own.num_channels = len(module.weight)
    elif isinstance(module, nn.Embedding):
        own.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.PReLU):
        own.num_parameters = len(module.weight)
    elif isinstance(module, nn.RNNBase):
        own.hidden_size, own.input_size = own.weight_hh_l0.shape[1], own.weight_ih_l0.shape[1]
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        module.flatten_parameters()


def _fit_convolution(module: nn.modules.conv._ConvNd) -> None:
    depthwise = module.groups > 1 and module.groups == module.in_channels
    if module.transposed:
        groups = module.weight.shape[0] if depthwise else module.groups
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * groups
    else:
        groups = module.weight.shape[0] * module.groups // module.out_channels if depthwise else module.groups
        module.in_channels, module.out_channels = module.weight.shape[1] * groups, module.weight.shape[0]
    module.groups = groups
