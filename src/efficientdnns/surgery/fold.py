"""Folding batch normalisation into the layer before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from efficientdnns.errors import SurgeryError
from efficientdnns.surgery.graph import ChannelGraph
from efficientdnns.surgery.modules import get_module, replace_module
from efficientdnns.surgery.remove import clone
from efficientdnns.surgery.trace import Inputs
from efficientdnns.surgery.verify import differing, rounding


def fold_batch_norm(model: nn.Module, example_inputs: Inputs, graph: ChannelGraph | None = None) -> nn.Module:
    r"""Merge every batch norm into the convolution or linear layer whose output it alone reads.

    .. math:: W' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} W, \qquad b' = \frac{\gamma (b - \mu)}{\sqrt{\sigma^2 +
    \epsilon}} + \beta

    with :math:`\gamma, \beta` the scale and shift, :math:`\mu, \sigma^2` the running statistics. Exact in eval mode.
    Layers or norms that are called twice, share parameters or keep no running statistics are left alone.

    Args:
        model: Left untouched.
        example_inputs: One input tensor or a tuple of positional arguments.
        graph: The channel graph of ``model`` if at hand.

    Returns:
        A new network with ``nn.Identity`` in place of every folded norm.

    Raises:
        SurgeryError: Where the folded network does not give the same outputs (the network's code does something
            unforeseen).
    """
    graph = graph or ChannelGraph.trace(model, example_inputs, verify=False)
    folded = clone(model)
    for name, norm_name in foldable(folded, graph):
        norm: Any = get_module(folded, norm_name)
        layer: Any = get_module(folded, name)
        with torch.no_grad():
            _fold(layer, norm)
        replace_module(folded, norm_name, nn.Identity().train(norm.training))
    reason = differing(model, folded, example_inputs, allowed=rounding(model))
    if reason is not None:
        raise SurgeryError(f"folding the batch norms changes the network: {reason}")
    return folded


def foldable(model: nn.Module, graph: ChannelGraph) -> list[tuple[str, str]]:
    """(layer, batch norm) paths that can be folded, in execution order."""
    calls = [node.module for node in graph.nodes if node.operation == "batch_norm"]
    uses = [name for node in graph.nodes for name in node.parameters]
    pairs: list[tuple[str, str]] = []
    for name in graph.order:
        norm_name = graph.batch_norm_after(name)
        if norm_name is None or calls.count(norm_name) != 1 or uses.count(f"{name}.weight") != 1:
            continue
        layer, norm = get_module(model, name), get_module(model, norm_name)
        known = isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) and isinstance(layer.weight, nn.Parameter)
        if known and isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            pairs.append((name, norm_name))
    return pairs


def _fold(layer: Any, norm: Any) -> None:
    mean, variance = norm.running_mean, norm.running_var
    scale = torch.rsqrt(variance + norm.eps) * (1.0 if norm.weight is None else norm.weight)
    shift: Tensor = -mean * scale + (0.0 if norm.bias is None else norm.bias)
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(layer.bias * scale + shift)
    weight = layer.weight
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.transposed:  # (in, out / groups, ...)
        grouped = weight.view(layer.groups, -1, *weight.shape[1:])
        weight.copy_((grouped * scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).view_as(weight))
    else:
        weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)))
    weight.grad = None
    layer.bias.grad = None
