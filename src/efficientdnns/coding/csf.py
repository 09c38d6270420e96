"""Compressed sparse filters: relative indices in the order in which a processor uses the weights.

Weights are listed by input channel, kernel row and column, and for each of these positions filter by filter ("stacked
filters"), so that one decoded gap says which filter's sum a product belongs to. The fields are those of Deep Compression,
of fixed width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigurationError, FileFormatError
from .bits import ByteReader
from .codecs import DeepCompressionCodec
from .patterns import Shape, element_bits
from .registry import Parameters, register_codec
from .relative_index import relative_encode, shared_weight_bits

Order = Literal["stacked", "filter-major"]
ORDERS: tuple[Order, Order] = ("filter-major", "stacked")


def stacked(weight: Tensor) -> Tensor:
    """(M, C, R, S) as (C, R, S, M): all filters of a position side by side. A matrix (M, C) becomes (C, M)."""
    return weight.movedim(0, -1).contiguous()


def ordered(weight: Tensor, order: Order) -> Tensor:
    """The weight in the order in which it is coded."""
    return stacked(weight) if order == "stacked" and weight.dim() > 1 else weight


def fillers(weight: Tensor, index_bits: int, order: Order = "stacked", per_column: bool = False) -> int:
    """Entries that only bridge gaps; with ``per_column`` gaps start anew at every position."""
    columns = _columns(ordered(weight, order)) if per_column else [element_bits(ordered(weight, order))]
    return sum(int(relative_encode(np.flatnonzero(column), index_bits)[1].sum()) for column in columns)


def column_entries(weight: Tensor, index_bits: int) -> NDArray[np.int64]:
    """Entries of every column of stacked filters, weights and fillers, where gaps start anew in each: (C R S,)."""
    columns = _columns(stacked(weight))
    return np.array([relative_encode(np.flatnonzero(c), index_bits)[0].size for c in columns], dtype=np.int64)


def _columns(weight: Tensor) -> NDArray[np.uint64]:
    return element_bits(weight).reshape(-1, weight.shape[-1])


def storage_bits(weight: Tensor, index_bits: int, order: Order = "stacked", per_column: bool = False) -> int:
    """Bits of the stream: E (b_v + b_i) + codebook, with a count for every column where gaps start anew there.

    The width b_v of a value holds the clusters and the zero of fillers, which needs a code of its own.
    """
    patterns = element_bits(weight)
    clusters = np.unique(patterns[patterns != 0]).size
    entries = int(np.count_nonzero(patterns)) + fillers(weight, index_bits, order, per_column)
    bits = shared_weight_bits(
        entries, max(1, int(clusters).bit_length()), index_bits, clusters, 8 * weight.element_size()
    )
    counts = weight.numel() // weight.shape[0] * weight.shape[0].bit_length() if per_column else 0
    return bits + counts


@dataclass(frozen=True)
class CSFCodec:
    """The compressed sparse filter format, in whichever order is smaller unless ``order`` says which.

    ``index_bits``: bits of a gap, 2 to 16, or None for what gives the smallest result.
    """

    index_bits: int | None = None
    order: Order | None = None
    name: ClassVar[str] = "csf"

    def suits(self, tensor: Tensor) -> bool:
        return DeepCompressionCodec().suits(tensor)

    def encode(self, tensor: Tensor) -> tuple[bytes, Parameters]:
        if self.order is not None and self.order not in ORDERS:
            raise ConfigurationError(f"order is {self.order!r}; use 'stacked' or 'filter-major'")
        codec = DeepCompressionCodec(self.index_bits, huffman=False)
        orders = ORDERS if self.order is None else (self.order,)
        coded = [bytes([ORDERS.index(order)]) + codec.encode(ordered(tensor, order))[0] for order in orders]
        return min(coded, key=len), {}

    def decode(self, data: bytes, parameters: Parameters, shape: Shape, dtype: torch.dtype) -> Tensor:
        number = ByteReader(data).take(1)[0]
        if number >= len(ORDERS):
            raise FileFormatError("sparse filters are corrupt: unknown order")
        if ORDERS[number] == "filter-major" or len(shape) < 2:
            return DeepCompressionCodec().decode(data[1:], {}, shape, dtype)
        found = DeepCompressionCodec().decode(data[1:], {}, (*shape[1:], shape[0]), dtype)
        return found.movedim(-1, 0).contiguous()


register_codec(CSFCodec())
