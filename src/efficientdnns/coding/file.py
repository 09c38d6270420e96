"""The weights file of a result: one safetensors file, in which coded tensors share one array of bytes.

Layout. A tensor that is stored raw is an ordinary safetensors entry, which every safetensors reader can load. All
others are kept in one uint8 entry named ``efficientdnns``: a version byte, the CRC-32 of what follows, the length of
the index, the index, and the coded tensors one after the other. The index is JSON, deflated: per tensor its name,
codec, dtype, shape, length in bytes and, if any, the codec's parameters. In a file that holds coded tensors, raw
tensors of at most 1 KiB are kept there, too, because a safetensors entry of its own costs some 75 bytes. Tied tensors
are stored once. A file without coded or tied tensors is plain safetensors; so is one
whose coded tensors would save less than 2 % of all bytes, unless codecs were asked for.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import ConfigurationError, FileFormatError, suggest
from .bits import ByteReader, write_varint
from .codecs import best
from .patterns import element_bits, tensor_of_bits
from .registry import Codec, Encoded, codec_named, encode

CodecChoice: TypeAlias = str | Codec | Encoded | Sequence[str | Codec]
"""A codec's name or object, bytes that are encoded already, or candidates of which the smallest is taken."""

BLOB = "efficientdnns"
FORMAT_VERSION = 1
_SMALL = 1024
_LEAST_SAVING = 0.02
_MAX_INDEX = 1 << 28
_DTYPES: dict[str, torch.dtype] = {
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# what the index is likely to contain, the most frequent last; changing it changes the format
_DICTIONARY = (
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


def merge_zeros(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with every ``-0.0`` replaced by ``+0.0``; tensors without one, and ties, stay as they are.

    Multiplying weights by a mask leaves ``-0.0`` in place of negative ones. To a bit-exact file these are values like
    any others, which cost about one bit per pruned weight.
    """
    merged: dict[Any, Tensor] = {}
    for tensor in state.values():
        key = _memory(tensor)
        if tensor.is_floating_point() and key not in merged:
            bits = element_bits(tensor)
            negative = bits == 1 << (8 * tensor.element_size() - 1)
            if negative.any():
                positive = tensor_of_bits(
                    np.where(negative, bits.dtype.type(0), bits), tuple(tensor.shape), tensor.dtype
                )
                merged[key] = positive.to(tensor.device)
    return {name: merged.get(_memory(tensor), tensor) for name, tensor in state.items()}


def save_weights(path: str | Path, state: Mapping[str, Tensor], codecs: Mapping[str, CodecChoice] | None = None) -> int:
    """Write ``state`` to ``path`` and return the size of the file in bytes.

    ``codecs``: choice per tensor name, with "*" for all the others; without a choice, :func:`efficientdnns.coding.best`
    decides. The file is written beside ``path``, read back, compared with ``state`` bit for bit, and only then put in
    place.

    Raises ConfigurationError for a name or choice that does not fit the state, or for a codec that did not return the
    same tensor.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigurationError(f"there is no folder {path.parent} to write {path.name} to; create it first")
    content = _serialize(state, codecs or {})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        _compare(state, load_weights(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def weights_size(state: Mapping[str, Tensor], codecs: Mapping[str, CodecChoice] | None = None) -> int:
    """Return the size in bytes of the file that :func:`save_weights` would write: it is written to a temporary folder
    and decoded.
    """
    with tempfile.TemporaryDirectory() as folder:
        return save_weights(Path(folder) / "model.safetensors", state, codecs)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Load a file of :func:`save_weights`, or any safetensors file. Tied tensors come back as one tensor under several
    names.

    Raises FileFormatError if the file is missing, truncated, corrupt, or written by a newer version.
    """
    tensors = _read_safetensors(path)
    blob = tensors.pop(BLOB, None)
    if blob is None:
        return tensors
    try:
        entries, ties, data = _open_blob(blob, path)
        position = 0
        for entry in entries:
            codec = codec_named(entry.codec)
            chunk = data[position : position + entry.length]
            position += entry.length
            tensors[entry.name] = codec.decode(chunk, entry.parameters, entry.shape, _DTYPES[entry.dtype])
    except ConfigurationError as error:
        raise FileFormatError(f"{path} uses a codec that is not loaded: {error}") from error
    except MemoryError as error:
        raise FileFormatError(
            f"{path} announces tensors that do not fit the memory; it is corrupt or too large"
        ) from error
    for name, other in ties.items():
        if other not in tensors:
            raise FileFormatError(f"{path} is corrupt: tensor {name!r} is tied to {other!r}, which is missing")
        tensors[name] = tensors[other]
    return tensors


def describe_weights(path: str | Path) -> list[TensorInfo]:
    """Return name, shape, dtype, codec and bytes of every tensor of a weights file, by name, without decoding the coded
    ones.
    """
    tensors = _read_safetensors(path)
    blob = tensors.pop(BLOB, None)
    infos = {
        name: TensorInfo(name, tuple(t.shape), _NAMES.get(t.dtype, str(t.dtype)), "raw", t.numel() * t.element_size())
        for name, t in tensors.items()
    }
    if blob is not None:
        entries, ties, _ = _open_blob(blob, path)
        for entry in entries:
            infos[entry.name] = TensorInfo(entry.name, entry.shape, entry.dtype, entry.codec, entry.length)
        for name, other in ties.items():
            if other not in infos:
                raise FileFormatError(f"{path} is corrupt: tensor {name!r} is tied to {other!r}, which is missing")
            infos[name] = TensorInfo(name, infos[other].shape, infos[other].dtype, f"same as {other}", 0)
    return [infos[name] for name in sorted(infos)]


def _choose(name: str, tensor: Tensor, codecs: Mapping[str, CodecChoice]) -> Encoded:
    choice = codecs.get(name, codecs.get("*"))
    if choice is None:
        return best(tensor)
    if isinstance(choice, Encoded):
        codec_named(choice.codec)
        return choice
    if isinstance(choice, str) or not isinstance(choice, Sequence):
        return encode(tensor, choice)
    return best(tensor, choice)


def _serialize(state: Mapping[str, Tensor], codecs: Mapping[str, CodecChoice]) -> bytes:
    for name in codecs:
        if name != "*" and name not in state:
            raise ConfigurationError(
                f"a codec is given for tensor {name!r}, which is not in the state{suggest(name, state)}"
            )
    ties = _ties(state)
    plain: dict[str, Tensor] = {}
    coded: dict[str, Encoded] = {}
    for name, tensor in state.items():
        if name == BLOB or tensor.dtype not in _NAMES:
            raise ConfigurationError(f"cannot store tensor {name!r} of {tensor.dtype}; rename it or convert it")
        if name in ties:
            continue
        encoded = _choose(name, tensor, codecs)
        if encoded.codec == "raw":
            plain[name] = tensor
        else:
            coded[name] = encoded
    if not codecs and not _worthwhile(coded, state):
        plain, coded = {name: tensor for name, tensor in state.items() if name not in ties}, {}
    if coded or ties:
        for name, tensor in list(plain.items()):
            if tensor.numel() * tensor.element_size() <= _SMALL:
                coded[name] = encode(plain.pop(name), "raw")
        index: list[list[Any]] = []
        for name, encoded in coded.items():
            entry = [name, encoded.codec, _NAMES[state[name].dtype], list(state[name].shape), len(encoded.data)]
            index.append([*entry, encoded.parameters] if encoded.parameters else entry)
        index.extend([name, other] for name, other in ties.items())
        plain[BLOB] = torch.frombuffer(bytearray(_blob(index, [e.data for e in coded.values()])), dtype=torch.uint8)
    separate = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in plain.items()}
    return safetensors.torch.save(separate)


def _worthwhile(coded: Mapping[str, Encoded], state: Mapping[str, Tensor]) -> bool:
    """Say whether coding saves enough to give up a file that every safetensors reader understands."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    saved = sum(state[name].numel() * state[name].element_size() - len(e.data) for name, e in coded.items())
    return saved > _LEAST_SAVING * total


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map every tensor that shares all its memory with an earlier one of the same form to that one."""
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in state.items():
        if tensor.numel() == 0 or tensor.layout != torch.strided or tensor.is_meta:
            continue
        key = _memory(tensor)
        if first.setdefault(key, name) != name:
            ties[name] = first[key]
    return ties


def _blob(index: list[list[Any]], parts: list[bytes]) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=_DICTIONARY)
    packed = packer.compress(json.dumps(index, separators=(",", ":")).encode()) + packer.flush()
    body = write_varint(len(packed)) + packed + b"".join(parts)
    return bytes([FORMAT_VERSION]) + zlib.crc32(body).to_bytes(4, "little") + body


def _open_blob(blob: Tensor, path: str | Path) -> tuple[list[_Entry], dict[str, str], bytes]:
    """Return the entries, the ties and the coded bytes; everything is checked except the coded bytes of each entry."""
    if blob.dtype != torch.uint8 or blob.ndim != 1 or blob.numel() < 6:
        raise FileFormatError(f"{path} is corrupt: its entry {BLOB!r} is not a list of bytes")
    reader = ByteReader(blob.numpy().tobytes())
    version = reader.take(1)[0]
    if version > FORMAT_VERSION:
        raise FileFormatError(
            f"{path} has format version {version}, known are versions up to {FORMAT_VERSION}; update efficientdnns"
        )
    checksum = int.from_bytes(reader.take(4), "little")
    if version < 1 or zlib.crc32(reader.data[reader.position :]) != checksum:
        raise FileFormatError(
            f"{path} is corrupt: the checksum of its coded tensors does not match; copy or download it again"
        )
    packed = reader.take(reader.varint(_MAX_INDEX))
    try:
        unpacker = zlib.decompressobj(-15, zdict=_DICTIONARY)
        text = unpacker.decompress(packed, _MAX_INDEX)
        if not unpacker.eof:
            raise ValueError("it is cut off")
        items = json.loads(text)
        ties = {str(name): str(other) for name, other in (item for item in items if len(item) == 2)}
        entries = [_entry(*item) for item in items if len(item) != 2]
    except (zlib.error, ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(f"{path} is corrupt: its index cannot be read ({error})") from error
    data = reader.rest()
    if sum(entry.length for entry in entries) != len(data):
        raise FileFormatError(
            f"{path} is corrupt: the lengths in its index do not add up to its {len(data)} coded bytes"
        )
    return entries, ties, data


def _entry(
    name: str, codec: str, dtype: str, shape: list[int], length: int, parameters: dict[str, Any] | None = None
) -> _Entry:
    sizes = [*shape, length]
    if not all(isinstance(size, int) and 0 <= size < 2**48 for size in sizes) or math.prod(shape) >= 2**48:
        raise ValueError(f"tensor {name!r} has impossible sizes")
    if dtype not in _DTYPES or not isinstance(codec, str) or not isinstance(name, str):
        raise ValueError(f"tensor {name!r} has an unknown dtype or codec")
    return _Entry(name, codec, dtype, tuple(shape), length, dict(parameters or {}))


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    try:
        return dict(safetensors.torch.load_file(path))
    except FileNotFoundError as error:
        raise FileFormatError(f"there is no weights file {path}") from error
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise FileFormatError(f"{path} is not a readable safetensors file: {error}") from error


def _compare(state: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        other = loaded.get(name)
        same = other is not None and other.dtype == tensor.dtype and other.shape == tensor.shape
        if other is None or not same or element_bits(other).tobytes() != element_bits(tensor).tobytes():
            raise ConfigurationError(f"tensor {name!r} did not survive its codec unchanged; choose 'raw' for it")
