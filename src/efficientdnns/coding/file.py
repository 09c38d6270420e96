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
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError, suggest
from ..storage import trim
from .bits import write_varint
from .codecs import best
from .patterns import element_bits, tensor_of_bits
from .reader import BLOB, CHUNK, DICTIONARY, FORMAT_VERSION, NAMES, TensorInfo, WeightsFile, checksum
from .registry import Codec, Encoded, codec_named, encode

CodecChoice: TypeAlias = str | Codec | Encoded | Sequence[str | Codec]
"""A codec's name or object, bytes that are encoded already, or candidates of which the smallest is taken."""

_SMALL = 1024
_LEAST_SAVING = 0.02


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
    place: all of it one tensor at a time, so that memory holds no second copy of the state.

    Raises ConfigurationError for a name or choice that does not fit the state, or for a codec that did not return the
    same tensor.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigurationError(f"there is no folder {path.parent} to write {path.name} to; create it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            _write(file, state, codecs or {})
        trim()
        _compare(state, temporary)
        trim()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def weights_size(state: Mapping[str, Tensor], codecs: Mapping[str, CodecChoice] | None = None) -> int:
    """Return the size in bytes of the file that :func:`save_weights` would write: it is written to a temporary folder
    and decoded.
    """
    return weights_layout(state, codecs)[0]


def weights_layout(
    state: Mapping[str, Tensor], codecs: Mapping[str, CodecChoice] | None = None
) -> tuple[int, list[TensorInfo]]:
    """Like :func:`weights_size`, with what :func:`describe_weights` says of that file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        return save_weights(path, state, codecs), describe_weights(path)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Load a file of :func:`save_weights`, or any safetensors file. Tied tensors come back as one tensor under several
    names.

    Raises FileFormatError if the file is missing, truncated, corrupt, or written by a newer version.
    """
    with WeightsFile(path) as file:
        tensors = {name: file.tensor(name) for name in file.names}
        return tensors | {name: tensors[other] for name, other in file.ties.items()}


def map_weights(path: str | Path) -> dict[str, Tensor]:
    """Like :func:`load_weights`, but tensors that are stored raw stay in the file until they are read.

    They are private to the process (writing changes memory, never the file), and their pages are the first that the
    system takes back where memory is short. Do not overwrite or truncate the file while they are in use; replacing it
    is harmless.
    """
    with WeightsFile(path) as file:
        tensors = file.mapped()
        tensors |= {name: file.tensor(name) for name in file.names if name not in tensors}
        return tensors | {name: tensors[other] for name, other in file.ties.items()}


def describe_weights(path: str | Path) -> list[TensorInfo]:
    """Return name, shape, dtype, codec and bytes of every tensor of a weights file, by name, without decoding the coded
    ones.
    """
    with WeightsFile(path) as file:
        infos = {name: file.info(name) for name in file.names}
    for name, other in file.ties.items():
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


def _write(file: IO[bytes], state: Mapping[str, Tensor], codecs: Mapping[str, CodecChoice]) -> None:
    """Write the whole file. Coded bytes wait in a temporary file until their number is known."""
    for name in codecs:
        if name != "*" and name not in state:
            raise ConfigurationError(
                f"a codec is given for tensor {name!r}, which is not in the state{suggest(name, state)}"
            )
    ties = _ties(state)
    plain: list[str] = []
    index: list[list[Any]] = []
    with tempfile.TemporaryFile() as parts:

        def add(name: str, encoded: Encoded) -> None:
            entry = [name, encoded.codec, NAMES[state[name].dtype], list(state[name].shape), len(encoded.data)]
            index.append([*entry, encoded.parameters] if encoded.parameters else entry)
            parts.write(encoded.data)

        for name, tensor in state.items():
            if name == BLOB or tensor.dtype not in NAMES:
                raise ConfigurationError(f"cannot store tensor {name!r} of {tensor.dtype}; rename it or convert it")
            if name in ties:
                continue
            encoded = _choose(name, tensor, codecs)
            if encoded.codec == "raw":
                plain.append(name)
            else:
                add(name, encoded)
        if not codecs and not _worthwhile(index, state):
            plain, index = [name for name in state if name not in ties], []
            parts.seek(0)
            parts.truncate()
        if index or ties:
            for name in [name for name in plain if _bytes(state[name]) <= _SMALL]:
                plain.remove(name)
                add(name, encode(state[name], "raw"))
            index.extend([name, other] for name, other in ties.items())
        write_safetensors(file, {name: state[name] for name in plain}, _head(index, parts) if index else b"", parts)


def write_safetensors(
    file: IO[bytes], tensors: Mapping[str, Tensor], head: bytes = b"", parts: IO[bytes] | None = None
) -> None:
    """Write a safetensors file tensor by tensor. ``head`` and ``parts`` make the entry of coded tensors."""
    # The order of the safetensors library: wide types first, so that every tensor is aligned to its type.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        begin, end = end, end + _bytes(tensors[name])
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    if head:
        assert parts is not None
        size = len(head) + parts.seek(0, os.SEEK_END)
        header[BLOB] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(element_bits(tensors[name]).view(np.uint8).data)
    if head:
        assert parts is not None
        file.write(head)
        parts.seek(0)
        shutil.copyfileobj(parts, file, CHUNK)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _worthwhile(index: Sequence[Sequence[Any]], state: Mapping[str, Tensor]) -> bool:
    """Say whether coding saves enough to give up a file that every safetensors reader understands."""
    saved = sum(_bytes(state[entry[0]]) - entry[4] for entry in index)
    return bool(saved > _LEAST_SAVING * sum(_bytes(tensor) for tensor in state.values()))


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


def _head(index: list[list[Any]], parts: IO[bytes]) -> bytes:
    """What stands before the coded tensors: version, checksum, index."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
    packed = packer.compress(json.dumps(index, separators=(",", ":")).encode()) + packer.flush()
    body = write_varint(len(packed)) + packed
    size = parts.seek(0, os.SEEK_END)
    parts.seek(0)
    return bytes([FORMAT_VERSION]) + checksum(parts, size, zlib.crc32(body)).to_bytes(4, "little") + body


def _compare(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ConfigurationError where the file does not hold ``state`` bit for bit."""
    with WeightsFile(path) as file:
        for name, tensor in state.items():
            if name in file.ties and _memory(tensor) == _memory(state[file.ties[name]]):
                continue
            other = file.tensor(name) if name in file.names else None
            same = other is not None and other.dtype == tensor.dtype and other.shape == tensor.shape
            if other is None or not same or not np.array_equal(element_bits(other), element_bits(tensor)):
                raise ConfigurationError(f"tensor {name!r} did not survive its codec unchanged; choose 'raw' for it")
