"""Channels that carry a constant: what their readers see, and moving it into the readers as batch-norm papers do.

Unlike `efficientdnns.surgery.absorb_constants`, which keeps a carrier channel where zero padding would show, all constant
channels can go; at the border of padded convolutions the result then differs a little.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficientdnns.parts.tap import Forward, call, evaluating
from efficientdnns.surgery import ChannelGraph, Group

Read = tuple[Tensor, Tensor]
"""(channels,) mean of every input channel of a layer over samples and positions, and its largest minus its smallest value."""


@torch.no_grad()
def inputs_of(model: nn.Module, names: Iterable[str], example_input: Any, forward: Forward = call) -> dict[str, Read]:
    """What linear layers and convolutions read in one run on noise of the example's shape (tokens stay as they are)."""
    seen: dict[str, Read] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            dim = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
            rows = args[0].movedim(dim, 0).flatten(1)
            seen[name] = rows.mean(1), rows.amax(1) - rows.amin(1)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in dict.fromkeys(names)]
    try:
        with evaluating(model):
            forward(model, noise_like(example_input))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def noise_like(inputs: Any) -> Any:
    """Normal noise in place of floating-point tensors, always the same, so that whatever can vary does."""
    if isinstance(inputs, Tensor):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(inputs.shape, generator=generator).to(inputs) if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {name: noise_like(value) for name, value in inputs.items()}
    return tuple(noise_like(value) for value in inputs) if isinstance(inputs, tuple | list) else inputs


def readers(groups: Sequence[Group]) -> list[str]:
    """The modules that read any channel of the groups."""
    return list(dict.fromkeys(m.module for group in groups for m in group.members if m.role == "in"))


@torch.no_grad()
def move_constants(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[Group],
    units: Mapping[str, Tensor],
    example_input: Any,
    forward: Forward = call,
) -> None:
    r"""Move what constant channels contribute into their readers: :math:`\delta_j = \sum_k \kappa_k \sum_{uv} W_{jkuv}`.

    A batch norm that alone reads the reader gets it in its running mean (minus), else the reader in its bias (plus, created
    where there is none): exactly one of the two.

    Args:
        model: changed in place; the channels may be cut after it.
        graph: of the network.
        groups: in the order of execution; their readers are linear layers and convolutions.
        units: group name -> indices of its constant channels.
        example_input: of the network.
        forward: how it is run.
    """
    seen = inputs_of(model, readers(groups), example_input, forward)
    for group in groups:
        for member in group.members:
            if member.role != "in" or member.module not in seen:
                continue
            layer: Any = model.get_submodule(member.module)
            weight = layer.weight.detach()
            columns = member.index[units[group.name]].flatten().to(weight.device)
            constants = seen[member.module][0][columns].to(weight.dtype)
            read = weight.movedim(member.dim, 0)[columns]
            total = read.flatten(2).sum(2) if read.dim() > 2 else read  # (columns, out)
            spread = math.prod(layer.stride) if getattr(layer, "transposed", False) else 1
            delta = constants @ total / spread
            norm: Any = (name := graph.batch_norm_after(member.module)) and model.get_submodule(name)
            if norm is not None and norm.running_mean is not None:
                norm.running_mean.sub_(delta)
            elif layer.bias is None:
                layer.bias = nn.Parameter(delta)
            else:
                layer.bias.add_(delta)
