"""Weights that a file keeps in fewer bytes: few distinct values as codes into a codebook, zeros as a bit map.

Any weight tensor that has become sparse or shares its values is kept so, exactly, whichever method made it; the graph in
the file decodes it. ONNX Runtime, OpenVINO and `open_pt2` do that once, when the file is opened.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

FEWEST = 256
"""Elements from which on a tensor is worth it."""
GAIN = 0.9
"""A coded tensor takes at most this share of the bytes."""


class Coded(nn.Module):
    """One tensor, decoded by calling it.

    Bytes for n elements of which z are not zero, with d distinct values: b n / 8 + 4 d for codes of b bits (1, 2, 4, 8),
    n / 8 + 4 z for a bit map and values, n / 8 + b z / 8 + 4 d for both.

    Args:
        shape: of the tensor.
        bits: of a code, None where the values stand for themselves.
        sparse: whether there is a bit map of what is not zero.
    """

    codes: Tensor | None
    values: Tensor
    mask: Tensor | None

    def __init__(self, weight: Tensor, bits: int | None, sparse: bool) -> None:
        super().__init__()
        flat = weight.detach().flatten()
        self.shape, self.bits, self.count = tuple(weight.shape), bits, flat.numel()
        self.register_buffer("mask", pack(flat != 0, 1) if sparse else None)
        if sparse:
            # An all-zero tensor keeps one value that nothing points to.
            flat = flat[flat != 0] if bool(flat.any()) else flat[:1]
        self.stored = flat.numel()
        values, codes = (flat, None) if bits is None else torch.unique(flat, return_inverse=True)
        self.register_buffer("values", values.clone())
        self.register_buffer("codes", None if codes is None or bits is None else pack(codes, bits))

    def forward(self) -> Tensor:
        """The tensor."""
        values = self.values
        if self.codes is not None and self.bits is not None:
            values = values.index_select(0, unpack(self.codes, self.bits, self.stored))
        if self.mask is not None:
            kept = unpack(self.mask, 1, self.count)
            place = (kept.cumsum(0) - 1).clamp(min=0, max=self.stored - 1)
            values = torch.where(kept > 0, values.index_select(0, place), torch.zeros((), dtype=values.dtype))
        return values.reshape(self.shape)


def encode(weight: Tensor) -> Coded | None:
    """``weight`` in its smallest coded form, None where none is smaller than `GAIN` of its bytes."""
    n = weight.numel()
    if n < FEWEST or weight.dtype != torch.float32:
        return None
    zeros = n - int(weight.count_nonzero())
    distinct = _distinct(weight)
    width = weight.element_size()
    sizes: dict[tuple[int | None, bool], float] = {(None, True): n / 8 + (n - zeros) * width}
    if distinct is not None:
        bits = _bits(distinct)
        sizes[bits, False] = n * bits / 8 + distinct * width
        bits = _bits(max(distinct - bool(zeros), 1))
        sizes[bits, True] = n / 8 + (n - zeros) * bits / 8 + distinct * width
    form = min(sizes, key=lambda key: sizes[key])
    return Coded(weight, *form) if sizes[form] <= GAIN * n * width else None


class Decoding(nn.Module):
    """A network some of whose weights are decoded on the way; called like it."""

    def __init__(self, network: nn.Module, coded: dict[str, Coded]) -> None:
        super().__init__()
        tensors = dict(network.named_parameters(remove_duplicate=False))
        empty = {id(tensors[name]): nn.Parameter(torch.empty(0), requires_grad=False) for name in coded}
        self.network = copy.deepcopy(network, dict(empty))
        self.names = tuple(coded)
        self.coded = nn.ModuleList(coded.values())

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """See the class."""
        weights = {name: decode() for name, decode in zip(self.names, self.coded)}
        return torch.func.functional_call(self.network, weights, arguments, named)


def with_coded_weights(network: nn.Module) -> nn.Module:
    """``network`` itself, or a copy that decodes those of its weights that are smaller so."""
    coded = {name: code for name, weight in network.named_parameters() if (code := encode(weight.detach())) is not None}
    return Decoding(network, coded) if coded else network


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) of 1, 2, 4 or 8 bits, the first in the lowest bits: uint8 (ceil(n bits / 8),)."""
    each = 8 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -len(codes) % each)).view(-1, each)
    return (padded << torch.arange(0, 8, bits)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`: int64 (count,). Written in floating point, which every runtime has the operations for."""
    if bits == 8:
        return packed.long()
    low = 2.0 ** -torch.arange(0, 8, bits)
    number = packed.float().unsqueeze(-1)
    return ((number * low).floor() - (number * low / 2**bits).floor() * 2**bits).flatten()[:count].long()


def _bits(distinct: int) -> int:
    needed = max(1, math.ceil(math.log2(distinct)))
    return next(bits for bits in (1, 2, 4, 8) if bits >= needed)


def _distinct(weight: Tensor) -> int | None:
    """Number of distinct values, None beyond 256."""
    flat = weight.detach().flatten()
    for part in (flat[:: max(1, flat.numel() // 4096)], flat):
        if (found := len(part.unique())) > 256:
            return None
    return found
