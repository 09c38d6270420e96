"""Weights from files, without pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efficientdnns.errors import ModelError
from efficientdnns.storage import fill

MAPPED = 1 << 28
"""Bytes of a safetensors file from which on its tensors are mapped rather than read."""


def load_weights_into(model: nn.Module, file: str | Path) -> None:
    """Fill ``model`` with the weights in ``file``: safetensors, or a torch checkpoint that holds tensors alone.

    A checkpoint may hold them under ``state_dict`` or ``model``, and their names may begin with ``module.``. Every
    tensor must have its place and its shape; only batch-norm's ``num_batches_tracked`` may be absent on either side.
    A large safetensors file is mapped: its tensors become the model's, and their pages are read when they are used
    (see `efficientdnns.coding.map_weights`). Tensors without values (device meta) are taken over too.
    Raises `ModelError`, with the model as it was, if the file cannot be read, or with the names that are missing,
    unexpected or of another shape.
    """
    path = _find(Path(file))
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}; give a .safetensors file or a torch checkpoint")
    mapped = path.suffix == ".safetensors" and path.stat().st_size >= MAPPED
    given = _without_prefix(_read(path, mapped))
    own = model.state_dict()
    missing = [name for name in own if name not in given and not _counter(name)]
    unexpected = [name for name in given if name not in own and not _counter(name)]
    reshaped = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    faults = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    listed = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for what, names in faults if names
    ]
    if listed:
        raise ModelError(f"{path} does not fit the model: {'; '.join(listed)}; give the weights of this architecture")
    absent = {
        name: torch.zeros_like(own[name], device="cpu") for name in own if name not in given and own[name].is_meta
    }
    state = own | absent | {name: value for name, value in given.items() if name in own}
    if mapped or any(value.is_meta for value in own.values()):
        fill(model, {name: value.to(own[name].dtype) for name, value in state.items()})
    else:
        model.load_state_dict(state)


def _find(path: Path) -> Path:
    """The file itself, or one of this name in the folder ``models`` in or beside ``EFFICIENTDNNS_DATA``."""
    data = os.environ.get("EFFICIENTDNNS_DATA")
    if path.is_file() or not data or path.is_absolute():
        return path
    places = (Path(data) / "models" / path, Path(data).parent / "models" / path)
    return next((place for place in places if place.is_file()), path)


def _read(path: Path, mapped: bool) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from efficientdnns.coding import load_weights, map_weights

        return map_weights(path) if mapped else load_weights(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes the restricted reader raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        reason = "it holds more than tensors" if "weights_only" in str(error).lower() else reason
        raise ModelError(
            f"{path} is no checkpoint of tensors ({reason}); save model.state_dict(), or safetensors"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} holds no state dict (names to tensors); save model.state_dict() and load that")
    return dict(content)


def _without_prefix(weights: dict[str, Any]) -> dict[str, Tensor]:
    if weights and all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): value for name, value in weights.items()}
    return weights


def _counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")
