"""Trees of tensors and plain values on disk, without pickle and written atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from efficientdnns.errors import FileFormatError


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings, booleans and None to one safetensors file."""
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_take_apart(state, tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata={"state": skeleton})
    os.replace(partial, path)


def load_state(path: Path) -> Any:
    """Read back exactly what `save_state` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = (file.metadata() or {})["state"]
            return _put_together(json.loads(skeleton), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise FileFormatError(
            f"{path} is not a checkpoint of this library ({error}); delete it and run again"
        ) from None


def _take_apart(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        key = str(len(tensors))
        # Views and shared storages must not meet in one file.
        tensors[key] = node.detach().cpu().clone().contiguous()
        return {"tensor": key}
    if isinstance(node, dict):
        return {"items": [[_take_apart(k, tensors), _take_apart(v, tensors)] for k, v in node.items()]}
    if isinstance(node, list):
        return {"list": [_take_apart(v, tensors) for v in node]}
    if isinstance(node, tuple):
        return {"tuple": [_take_apart(v, tensors) for v in node]}
    if isinstance(node, bool | int | float | str | None):
        return node
    raise TypeError(f"a checkpoint holds tensors, numbers, strings and containers, not {type(node).__name__}")


def _put_together(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "items":
        return {_put_together(k, tensors): _put_together(v, tensors) for k, v in value}
    parts = [_put_together(v, tensors) for v in value]
    return tuple(parts) if kind == "tuple" else parts


def random_state() -> dict[str, Tensor]:
    """The state of the global generators of this process."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Undo whatever was drawn since `random_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
