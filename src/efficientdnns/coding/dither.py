"""Dithered quantization: uniform noise that the decoder can repeat is added before rounding and subtracted after.

The error is then uniform and independent of the weights, whatever their distribution. The file holds the seed, the
indices and the codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigurationError, FileFormatError
from .contexts import get_placed_symbols, put_placed_symbols
from .entropy import SymbolReader, SymbolWriter, get_number, get_raw, put_number, put_raw
from .hashing import splitmix64
from .patterns import Shape, checked_size
from .positions import get_mask, put_mask
from .registry import Parameters, register_codec

_MOST = 4096


def dither(count: int, step: float, seed: int) -> Tensor:
    """``count`` numbers, uniform in (-step / 2, step / 2), float32: the same on every machine."""
    return torch.from_numpy(_dither(count, step, seed))


def _dither(count: int, step: float, seed: int) -> NDArray[np.float32]:
    uniform = ((splitmix64(np.arange(count), seed) >> np.uint64(40)).astype(np.float64) + 0.5) / 2**24 - 0.5
    return (uniform * step).astype(np.float32)


def quantize_uniform(weight: Tensor, step: float, noise: Tensor | None = None) -> Tensor:
    r"""Indices :math:`\mathrm{round}((w + u) / \Delta)` (int64); they stand for :math:`\Delta q - u`."""
    return ((weight if noise is None else weight + noise) / step).round().long()


@dataclass(frozen=True)
class DitheredCodec:
    """Zeros by position; every other weight is a codebook value minus its dither.

    As a choice for ``save_weights`` it is made with what the weights were quantized with, and suits exactly those.
    """

    step: float = 0.0
    seed: int = 0
    codebook: tuple[float, ...] = ()
    name: ClassVar[str] = "dithered"

    def suits(self, tensor: Tensor) -> bool:
        return self._symbols(tensor) is not None

    def _symbols(self, tensor: Tensor) -> NDArray[np.int64] | None:
        """The codebook entry of every non-zero weight; None where one is not a codebook value minus its dither."""
        if tensor.dtype != torch.float32 or not self.codebook:
            return None
        values = tensor.detach().cpu().numpy().reshape(-1)
        kept = np.flatnonzero(values)
        noise, book = _dither(values.size, self.step, self.seed)[kept], np.array(self.codebook, dtype=np.float32)
        order = np.argsort(book, kind="stable")
        exact = book[order].astype(np.float64)
        wanted = values[kept].astype(np.float64) + noise
        symbols: NDArray[np.int64] = order[np.searchsorted((exact[1:] + exact[:-1]) / 2, wanted)]
        same = np.array_equal((book[symbols] - noise).view(np.uint32), values[kept].view(np.uint32))
        return symbols if same else None

    def encode(self, tensor: Tensor) -> tuple[bytes, Parameters]:
        symbols = self._symbols(tensor)
        if symbols is None or len(self.codebook) > _MOST:
            raise ConfigurationError("'dithered' stores only weights that were quantized with its dither; use 'sparse'")
        writer = SymbolWriter()
        put_number(writer, len(self.codebook))
        put_raw(writer, np.array(self.codebook, dtype=np.float32).view(np.uint32), 32)
        mask = (tensor.detach().cpu() != 0).numpy()
        put_mask(writer, mask)
        put_placed_symbols(writer, symbols, mask, len(self.codebook))
        return writer.to_bytes(), {"step": self.step, "seed": self.seed}

    def decode(self, data: bytes, parameters: Parameters, shape: Shape, dtype: torch.dtype) -> Tensor:
        size = checked_size(data, shape)
        step, seed = parameters.get("step"), parameters.get("seed")
        if dtype != torch.float32 or not isinstance(step, float) or not isinstance(seed, int):
            raise FileFormatError("dithered data is corrupt: it needs float32, a step and a seed")
        reader = SymbolReader(data)
        number = get_number(reader, _MOST)
        book = get_raw(reader, number, 32).astype(np.uint32).view(np.float32)
        mask = get_mask(reader, shape)
        if number == 0:
            raise FileFormatError("dithered data is corrupt: its codebook is empty")
        kept = np.flatnonzero(mask)
        values = np.zeros(size, dtype=np.float32)
        values[kept] = book[get_placed_symbols(reader, mask, number)] - _dither(size, step, seed)[kept]
        return torch.from_numpy(values).reshape(shape)


register_codec(DitheredCodec())
