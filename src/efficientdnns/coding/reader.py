"""Reading a weights file tensor by tensor; the layout is described in `efficientdnns.coding.file`."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import safetensors
import torch
from torch import Tensor

from ..errors import ConfigurationError, FileFormatError
from .bits import ByteReader
from .registry import codec_named

BLOB = "efficientdnns"
FORMAT_VERSION = 1
CHUNK = 1 << 20
_MAX_INDEX = 1 << 28
DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# what the index is likely to contain, the most frequent last; changing it changes the format
DICTIONARY = (
    b'"C64""F64""F8_E5M2""F8_E4M3""U64""U32""U16""I16""I32""U8","BOOL","BF16","F16","planes","deep-compression","I8",'
    b"self_attn.q_proj.k_proj.v_proj.out_proj.in_proj_embeddings.attention.encoder.decoder.blocks.features.classifier.downsample."
    b'shortcut.num_batches_tracked","integers","I64",[],.running_mean.running_var","raw","F32",[64],256],["norm1.bn1.layer1.0.conv1.'
    b'[["fc1.weight","sparse","F32",[.bias","raw","F32",[.weight","codebook","F32",[,3,3],'
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a weights file. ``bytes``: its coded length without the share of headers (0 for a tied copy)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Coded bits per element; 0 for an empty tensor."""
        return 8 * self.bytes / max(1, math.prod(self.shape))


@dataclass(frozen=True)
class _Entry:
    name: str
    codec: str
    dtype: str
    shape: tuple[int, ...]
    length: int
    parameters: dict[str, Any]


class WeightsFile:
    """A weights file opened for reading. Opening reads and checks the header and the index, no tensor.

    Attributes:
        names: the tensors that are stored, coded ones last.
        ties: names that stand for another stored tensor.

    Raises FileFormatError if the file is missing, truncated, corrupt, or written by a newer version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass  # the library checks the header
            self._file: IO[bytes] = open(path, "rb")  # noqa: SIM115
        except FileNotFoundError as error:
            raise FileFormatError(f"there is no weights file {path}") from error
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            raise FileFormatError(f"{path} is not a readable safetensors file: {error}") from error
        try:
            size = int.from_bytes(self._file.read(8), "little")
            self._header: dict[str, Any] = json.loads(self._file.read(size))
            self._header.pop("__metadata__", None)
            self._start = 8 + size
            self._coded: dict[str, tuple[_Entry, int]] = {}
            self.ties: dict[str, str] = {}
            if BLOB in self._header:
                self._open_blob(**self._header.pop(BLOB))
            self.names = [*self._header, *self._coded]
            for name, other in self.ties.items():
                if other not in self.names:
                    raise FileFormatError(f"{path} is corrupt: tensor {name!r} is tied to {other!r}, which is missing")
        except BaseException:
            self._file.close()
            raise

    def tensor(self, name: str) -> Tensor:
        """Read and decode one of ``names`` into memory of its own."""
        if name in self._coded:
            return self._decoded(*self._coded[name])
        entry = self._header[name]
        if entry["dtype"] not in DTYPES:
            raise FileFormatError(f"{self.path} holds tensor {name!r} of type {entry['dtype']}, which is not supported")
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        if tensor.numel():
            self._file.seek(self._start + entry["data_offsets"][0])
            self._file.readinto(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[attr-defined]
        return tensor

    def mapped(self) -> dict[str, Tensor]:
        """The raw tensors on a private memory map of the file; those that do not lie at a multiple of their type's size
        are left out."""
        whole = torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=Path(self.path).stat().st_size)
        content = torch.empty(0, dtype=torch.uint8).set_(whole)  # type: ignore[arg-type]
        tensors = {}
        for name, entry in self._header.items():
            dtype = DTYPES.get(entry["dtype"])
            begin, end = (self._start + offset for offset in entry["data_offsets"])
            if dtype is not None and begin < end and begin % dtype.itemsize == 0:
                tensors[name] = content[begin:end].view(dtype).view(entry["shape"])
        return tensors

    def info(self, name: str) -> TensorInfo:
        """What is known of one of ``names`` without decoding it."""
        if name in self._coded:
            entry, _ = self._coded[name]
            return TensorInfo(name, entry.shape, entry.dtype, entry.codec, entry.length)
        raw = self._header[name]
        begin, end = raw["data_offsets"]
        return TensorInfo(name, tuple(raw["shape"]), raw["dtype"], "raw", end - begin)

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _decoded(self, entry: _Entry, start: int) -> Tensor:
        self._file.seek(start)
        try:
            codec = codec_named(entry.codec)
            # A copy, because what codecs make lies anywhere in memory, and kernels round by alignment.
            return codec.decode(
                self._file.read(entry.length), entry.parameters, entry.shape, DTYPES[entry.dtype]
            ).clone()
        except ConfigurationError as error:
            raise FileFormatError(f"{self.path} uses a codec that is not loaded: {error}") from error
        except MemoryError as error:
            raise FileFormatError(
                f"{self.path} announces tensors that do not fit the memory; it is corrupt or too large"
            ) from error

    def _open_blob(self, dtype: str, shape: list[int], data_offsets: list[int]) -> None:
        """Read the index; everything is checked except the coded bytes of each entry."""
        path, (begin, end) = self.path, (self._start + offset for offset in data_offsets)
        if dtype != "U8" or len(shape) != 1 or end - begin < 6:
            raise FileFormatError(f"{path} is corrupt: its entry {BLOB!r} is not a list of bytes")
        self._file.seek(begin)
        reader = ByteReader(self._file.read(min(32, end - begin)))
        version = reader.take(1)[0]
        if version > FORMAT_VERSION:
            raise FileFormatError(
                f"{path} has format version {version}, known are versions up to {FORMAT_VERSION}; update efficientdnns"
            )
        expected = int.from_bytes(reader.take(4), "little")
        self._file.seek(begin + 5)
        if version < 1 or checksum(self._file, end - begin - 5) != expected:
            raise FileFormatError(
                f"{path} is corrupt: the checksum of its coded tensors does not match; copy or download it again"
            )
        length = reader.varint(_MAX_INDEX)
        position = begin + reader.position + length
        self._file.seek(begin + reader.position)
        entries, self.ties = self._index(self._file.read(length))
        if position + sum(entry.length for entry in entries) != end:
            raise FileFormatError(
                f"{path} is corrupt: the lengths in its index do not add up to its {end - position} coded bytes"
            )
        for entry in entries:
            self._coded[entry.name] = entry, position
            position += entry.length

    def _index(self, packed: bytes) -> tuple[list[_Entry], dict[str, str]]:
        try:
            unpacker = zlib.decompressobj(-15, zdict=DICTIONARY)
            text = unpacker.decompress(packed, _MAX_INDEX)
            if not unpacker.eof:
                raise ValueError("it is cut off")
            items = json.loads(text)
            ties = {str(name): str(other) for name, other in (item for item in items if len(item) == 2)}
            return [_entry(*item) for item in items if len(item) != 2], ties
        except (zlib.error, ValueError, TypeError, KeyError, RecursionError) as error:
            raise FileFormatError(f"{self.path} is corrupt: its index cannot be read ({error})") from error


def checksum(file: IO[bytes], size: int, value: int = 0) -> int:
    """CRC-32 of the next ``size`` bytes of a file, going on from ``value``."""
    while size > 0 and (chunk := file.read(min(size, CHUNK))):
        value, size = zlib.crc32(chunk, value), size - len(chunk)
    return value


def _entry(
    name: str, codec: str, dtype: str, shape: list[int], length: int, parameters: dict[str, Any] | None = None
) -> _Entry:
    sizes = [*shape, length]
    if not all(isinstance(size, int) and 0 <= size < 2**48 for size in sizes) or math.prod(shape) >= 2**48:
        raise ValueError(f"tensor {name!r} has impossible sizes")
    if dtype not in DTYPES or not isinstance(codec, str) or not isinstance(name, str):
        raise ValueError(f"tensor {name!r} has an unknown dtype or codec")
    return _Entry(name, codec, dtype, tuple(shape), length, dict(parameters or {}))
