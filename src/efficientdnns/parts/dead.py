"""Removing what zeros have switched off already: channels that nothing reads or that are always zero, unread inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from efficientdnns.budget import widths
from efficientdnns.parts.select import largest_mask
from efficientdnns.surgery import ChannelGraph, Group, absorb_constants, narrow_input, remove, zero_contributions


def remove_dead_channels(model: nn.Module, example_inputs: Any, round_to: int = 1) -> nn.Module:
    """Remove every channel that contributes nothing, and then those that fed only such channels.

    A channel is dead if all weights that read it are zero, or if all weights and biases that make it are zero and the
    network gives the same outputs without it (it does not where an activation turns 0 into something else). At least
    one channel of every group stays. Channels that a layer norm averages over stay: without a zero its statistics
    are others. With ``round_to`` every group keeps a multiple of it or everything, dead ones among it.

    Returns:
        A new network with the same outputs, or ``model`` itself where nothing is dead.
    """
    while True:
        graph = ChannelGraph.trace(model, example_inputs)
        dead = {group.name: _dead(model, group, graph, example_inputs) for group in graph.groups}
        gone = {g.name: g.size - _rounded(g.size - len(dead[g.name]), g.size, round_to) for g in graph.groups}
        selection = {name: units[: gone[name]] for name, units in dead.items() if gone[name]}
        if not selection:
            return model
        model = remove(model, example_inputs, selection, graph)


def remove_without_effect(model: nn.Module, example_inputs: Any, units: Mapping[str, Tensor]) -> nn.Module:
    """Remove the named output channels of layers (layer -> indices) with all that goes with them, as far as the network gives
    the same outputs without them; at least one of every group stays.
    """
    graph, selection = ChannelGraph.trace(model, example_inputs), {}
    for group in graph.groups:
        rows = {m.tensor: m.index[:, 0] for m in group.members if m.role != "in"}
        for name in units:
            if f"{name}.weight" in rows:
                silent = torch.isin(rows[f"{name}.weight"], units[name].cpu())
                silent[0] &= not silent.all()
                if silent.any() and _without(model, group, silent, graph, example_inputs):
                    selection[group.name] = silent.nonzero().flatten()
    return remove(model, example_inputs, selection, graph) if selection else model


def remove_constant_channels(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Remove channels that all-zero weights make, whatever constant their bias gives: their readers take it over.

    Returns:
        A new network with the same outputs, or ``model`` itself where there are none. One channel of a group may stay to
        carry the constant of all (see `efficientdnns.surgery.absorb_constants`).
    """
    graph = ChannelGraph.trace(model, example_inputs)
    sizes = {name: parameter.detach().abs() for name, parameter in model.named_parameters() if parameter.dim() > 1}
    constant = {group.name: (group.reduce(sizes, ("out",)) == 0).nonzero().flatten() for group in graph.groups}
    selection = {g.name: units for g in graph.groups if 0 < len(units := constant[g.name]) < g.size}
    absorbed, selection, varying = absorb_constants(model, example_inputs, selection, graph)
    selection = {name: units for name, units in selection.items() if name not in varying}
    # Readers may have got a bias of their own, which the old graph does not know.
    return remove(absorbed, example_inputs, selection) if selection else model


def remove_dead_inputs(model: nn.Module, names: Iterable[str], round_to: int = 1) -> nn.Module:
    """Drop the inputs of the named linear layers that only meet zero weights; a selection takes their place in front.

    Returns:
        A new network with the same outputs, or ``model`` itself where nothing is dead. Other layers and missing names
        are passed over, and one input always stays; with ``round_to`` a multiple of it, or everything.
    """
    for name in names:
        layer = dict(model.named_modules()).get(name)
        if isinstance(layer, nn.Linear):
            read = layer.weight.detach().abs().amax(0) > 0
            kept = _rounded(int(read.sum()), len(read), round_to)
            if kept < len(read):
                model = narrow_input(model, name, largest_mask(read.int(), kept).nonzero().flatten())
    return model


def _rounded(kept: int, size: int, round_to: int) -> int:
    return next(width for width in widths(size, round_to) if width >= kept)


def _dead(model: nn.Module, group: Group, graph: ChannelGraph, example_inputs: Any) -> Tensor:
    if group.in_statistics:
        return torch.empty(0, dtype=torch.long)
    sizes = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    roles = {member.role for member in group.members}
    dead = torch.zeros(group.size, dtype=torch.bool)
    if "in" in roles:
        dead |= (group.reduce(sizes, ("in",)) == 0).cpu()
    if "out" in roles:
        silent = (group.reduce(sizes, ("out", "vector")) == 0).cpu() & ~dead
        if silent.any() and _without(model, group, silent, graph, example_inputs):
            dead |= silent
    if dead.all():
        dead[0] = False
    return dead.nonzero().flatten()


@torch.no_grad()
def _without(model: nn.Module, group: Group, units: Tensor, graph: ChannelGraph, example_inputs: Any) -> bool:
    """Whether the network gives the same outputs where nothing reads these units."""
    chosen = units.nonzero().flatten()
    if len(chosen) == group.size:
        chosen = chosen[1:]
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    cut = zero_contributions(model, {group.name: chosen}, graph).eval()
    was_training = model.training
    expected, got = model.eval()(*inputs), cut(*inputs)
    model.train(was_training)
    return isinstance(expected, Tensor) and torch.allclose(expected, got, rtol=1e-5, atol=1e-6)
