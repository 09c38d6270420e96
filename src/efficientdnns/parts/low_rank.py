"""Low-rank layers: matrices cut at a rank, and chains of plain `nn.Conv2d` and `nn.Linear` that hold the factors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

Layer = nn.Conv2d | nn.Linear


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Best rank-``rank`` factors of a matrix (m, n): U (m, r), orthonormal, and :math:`\Sigma V^T` (r, n)."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank, None] * vh[:rank]


def unfold(kernel: Tensor, mode: int) -> Tensor:
    """The mode-``mode`` unfolding of a tensor: that dimension becomes the rows, all others together the columns."""
    return kernel.movedim(mode, 0).reshape(kernel.shape[mode], -1)


def round_rank(rank: float, full: int, *, lowest: int = 1, multiple_of: int = 1) -> int:
    """``rank`` rounded up to a multiple, at least ``lowest`` and 1, at most ``full``: never an empty layer."""
    return min(full, max(lowest, 1, math.ceil(round(rank) / multiple_of) * multiple_of))


def empty_conv(like: nn.Conv2d, inputs: int, outputs: int, *, spatial: bool, bias: bool) -> nn.Conv2d:
    """A convolution without values on the device and of the type of ``like``.

    With ``spatial`` it has the kernel, stride, padding and dilation of ``like``, else it is 1 x 1 with stride 1.
    """
    options: dict[str, Any] = {"kernel_size": 1}
    if spatial:
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        options = {name: getattr(like, name) for name in names}
    place: dict[str, Any] = {"device": like.weight.device, "dtype": like.weight.dtype}
    # Built without initial values, so that no random numbers are drawn for weights that are set at once.
    return nn.utils.skip_init(nn.Conv2d, inputs, outputs, bias=bias, **place, **options)


def two_layers(layer: Layer, rank: int, factors: tuple[Tensor, Tensor] | None) -> nn.Sequential:
    """Two layers for an ungrouped convolution or a linear layer whose weight, as a matrix (outputs, rest), has factors.

    ``factors`` are (outputs, rank) and (rank, rest), as `truncated_svd` gives them; None leaves the values open, which
    is enough to count costs. The first part of a convolution keeps the kernel, the second is 1 x 1; the bias goes last.
    """
    bias = layer.bias is not None
    first: Layer
    last: Layer
    if isinstance(layer, nn.Conv2d):
        first = empty_conv(layer, layer.in_channels, rank, spatial=True, bias=False)
        last = empty_conv(layer, rank, layer.out_channels, spatial=False, bias=bias)
    else:
        place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        first = nn.utils.skip_init(nn.Linear, layer.in_features, rank, bias=False, **place)
        last = nn.utils.skip_init(nn.Linear, rank, layer.out_features, bias=bias, **place)
    if factors is not None:
        left, right = factors
        _assign(first, right.view_as(first.weight))
        _assign(last, left.view_as(last.weight), layer.bias)
    return nn.Sequential(first, last).train(layer.training)


def three_convs(
    conv: nn.Conv2d, rank_in: int, rank_out: int, factors: tuple[Tensor, Tensor, Tensor] | None
) -> nn.Sequential:
    """1 x 1, kernel x kernel and 1 x 1 convolutions for an ungrouped one.

    ``factors`` are the core (rank_out, rank_in, height, width), U_in (inputs, rank_in) and U_out (outputs, rank_out);
    None leaves the values open. Stride and padding are the core's, the bias is the last one's.
    """
    first = empty_conv(conv, conv.in_channels, rank_in, spatial=False, bias=False)
    core = empty_conv(conv, rank_in, rank_out, spatial=True, bias=False)
    last = empty_conv(conv, rank_out, conv.out_channels, spatial=False, bias=conv.bias is not None)
    if factors is not None:
        middle, u_in, u_out = factors
        _assign(first, u_in.T[:, :, None, None])
        _assign(core, middle)
        _assign(last, u_out[:, :, None, None], conv.bias)
    return nn.Sequential(first, core, last).train(conv.training)


def replace_everywhere(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` in place of the module ``name`` wherever it is used; returns the model (``new`` for the name "")."""
    old = model.get_submodule(name)
    if old is model:
        return new
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)
    return model


@torch.no_grad()
def _assign(layer: Layer, weight: Tensor, bias: Tensor | None = None) -> None:
    layer.weight.copy_(weight)
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)
