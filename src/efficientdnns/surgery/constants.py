"""Channels that always carry the same value can go without a trace: what they contribute moves into their readers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from efficientdnns.surgery.graph import ChannelGraph, Member
from efficientdnns.surgery.remove import checked_selection, clone
from efficientdnns.surgery.trace import Inputs, as_arguments, evaluating


def absorb_constants(
    model: nn.Module, example_inputs: Inputs, selection: Mapping[str, Any], graph: ChannelGraph, tolerance: float = 1e-6
) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    r"""Move the contribution of constant channels into the layers that read them, in eval mode.

    A channel whose filter is zero still carries a constant :math:`c_j = f(\beta_j - \gamma_j \mu_j / \sigma_j)`. A linear
    layer, or a convolution without padding, takes :math:`\sum_j c_j \sum_k W_{\cdot j k}` into its bias. At the border of a
    padded convolution the padding is 0 and not c, so there one removed channel stays as *carrier* for all:
    :math:`W_{\cdot j^*} \leftarrow \sum_j (c_j / c_{j^*}) W_{\cdot j}`.

    Args:
        model: left untouched.
        selection: group name -> channels that are about to be removed.

    Returns:
        The rewritten copy (not yet narrower), the selection without the carriers, and the names of groups whose channels
        are not constant at some reader or take part in the statistics of a norm (for those nothing was moved).
    """
    copied = clone(model)
    plan = checked_selection(selection, graph)
    groups = [graph.group(name) for name in plan]
    inputs = _consumer_inputs(copied, example_inputs, {m.module for g in groups for m in g.members if m.role == "in"})
    varying: list[str] = []
    for group in groups:
        units = plan[group.name]
        members = [m for m in group.members if m.role == "in"]
        values = {m.tensor: _constants(copied, m, units, inputs, tolerance) for m in members}
        if group.in_statistics or any(value is None for value in values.values()):
            varying.append(group.name)
            continue
        carriers = _absorb(copied, members, units, values)
        plan[group.name] = units[[i for i in range(len(units)) if i not in carriers]]
    return copied, {name: units for name, units in plan.items() if len(units)}, varying


def _consumer_inputs(model: nn.Module, example_inputs: Inputs, names: set[str]) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().clone())
        )
        for name in names
    ]
    with evaluating(model):
        model(*as_arguments(example_inputs, model))
    for handle in handles:
        handle.remove()
    return seen


def _constants(
    model: nn.Module, member: Member, units: Tensor, inputs: dict[str, list[Tensor]], tolerance: float
) -> Tensor | None:
    """(units, k) constants of the channels at this reader; None where they vary or the reader cannot take them over."""
    module = model.get_submodule(member.module)
    plain = isinstance(module, nn.Linear) or (
        isinstance(module, nn.modules.conv._ConvNd) and not module.transposed and module.groups == 1
    )
    positions = member.index[units]
    rows = []
    for x in inputs[member.module]:
        channels = x.movedim(1 if isinstance(module, nn.modules.conv._ConvNd) else -1, 0).flatten(1)
        rows.append(channels[positions.reshape(-1).to(x.device)])
    if not rows:
        return None
    values = torch.cat(rows, 1)
    low, high = values.amin(1), values.amax(1)
    if (high - low).max() > tolerance * max(1.0, float(values.abs().max())):
        return None
    if not plain and values.abs().max() > 0:
        return None
    return low.reshape(positions.shape)


def _absorb(model: nn.Module, members: list[Member], units: Tensor, values: dict[str, Tensor | None]) -> set[int]:
    carriers: set[int] = set()
    for member in members:
        module: Any = model.get_submodule(member.module)
        constants = values[member.tensor]
        assert constants is not None
        if float(constants.abs().max()) == 0.0:
            continue
        weight = module.weight.data
        columns = member.index[units].to(weight.device)
        padded = isinstance(module, nn.modules.conv._ConvNd) and (module.padding == "same" or any(module.padding))
        if not padded:
            total = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
            offset = total[:, columns.reshape(-1)] @ constants.reshape(-1)
            if module.bias is None:
                module.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))
            module.bias.data += offset
            # A carrier kept for another reader must not be counted twice here.
            weight[:, columns.reshape(-1)] = 0
            continue
        size = constants[:, 0].abs()
        carrier = next((c for c in carriers if size[c] > 1e-3 * size.max()), int(size.argmax()))
        carriers.add(carrier)
        scale = (constants[:, 0] / constants[carrier, 0]).to(weight.dtype)
        combined = (weight[:, columns[:, 0]] * scale.view(1, -1, *[1] * (weight.dim() - 2))).sum(1)
        weight[:, columns[:, 0]] = 0
        weight[:, columns[carrier, 0]] = combined
    return carriers
