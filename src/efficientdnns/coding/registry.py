"""What a codec is, and the codecs that are known by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ..errors import ConfigurationError, suggest
from .patterns import Shape, plausible_size

Parameters: TypeAlias = dict[str, Any]


@runtime_checkable
class Codec(Protocol):
    """A lossless way to store a tensor. ``decode(*encode(tensor), shape, dtype)`` must equal the tensor bit for bit.

    ``name`` is written to the file and finds the codec again at loading; ``parameters`` (JSON values) are written
    beside it, an empty dictionary costs nothing. ``decode`` must raise FileFormatError for bytes that it cannot have
    written.
    """

    @property
    def name(self) -> str: ...

    def suits(self, tensor: Tensor) -> bool:
        """Say quickly whether encoding this tensor is possible and worth trying."""
        ...

    def encode(self, tensor: Tensor) -> tuple[bytes, Parameters]: ...

    def decode(self, data: bytes, parameters: Parameters, shape: Shape, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class Encoded:
    """A tensor as the bytes of one codec. As a choice for ``save_weights`` it means: store exactly these bytes."""

    codec: str
    data: bytes
    parameters: Parameters = field(default_factory=dict)


_REGISTRY: dict[str, Codec] = {}


def register_codec(codec: Codec) -> Codec:
    """Make ``codec`` known under its name, to ``save_weights`` and to loading; a name can be taken once. Returns the
    codec.
    """
    if codec.name in _REGISTRY and type(_REGISTRY[codec.name]) is not type(codec):
        raise ConfigurationError(f"a codec named {codec.name!r} is registered already; choose another name")
    _REGISTRY[codec.name] = codec
    return codec


def codec_named(name: str) -> Codec:
    """Return the registered codec of this name; ConfigurationError if there is none."""
    if name not in _REGISTRY:
        raise ConfigurationError(f"unknown codec {name!r}{suggest(name, _REGISTRY)}")
    return _REGISTRY[name]


def encode(tensor: Tensor, codec: str | Codec) -> Encoded:
    """Encode ``tensor`` with one codec, given by name or as an object (whose name must be registered for loading)."""
    chosen = codec_named(codec) if isinstance(codec, str) else codec
    codec_named(chosen.name)
    data, parameters = chosen.encode(tensor)
    if chosen.name != "raw" and not plausible_size(data, tensor.shape):
        raise ConfigurationError(
            f"{list(tensor.shape)} elements in {len(data)} bytes is more than a reader accepts; use 'raw'"
        )
    return Encoded(chosen.name, data, parameters)
