"""Making up for a channel that goes with those that stay: its readers' weights are added to theirs, in proportion.

If channel j is about :math:`\\alpha_{j0} + \\sum_i \\alpha_{ji}` times the channels i that stay, every reader computes the same
with :math:`a_i \\leftarrow a_i + \\sum_j \\alpha_{ji} a_j` and no channel j.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efficientdnns.parts.criteria import unit_rows
from efficientdnns.surgery import ChannelGraph, Group


@torch.no_grad()
def merge_outgoing(model: nn.Module, group: Group, gone: Tensor, kept: Tensor, coefficients: Tensor) -> None:
    """Add the weights that read the channels ``gone`` to those that read ``kept``, and zero them.

    Args:
        model: changed in place.
        group: the channels.
        gone: (g,) indices in the group.
        kept: (k,) indices in the group.
        coefficients: (g, k) alpha.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for member in group.members:
        if member.role != "in" or member.tensor not in tensors:
            continue
        weight = tensors[member.tensor].movedim(member.dim, 0)
        index = member.index.to(weight.device)
        alpha = coefficients.to(weight.device, weight.dtype)
        for position in range(index.shape[1]):  # several where maps were flattened
            columns = weight[index[gone, position]].flatten(1)
            added = (alpha.T @ columns).view(len(kept), *weight.shape[1:])
            weight.index_add_(0, index[kept, position], added)
            weight.index_fill_(0, index[gone, position], 0.0)


def outgoing_rows(model: nn.Module, group: Group) -> Tensor:
    """Everything that reads each channel: (size, entries)."""
    parameters = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    return unit_rows(group, parameters, ("in",))


def incoming_weights(model: nn.Module, graph: ChannelGraph, group: Group) -> tuple[Tensor, Tensor]:
    """What makes each channel, with the batch norm behind each layer folded in: weights (size, entries), biases (size, layers).

    Where several layers write the same channels (a residual stream) their weights stand side by side.
    """
    tensors = {
        name: t.detach() for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    }
    weights, biases = [], []
    for member in group.members:
        if member.role != "out" or member.tensor not in tensors:
            continue
        rows = tensors[member.tensor].movedim(member.dim, 0).flatten(1)
        bias = tensors.get(f"{member.module}.bias", rows.new_zeros(len(rows)))
        bias = bias if len(bias) == len(rows) else rows.new_zeros(len(rows))
        norm = graph.batch_norm_after(member.module)
        if norm is not None:
            layer = model.get_submodule(norm)
            assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
            assert layer.running_mean is not None
            assert layer.running_var is not None
            scale = torch.rsqrt(layer.running_var + layer.eps)
            scale = scale if layer.weight is None else scale * layer.weight.detach()
            shift = 0.0 if layer.bias is None else layer.bias.detach()
            rows, bias = rows * scale[:, None], (bias - layer.running_mean) * scale + shift
        index = member.index.to(rows.device)
        weights.append(rows[index].flatten(1))
        biases.append(bias[index])
    if not weights:
        return torch.zeros(group.size, 0), torch.zeros(group.size, 0)
    return torch.cat(weights, 1), torch.cat(biases, 1)
