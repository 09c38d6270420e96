"""Networks that share memory: copies of a structure whose tensors are the original's, or have no values at all.

A copy of a billion parameters costs 4 GB; a copy of the structure costs nothing. `share` is what `compress` works on
until something wants to write, which is when `unshare` gives the network tensors of its own, one at a time.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

LARGE = 10_000_000
"""Parameters from which on it pays to look for memory that nothing uses any more."""


def share(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are new tensors on the same memory.

    Modules, flags and attributes may be changed on either side, and so may ``parameter.data`` be replaced; what is
    written into a tensor is seen by both.
    """
    return _copied(model, lambda tensor: tensor.detach())


def unshare(model: nn.Module, other: nn.Module) -> None:
    """Give ``model`` (in place) memory of its own for every tensor that lies on memory of ``other``."""
    taken = {_address(tensor) for tensor in _tensors(other)}
    for tensor in _tensors(model):
        if tensor.numel() and _address(tensor) in taken:
            tensor.data = tensor.data.clone()


def hollow(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and persistent buffers have shape and type but no values (device meta)."""
    hidden = {id(buffer) for module in model.modules() for buffer in _hidden(module)}
    return _copied(model, lambda tensor: tensor.clone() if id(tensor) in hidden else tensor.detach().to("meta"))


def build_hollow(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build()`` returns, with parameters and persistent buffers that have no values and take no memory.

    Each loses its values when its module registers it. A network whose constructor computes with them is built in full.
    """
    try:
        with _without_values():
            model = build()
    except Exception:  # whatever foreign code raises when a value is not there; what is really wrong comes again
        return build()
    rest = [value for module in model.modules() for value in (*_hidden(module), *vars(module).values())]
    return build() if any(isinstance(value, Tensor) and value.is_meta for value in rest) else model


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Let the tensors of ``state`` be those of ``model`` (no copy), keeping ties; returns missing and unexpected names.

    Raises RuntimeError for shapes that do not fit.
    """
    ties: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                ties.setdefault(id(parameter), []).append((module, name))
    missing, unexpected = model.load_state_dict(dict(state), strict=False, assign=True)
    for (first, name), *others in ties.values():
        for module, other in others:
            setattr(module, other, first._parameters[name])
    return missing, unexpected


def trim(garbage_of: nn.Module | None = None) -> None:
    """Give freed memory back to the system, where the C library would keep it for later (glibc).

    Between two large layers that is the difference between the memory of one layer and that of all of them. The garbage
    collector runs first if the network whose copies may be garbage, ``garbage_of``, is worth the tenths of a second.
    """
    if garbage_of is not None and sum(tensor.numel() for tensor in _tensors(garbage_of)) > LARGE:
        gc.collect()
    if (release := _of_glibc("malloc_trim")) is not None:
        release(0)


@contextmanager
def lean(model: nn.Module) -> Iterator[None]:
    """Within, tensors of a megabyte and more go back to the system when they are freed, where ``model`` is `LARGE` (glibc).

    The C library would keep up to 32 MB of each kind for later, which adds up where layers of many sizes are replaced in
    turn. Memory that comes from the system every time costs time in return, so loops that run a network over and over
    suspend it with `keeping_memory`.
    """
    if sum(tensor.numel() for tensor in _tensors(model)) <= LARGE:
        yield
        return
    with _from_the_system(_LEAN):
        yield
    trim()


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Within, freed memory is kept for the next tensors again, inside of `lean`."""
    if not _thresholds:
        yield
        return
    with _from_the_system(_USUAL):
        yield


_LEAN, _USUAL = 1 << 20, 32 << 20
"""Bytes from which on the system is asked: glibc's own limit moves up to 32 MB by itself, and then twice that may stay free at
the end of its heap."""
_thresholds: list[int] = []
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1


@contextmanager
def _from_the_system(size: int) -> Iterator[None]:
    _thresholds.append(size)
    _set_threshold(size)
    try:
        yield
    finally:
        _thresholds.pop()
        _set_threshold(_thresholds[-1] if _thresholds else _USUAL)


def _set_threshold(size: int) -> None:
    if (set_option := _of_glibc("mallopt")) is not None:
        set_option(_MMAP_THRESHOLD, size)
        set_option(_TRIM_THRESHOLD, 2 * size)


@cache
def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _copied(model: nn.Module, alias: Callable[[Tensor], Tensor]) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        new = alias(tensor)
        if isinstance(tensor, nn.Parameter):
            new = torch.Tensor._make_subclass(type(tensor), new, tensor.requires_grad)
            new.__dict__.update(tensor.__dict__)
        memo[id(tensor)] = new
    return copy.deepcopy(model, memo)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer object once."""
    found = {id(t): t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values())}
    return [tensor for tensor in found.values() if tensor is not None]


def _hidden(module: nn.Module) -> Iterator[Tensor]:
    """Buffers that are not in the state dict."""
    for name in module._non_persistent_buffers_set:
        buffer = module._buffers.get(name)
        if buffer is not None:
            yield buffer


def _address(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


@contextmanager
def _without_values() -> Iterator[None]:
    register_parameter, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer

    def parameter(self: nn.Module, name: str, value: nn.Parameter | None) -> None:
        register_parameter(self, name, value)
        if value is not None and not value.is_meta:
            if value not in hollowed:  # registered twice it stays one parameter
                hollowed[value] = nn.Parameter(value.detach().to("meta"), value.requires_grad)
            self._parameters[name] = hollowed[value]

    def buffer(self: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        register_buffer(self, name, tensor, persistent)
        if tensor is not None and persistent:
            self._buffers[name] = tensor.to("meta")

    hollowed: Any = WeakIdKeyDictionary()
    nn.Module.register_parameter = parameter  # type: ignore[method-assign, assignment]
    nn.Module.register_buffer = buffer  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.register_buffer = register_parameter, register_buffer  # type: ignore[method-assign]
