"""Codecs: ways to store one tensor as bytes, without loss.

A codec works on the bit patterns of the elements, so that every value comes back exactly, ``-0.0`` and ``NaN``
included; only the pattern of ``+0`` counts as zero. ``best`` chooses the codec that makes a tensor smallest. Other
rooms can add codecs with ``register_codec``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigurationError, FileFormatError
from .bits import ByteReader, pack_bits, packed_size, unpack_bits, write_varint
from .codebooks import get_codebook, get_planes, put_codebook, put_planes, sorted_patterns
from .contexts import get_placed_symbols, put_placed_symbols
from .entropy import (
    SymbolReader,
    SymbolWriter,
    get_choice,
    get_number,
    get_signed,
    put_best,
    put_choice,
    put_number,
    put_signed,
)
from .huffman import huffman_decode, huffman_encode
from .integers import QUICK, decode_integers, encode_integers, zstd_compress, zstd_decompress
from .patterns import (
    Shape,
    checked_size,
    codable,
    codebook_indices,
    element_bits,
    look_up,
    pattern_dtype,
    plausible_size,
    tensor_of_bits,
)
from .positions import get_mask, put_mask
from .registry import Codec, Encoded, Parameters, codec_named, encode, register_codec
from .relative_index import relative_decode, relative_encode

MAX_DISTINCT = 4096
_SAMPLE = 1 << 16
_PLACED = 0xFF  # first byte of integers that are coded with contexts; encode_integers writes smaller ones
_MIN_SPARSITY = 0.05
_SURELY_SPARSE = 0.25  # density below which the positions of zeros are coded on their own without a trial
_FEW = 4096  # non-zeros up to which every candidate is tried
_FLOAT_SAVING = 0.9  # a dense float tensor is coded only if it shrinks below this share


class RawCodec:
    """The bytes of the tensor, little-endian."""

    name: ClassVar[str] = "raw"

    def suits(self, tensor: Tensor) -> bool:
        return True

    def encode(self, tensor: Tensor) -> tuple[bytes, Parameters]:
        return element_bits(tensor).tobytes(), {}

    def decode(self, data: bytes, parameters: Parameters, shape: Shape, dtype: torch.dtype) -> Tensor:
        return tensor_of_bits(np.frombuffer(data, dtype=np.uint8), shape, dtype)


class PlanesCodec:
    """Every byte of the elements coded on its own. Shrinks dense float32 by some 15 % and bfloat16 by 30 %: the
    exponents.
    """

    name: ClassVar[str] = "planes"

    def suits(self, tensor: Tensor) -> bool:
        return codable(tensor)

    def encode(self, tensor: Tensor) -> tuple[bytes, Parameters]:
        writer = SymbolWriter()
        put_planes(writer, element_bits(tensor), tensor.is_floating_point())
        return writer.to_bytes(), {}

    def decode(self, data: bytes, parameters: Parameters, shape: Shape, dtype: torch.dtype) -> Tensor:
        size = checked_size(data, shape)
        return tensor_of_bits(
            get_planes(SymbolReader(data), size, pattern_dtype(dtype), dtype.is_floating_point), shape, dtype
        )


class SparseCodec:
    """Positions of the non-zeros, then their values as byte planes."""

    name: ClassVar[str] = "sparse"

    def suits(self, tensor: Tensor) -> bool:
        return codable(tensor) and float((element_bits(tensor) == 0).mean()) >= _MIN_SPARSITY

    def encode(self, tensor: Tensor) -> tuple[bytes, Parameters]:
        bits = element_bits(tensor)
        writer = SymbolWriter()
        put_mask(writer, (bits != 0).reshape(tensor.shape))
        put_planes(writer, bits[bits != 0], tensor.is_floating_point())
        return writer.to_bytes(), {}

    def decode(self, data: bytes, parameters: Parameters, shape: Shape, dtype: torch.dtype) -> Tensor:
        bits = np.zeros(checked_size(data, shape), dtype=pattern_dtype(dtype))
        reader = SymbolReader(data)
        mask = get_mask(reader, shape).reshape(-1)
        bits[mask] = get_planes(reader, int(mask.sum()), bits.dtype, dtype.is_floating_point)
        return tensor_of_bits(bits, shape, dtype)


class CodebookCodec:
    """At most 4096 distinct values: the codebook, then an entropy-coded index per element.

    Zero is no codebook entry. Its positions are coded on their own where that is smaller, else it is index 0. A
    codebook whose float32 values are integer multiples of one step is stored as the step and the integers.
    """

    name: ClassVar[str] = "codebook"

    def suits(self, tensor: Tensor) -> bool:
        if not codable(tensor):
            return False
        bits = element_bits(tensor)
        sample = bits[:: max(1, bits.size // _SAMPLE)]
        nonzeros = sample[sample != 0]
        if np.unique(nonzeros).size > min(MAX_DISTINCT, max(256, nonzeros.size // 2)):
            return False
        return np.unique(bits[bits != 0]).size <= MAX_DISTINCT

    def encode(self, tensor: Tensor) -> tuple[bytes, Parameters]:
        bits = element_bits(tensor)
        patterns = sorted_patterns(bits[bits != 0], tensor.dtype)
        if patterns.size > MAX_DISTINCT:
            raise ConfigurationError(
                f"a codebook holds at most {MAX_DISTINCT} values, the tensor has {patterns.size}; use 'sparse' or 'raw'"
            )
        indices = codebook_indices(bits, patterns)
        mask = (bits != 0).reshape(tensor.shape)
        apart, together = SymbolWriter(), SymbolWriter()
        put_mask(apart, mask)
        put_placed_symbols(apart, indices[indices > 0] - 1, mask, patterns.size)
        writer = SymbolWriter()
        put_number(writer, patterns.size)
        put_codebook(writer, patterns, tensor.dtype)
        if np.count_nonzero(mask) < _SURELY_SPARSE * mask.size:
            put_choice(writer, 0, 2)
            writer.extend(apart)
        else:
            put_placed_symbols(together, indices, np.ones_like(mask), patterns.size + 1)
            put_best(writer, [apart, together])
        coded = b"\0" + writer.to_bytes()
        narrow = indices.astype(np.uint8 if patterns.size < 256 else np.uint16)
        plain = b"\1" + write_varint(patterns.size) + patterns.tobytes() + zstd_compress(narrow, len(coded))
        return min(coded, plain, key=len), {}

    def decode(self, data: bytes, parameters: Parameters, shape: Shape, dtype: torch.dtype) -> Tensor:
        size = checked_size(data, shape)
        if data[:1] == b"\1":
            start = ByteReader(data[1:])
            number = start.varint(MAX_DISTINCT)
            patterns = np.frombuffer(start.take(number * dtype.itemsize), dtype=pattern_dtype(dtype))
            index_dtype = np.dtype(np.uint8 if number < 256 else np.uint16)
            indices = zstd_decompress(start.rest(), index_dtype, size).astype(np.int64)
        elif data[:1] == b"\0":
            reader = SymbolReader(data[1:])
            number = get_number(reader, MAX_DISTINCT)
            patterns = get_codebook(reader, number, dtype)
            if get_choice(reader, 2) == 0:
                mask = get_mask(reader, shape)
                indices = np.zeros(size, dtype=np.int64)
                indices[mask.reshape(-1)] = get_placed_symbols(reader, mask, number) + 1
            else:
                indices = get_placed_symbols(reader, np.ones(shape, dtype=bool), number + 1).astype(np.int64)
        else:
            raise FileFormatError("codebook data is corrupt: unknown first byte")
        return tensor_of_bits(look_up(patterns, indices), shape, dtype)


class IntegersCodec:
    """Entropy-coded integers (any width) or booleans (as positions)."""

    name: ClassVar[str] = "integers"

    def suits(self, tensor: Tensor) -> bool:
        return codable(tensor) and not tensor.is_floating_point() and not tensor.is_complex()

    def encode(self, tensor: Tensor) -> tuple[bytes, Parameters]:
        if not self.suits(tensor) and tensor.numel():
            raise ConfigurationError(
                f"'integers' codes integers and booleans, not {tensor.dtype}; use 'codebook', 'sparse' or 'planes'"
            )
        writer = SymbolWriter()
        if tensor.dtype == torch.bool:
            put_mask(writer, tensor.detach().cpu().numpy())
            return writer.to_bytes(), {}
        values = tensor.detach().cpu().contiguous().numpy()
        coded = encode_integers(values)
        if values.ndim > 1 and 0 < values.size <= QUICK and int(values.max()) - int(values.min()) < MAX_DISTINCT:
            low, span = int(values.min()), int(values.max()) - int(values.min())
            put_signed(writer, low)
            put_number(writer, span)
            put_placed_symbols(
                writer,
                (values.astype(np.uint64) - np.uint64(low % 2**64)).reshape(-1),
                np.ones(values.shape, bool),
                span + 1,
            )
            coded = min(coded, bytes([_PLACED]) + writer.to_bytes(), key=len)
        return coded, {}

    def decode(self, data: bytes, parameters: Parameters, shape: Shape, dtype: torch.dtype) -> Tensor:
        size = checked_size(data, shape)
        if dtype == torch.bool:
            return torch.from_numpy(get_mask(SymbolReader(data), shape))
        if dtype.is_floating_point or dtype.is_complex:
            raise FileFormatError(f"coded integers are corrupt: they cannot be a tensor of {dtype}")
        if data[:1] == bytes([_PLACED]):
            reader = SymbolReader(data[1:])
            low, span = get_signed(reader), get_number(reader, MAX_DISTINCT - 1)
            if not torch.iinfo(dtype).min <= low <= torch.iinfo(dtype).max - span:
                raise FileFormatError(f"coded integers are corrupt: {low} to {low + span} do not fit {dtype}")
            symbols = get_placed_symbols(reader, np.ones(shape, dtype=bool), span + 1)
            target = str(dtype).removeprefix("torch.")
            values = torch.from_numpy((symbols.astype(np.uint64) + np.uint64(low % 2**64)).astype(target))
        else:
            values = torch.from_numpy(decode_integers(data, size))
        if values.numel() != size or values.dtype != dtype:
            raise FileFormatError(
                f"coded integers are {values.numel()} of {values.dtype}, expected {list(shape)} of {dtype}"
            )
        return values.reshape(shape)


@dataclass(frozen=True)
class DeepCompressionCodec:
    """The format of Deep Compression (https://arxiv.org/abs/1510.00149): codebook, cluster ids and relative indices.

    ``index_bits``: bits of a gap, 1..16, or None for the value that gives the smallest result; ``huffman``: Huffman-
    code the ids and the gaps (else they are packed into ``ceil(log2(k + 1))`` and ``index_bits`` bits). Id 0 marks
    fillers; ids 1..k are the codebook.
    """

    index_bits: int | None = None
    huffman: bool = True
    name: ClassVar[str] = "deep-compression"

    def suits(self, tensor: Tensor) -> bool:
        return SparseCodec().suits(tensor) and CodebookCodec().suits(tensor)

    def encode(self, tensor: Tensor) -> tuple[bytes, Parameters]:
        bits = element_bits(tensor)
        positions = np.flatnonzero(bits)
        patterns = sorted_patterns(bits[positions], tensor.dtype)
        if patterns.size >= 1 << 16:
            raise ConfigurationError(
                f"'deep-compression' shares at most 65535 values, the tensor has {patterns.size}; cluster it first"
            )
        ids = codebook_indices(bits[positions], patterns)
        head = write_varint(patterns.size) + patterns.tobytes()
        choices = range(2, 13) if self.index_bits is None else [self.index_bits]
        return min((self._encode_entries(head, positions, ids, index_bits) for index_bits in choices), key=len), {}

    def _encode_entries(
        self, head: bytes, positions: NDArray[np.int64], ids: NDArray[np.int64], index_bits: int
    ) -> bytes:
        gaps, is_filler = relative_encode(positions, index_bits)
        entries = np.zeros(gaps.size, dtype=np.int64)
        entries[~is_filler] = ids
        head = bytes([index_bits | self.huffman << 7]) + head + write_varint(gaps.size)
        if self.huffman:
            coded = huffman_encode(entries)
            return head + write_varint(len(coded)) + coded + huffman_encode(gaps)
        id_bits = max(1, int(ids.max(initial=0)).bit_length())
        return head + pack_bits(entries, id_bits) + pack_bits(gaps, index_bits)

    def decode(self, data: bytes, parameters: Parameters, shape: Shape, dtype: torch.dtype) -> Tensor:
        size = checked_size(data, shape)
        reader = ByteReader(data)
        first = reader.take(1)[0]
        index_bits = first & 0x7F
        number = reader.varint((1 << 16) - 1)
        patterns = np.frombuffer(reader.take(number * dtype.itemsize), dtype=pattern_dtype(dtype))
        count = reader.varint(size)
        if not 1 <= index_bits <= 16:
            raise FileFormatError(f"sparse data is corrupt: relative indices of {index_bits} bits")
        if first & 0x80:
            entries = huffman_decode(reader.take(reader.varint()), count)
            gaps = huffman_decode(reader.rest(), count)
        else:
            id_bits = max(1, number.bit_length())
            entries = unpack_bits(reader.take(packed_size(count, id_bits)), id_bits, count).astype(np.int64)
            gaps = unpack_bits(reader.take(packed_size(count, index_bits)), index_bits, count).astype(np.int64)
        if entries.size != count or gaps.size != count or (count and (gaps.min() < 0 or gaps.max() >= 1 << index_bits)):
            raise FileFormatError(
                f"sparse data is corrupt: expected {count} cluster ids and gaps below {1 << index_bits}"
            )
        positions = relative_decode(gaps, entries == 0)
        if positions.size and positions[-1] >= size:
            raise FileFormatError(f"sparse data is corrupt: it reaches beyond the {size} weights")
        bits = np.zeros(size, dtype=pattern_dtype(dtype))
        bits[positions] = look_up(patterns, entries[entries != 0])
        return tensor_of_bits(bits, shape, dtype)


for _codec in (RawCodec(), PlanesCodec(), SparseCodec(), CodebookCodec(), IntegersCodec(), DeepCompressionCodec()):
    register_codec(_codec)


def _default_candidates(tensor: Tensor) -> list[str]:
    """Return the codecs that can be the smallest: "sparse" loses against "codebook" where values repeat."""
    few_values = CodebookCodec().suits(tensor)
    if codable(tensor) and np.count_nonzero(element_bits(tensor)) <= _FEW:
        return ["integers", "codebook", "sparse"]
    if not tensor.is_floating_point() and not tensor.is_complex():
        return ["integers", "codebook"] if few_values and tensor.numel() <= QUICK else ["integers"]
    return ["codebook"] if few_values else ["sparse"]


def best(tensor: Tensor, candidates: Sequence[str | Codec] | None = None) -> Encoded:
    """Encode ``tensor`` with the codec that makes it smallest, or as "raw" where none helps.

    ``candidates``: names or codec objects, by default codebook, sparse and integers. By default a float tensor must
    shrink by more than 10 % to be coded, so that dense weights stay readable by every safetensors reader; with given
    candidates, by one byte.
    """
    raw_size = tensor.numel() * tensor.element_size()
    limit = raw_size * _FLOAT_SAVING if candidates is None and tensor.is_floating_point() else raw_size
    smallest: Encoded | None = None
    for candidate in _default_candidates(tensor) if candidates is None else candidates:
        codec = codec_named(candidate) if isinstance(candidate, str) else candidate
        if codec.suits(tensor) and plausible_size(b"", tensor.shape):
            encoded = encode(tensor, codec)
            if smallest is None or len(encoded.data) < len(smallest.data):
                smallest = encoded
    if smallest is not None and len(smallest.data) < limit:
        return smallest
    return encode(tensor, "raw")
