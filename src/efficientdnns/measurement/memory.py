"""Peak memory of one forward pass, counted from the tensors that are alive rather than read from the process."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from efficientdnns.measurement.inference import Forward, call, device_of, to_device
from efficientdnns.measurement.watch import Watch, watching


def peak_memory(model: nn.Module, example_inputs: Any, forward: Forward | None = None) -> int:
    """Return the bytes of live tensors at the worst moment of one forward pass in evaluation mode.

    Counted: parameters, buffers, inputs and every activation from the operation that makes it until nothing refers to
    it, views and in-place results once (by storage). Not counted: scratch space inside a kernel, the allocator's
    rounding, the Python process. The figure is exact for given shapes and does not depend on the machine's load.

    Args:
        model: any network; training flags and random state are restored.
        example_inputs: what the network is called with, with the batch size that the figure is for.
        forward: ``forward(model, inputs)`` where calling the model is not enough.
    """
    inputs = to_device(example_inputs, device_of(model))
    ledger = _Ledger()
    for tensor in (*model.parameters(), *model.buffers(), *tree_leaves(inputs)):
        ledger.add(tensor)
    with watching(model, ledger):
        (forward or call)(model, inputs)
    return ledger.peak


class _Ledger(Watch):
    """The storages alive, by identity, with their bytes; a storage leaves when its last tensor is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.references: dict[int, weakref.ref[Any]] = {}
        self.alive = 0
        self.peak = 0

    def add(self, value: Any) -> None:
        """Enter the storage of a tensor, or the new size of one that was resized; anything else is ignored."""
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return
        storage = value.untyped_storage()
        key = id(storage)
        if key not in self.bytes:
            self.references[key] = weakref.ref(storage, lambda _: self._remove(key))
        self.alive += storage.nbytes() - self.bytes.get(key, 0)
        self.bytes[key] = storage.nbytes()
        self.peak = max(self.peak, self.alive)

    def _remove(self, key: int) -> None:
        self.alive -= self.bytes.pop(key)
        del self.references[key]

    def seen(self, operation: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for leaf in tree_leaves(output):
            self.add(leaf)
