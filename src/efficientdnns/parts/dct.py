"""Convolutions whose kernels are kept as DCT coefficients, and their two executions.

The orthonormal DCT keeps inner products, so a convolution is the same whether both patch and kernel are in the spatial
or both in the frequency domain; kernels are smooth, so fewer of their coefficients matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.surgery import rebuildable

Domain = Literal["spatial", "frequency"]


@functools.cache
def _rows(k: int) -> tuple[tuple[float, ...], ...]:
    scale = [math.sqrt((1 if u == 0 else 2) / k) for u in range(k)]
    return tuple(tuple(scale[u] * math.cos((2 * x + 1) * u * math.pi / (2 * k)) for x in range(k)) for u in range(k))


def dct_matrix(k: int) -> Tensor:
    r"""The orthonormal DCT-II, (k, k): :math:`B_{ux} = c_u \cos\frac{(2x+1) u \pi}{2k}`, :math:`c_0 = \sqrt{1/k}`, else
    :math:`c_u = \sqrt{2/k}`."""
    return torch.tensor(_rows(k))


@functools.cache
def _patterns(height: int, width: int) -> tuple[tuple[float, ...], ...]:
    tall, wide = _rows(height), _rows(width)
    return tuple(tuple(a * b for a in left for b in right) for left in tall for right in wide)


def dct_basis(height: int, width: int) -> Tensor:
    """Both directions at once, (height width, height width): row (u, v) is the pattern of that coefficient."""
    return torch.tensor(_patterns(height, width))


def dct_filters(weight: Tensor) -> Tensor:
    """Coefficients :math:`V = B W B^T` of the last two dimensions."""
    basis = dct_basis(*weight.shape[-2:]).to(weight)
    return (weight.flatten(-2) @ basis.T).view_as(weight)


def idct_filters(coefficients: Tensor) -> Tensor:
    """Kernels :math:`W = B^T V B`, what `dct_filters` undoes."""
    basis = dct_basis(*coefficients.shape[-2:]).to(coefficients)
    return (coefficients.flatten(-2) @ basis).view_as(coefficients)


def bands(height: int, width: int) -> Tensor:
    """The frequency band u + v of every coefficient, (height, width)."""
    return torch.arange(height)[:, None] + torch.arange(width)


def frequency_conv2d(
    x: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: str | tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    r"""Convolution in the frequency domain: :math:`\sum_n \langle B P_n B^T, V_{mn} \rangle` for every patch P.

    The patches of every input channel are transformed once, which is a convolution with the fixed patterns, and all
    filters read the result through a 1 x 1 convolution with the coefficients.

    Args:
        x: (N, C, H, W).
        coefficients: (M, C / groups, height, width).
    """
    height, width = coefficients.shape[-2:]
    channels = x.shape[1]
    patterns = dct_basis(height, width).to(x).view(-1, 1, height, width).repeat(channels, 1, 1, 1)
    planes = F.conv2d(x, patterns, None, stride, padding, dilation, groups=channels)
    return F.conv2d(planes, coefficients.flatten(1)[:, :, None, None], bias, groups=groups)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    height, width = values
    return height, width


@rebuildable
class DCTConv2d(nn.Module):
    """A 2-D convolution that holds DCT coefficients, (N, in_channels, H, W) -> (N, out_channels, H', W').

    Args:
        domain: of the execution. 'spatial' decodes the kernels once and convolves as usual; 'frequency' transforms the
            patches (`frequency_conv2d`). Both give the same up to rounding. Exported files decode the coefficients.

    Attributes:
        weight_dct: coefficients V, (out_channels, in_channels / groups, height, width).
    """

    _OPTIONS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: str | tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        domain: Domain = "spatial",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        # Lists where the arguments come from a file.
        self.kernel_size, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        self.padding: Any = padding if isinstance(padding, str) else tuple(padding)
        self.padding_mode, self.domain = padding_mode, domain
        self.weight_dct = nn.Parameter(torch.zeros(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self._decoded: tuple[Any, Tensor] | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, conv: nn.Conv2d, domain: Domain = "spatial") -> DCTConv2d:
        """The same convolution with coefficients."""
        options = {name: getattr(conv, name) for name in cls._OPTIONS}
        layer = cls(**options, bias=conv.bias is not None, domain=domain).to(conv.weight).train(conv.training)
        layer.weight_dct.copy_(dct_filters(conv.weight))
        if layer.bias is not None and conv.bias is not None:
            layer.bias.copy_(conv.bias)
        return layer

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        options = {name: getattr(self, name) for name in self._OPTIONS}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        return plain | {"bias": self.bias is not None, "domain": self.domain}

    @torch.no_grad()
    def to_spatial(self) -> nn.Conv2d:
        """The plain convolution that this is."""
        options = {name: getattr(self, name) for name in self._OPTIONS}
        conv = nn.Conv2d(**options, bias=self.bias is not None).to(self.weight_dct).train(self.training)
        conv.weight.copy_(idct_filters(self.weight_dct))
        if conv.bias is not None and self.bias is not None:
            conv.bias.copy_(self.bias)
        return conv

    def forget(self) -> None:
        """Drop the decoded kernels; they are decoded again when needed."""
        self._decoded = None

    def train(self, mode: bool = True) -> DCTConv2d:
        super().train(mode)
        self.forget()
        if not mode and not self.weight_dct.is_meta and self.weight_dct.numel():
            with torch.no_grad():
                self.kernels()  # now rather than in the first call, so that all calls cost the same
        return self

    def kernels(self) -> Tensor:
        """The spatial kernels; where no gradient is wanted they are decoded once."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_inference(self.weight_dct):
            return idct_filters(self.weight_dct)
        key = self.weight_dct.data_ptr(), self.weight_dct._version
        if self._decoded is None or self._decoded[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._decoded = key, idct_filters(self.weight_dct)
        return self._decoded[1]

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._sides(), mode=self.padding_mode)
            padding = (0, 0)
        if self.domain == "frequency" and not torch.compiler.is_exporting():
            return frequency_conv2d(x, self.weight_dct, self.bias, self.stride, padding, self.dilation, self.groups)
        return F.conv2d(x, self.kernels(), self.bias, self.stride, padding, self.dilation, self.groups)

    def _sides(self) -> list[int]:
        """Padding left, right, top, bottom."""
        sides: list[int] = []
        for axis in (1, 0):
            total = self.dilation[axis] * (self.kernel_size[axis] - 1)
            if self.padding == "same":
                sides += [total // 2, total - total // 2]
            else:
                sides += [0, 0] if self.padding == "valid" else [self.padding[axis]] * 2
        return sides
