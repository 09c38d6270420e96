"""Winograd convolution F(m x m, k x k), for any m and k: fewer multiplications for stride-1 convolutions.

Tiles of n x n inputs, n = m + k - 1, give m x m outputs with n^2 multiplications a channel in place of m^2 k^2. A kernel
that is pruned in the spatial domain is not sparse any more once transformed, and the other way round.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.errors import ConfigurationError
from efficientdnns.parts.select import largest_mask
from efficientdnns.surgery import rebuildable

_POINTS = (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2), 4, -4)
Matrix = tuple[tuple[float, ...], ...]


@functools.cache
def _matrices(m: int, k: int) -> tuple[Matrix, Matrix, Matrix]:
    """B^T (n, n), G (n, k), A^T (m, n) of Cook and Toom: products of polynomials at n - 1 points and infinity."""
    n = m + k - 1
    if n - 1 > len(_POINTS):
        raise ConfigurationError(f"F({m}, {k}) needs tiles of {n}, at most {len(_POINTS) + 1} is numerically sensible")
    points = [Fraction(p) for p in _POINTS[: n - 1]]
    bt, g = [], []
    for j, point in enumerate(points):
        others = points[:j] + points[j + 1 :]
        scale = functools.reduce(lambda a, b: a * b, (point - other for other in others), Fraction(1))
        sign = 1 if scale > 0 else -1
        bt.append([sign * c for c in _product(others)] + [Fraction(0)])
        g.append([point**power / abs(scale) for power in range(k)])
    bt.append(_product(points))
    g.append([Fraction(int(power == k - 1)) for power in range(k)])
    at = [[point**row for point in points] + [Fraction(int(row == m - 1))] for row in range(m)]
    return tuple(tuple(tuple(float(x) for x in row) for row in matrix) for matrix in (bt, g, at))  # type: ignore[return-value]


def _product(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients, lowest first, of the polynomial with these roots."""
    result = [Fraction(1)]
    for root in roots:
        result = [a - root * b for a, b in zip([Fraction(0), *result], [*result, Fraction(0)], strict=True)]
    return result


def _with_itself(matrix: Matrix) -> Matrix:
    """The Kronecker product of a matrix with itself."""
    return tuple(tuple(a * b for a in row for b in other) for row in matrix for other in matrix)


def winograd_matrices(m: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """B^T (n, n), G (n, k) and A^T (m, n) of F(m, k)."""
    bt, g, at = (torch.tensor(matrix) for matrix in _matrices(m, k))
    return bt, g, at


def winograd_transform(weight: Tensor, m: int) -> Tensor:
    """:math:`G w G^T` of square kernels: (..., k, k) -> (..., n, n)."""
    g = winograd_matrices(m, weight.shape[-1])[1].to(weight)
    return g @ weight @ g.T


def prune_winograd(transformed: Tensor, sparsity: float) -> Tensor:
    """``transformed`` without the share of its entries that is smallest; the number of zeros is exact."""
    keep = transformed.numel() - round(sparsity * transformed.numel())
    return torch.where(largest_mask(transformed.abs(), keep), transformed, 0.0)


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    m: int = 2,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
    transformed: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    r"""Stride-1 convolution by :math:`Y = A^T [(G w G^T) \odot (B^T X B)] A` of every tile X, summed over channels before A.

    Tiles at the lower and right edge are filled with zeros and cropped. Both transforms are one matrix product:
    :math:`B^T X B` is :math:`(B^T \otimes B^T)` times the n^2 entries of X.

    Args:
        x: (N, C, H, W).
        weight: (M, C / groups, k, k).
        m: outputs of a tile in each direction.
        transformed: (M, C / groups, n, n) in place of what `winograd_transform` makes of ``weight``, pruned for example; or
            (without groups) one matrix (M, C) for each of the n^2 entries, in compressed rows.
    """
    k = weight.shape[-1]
    n = m + k - 1
    forth, _, back = (torch.tensor(_with_itself(matrix)).to(x) for matrix in _matrices(m, k))
    tall, wide = (padding, padding) if isinstance(padding, int) else padding
    height, width = x.shape[-2] + 2 * tall - k + 1, x.shape[-1] + 2 * wide - k + 1
    rows, columns = -(-height // m), -(-width // m)
    x = F.pad(x, (wide, columns * m + k - 1 - x.shape[-1] - wide, tall, rows * m + k - 1 - x.shape[-2] - tall))
    batch, channels, outputs = x.shape[0], x.shape[1], weight.shape[0]
    tiles = x.transpose(0, 1).unfold(2, n, m).unfold(3, n, m)  # (C, N, rows, columns, n, n)
    tiles = forth @ tiles.permute(4, 5, 0, 1, 2, 3).reshape(n * n, -1)
    tiles = tiles.view(n * n, groups, channels // groups, batch * rows * columns)
    if isinstance(transformed, Sequence):
        y = torch.stack([kernel @ entries for kernel, entries in zip(transformed, tiles[:, 0], strict=True)])
    else:
        u = winograd_transform(weight, m) if transformed is None else transformed
        y = u.reshape(groups, outputs // groups, channels // groups, n * n).permute(3, 0, 1, 2) @ tiles
    y = (back @ y.view(n * n, -1)).view(m, m, outputs, batch, rows, columns)
    y = y.permute(3, 2, 4, 0, 5, 1).reshape(batch, outputs, rows * m, columns * m)
    y = y[..., :height, :width]
    return y if bias is None else y + bias.view(-1, 1, 1)


def has_winograd_form(module: nn.Module) -> bool:
    """Whether this is a stride-1 convolution with square kernels larger than 1 x 1, zero-padded and not dilated."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size[0] == module.kernel_size[1] > 1
        and module.stride == module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


@rebuildable
class WinogradConv2d(nn.Module):
    """A stride-1 convolution carried out in the Winograd domain; it holds the spatial weights, which are fewer.

    Args:
        m: outputs of a tile in each direction.
        threshold: transformed weights up to this magnitude are taken for zero.

    Attributes:
        weight: (out_channels, in_channels / groups, k, k).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        padding: tuple[int, int] = (0, 0),
        groups: int = 1,
        bias: bool = True,
        m: int = 2,
        threshold: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.padding, self.groups, self.m, self.threshold = tuple(padding), groups, m, threshold
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self._kept: tuple[Any, Tensor] | None = None

    @classmethod
    def of(cls, conv: nn.Conv2d, m: int = 2, threshold: float = 0.0) -> WinogradConv2d:
        """The same convolution, with copies of its tensors."""
        k = conv.kernel_size[0]
        options = (conv.in_channels, conv.out_channels, k, conv.padding, conv.groups, conv.bias is not None)
        layer = cls(*options, m=m, threshold=threshold).to(conv.weight).train(conv.training)  # type: ignore[arg-type]
        layer.load_state_dict(conv.state_dict())
        return layer

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("in_channels", "out_channels", "kernel_size", "groups", "m", "threshold")
        return {n: getattr(self, n) for n in names} | {"padding": list(self.padding), "bias": self.bias is not None}

    def forget(self) -> None:
        """Drop the transformed weights; they are computed again when needed."""
        self._kept = None

    def train(self, mode: bool = True) -> WinogradConv2d:
        super().train(mode)
        self.forget()
        return self

    def transformed(self) -> Tensor:
        """The pruned weights of the Winograd domain; where no gradient is wanted they are computed once."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_inference(self.weight):
            return self._transformed()
        key = self.weight.data_ptr(), self.weight._version
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = key, self._transformed()
        return self._kept[1]

    def _transformed(self) -> Tensor:
        return self.prune(winograd_transform(self.weight, self.m))

    def prune(self, transformed: Tensor) -> Tensor:
        """``transformed`` with zeros in place of what does not exceed the threshold."""
        return torch.where(transformed.abs() > self.threshold, transformed, torch.zeros_like(transformed))

    def forward(self, x: Tensor) -> Tensor:
        sides = (self.padding[0], self.padding[1])
        return winograd_conv2d(x, self.weight, self.bias, self.m, sides, self.groups, self.transformed())
