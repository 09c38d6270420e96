"""Where weights, multiply-accumulates and bytes lie: the figures of a profile, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from efficientdnns.coding.reader import TensorInfo
from efficientdnns.measurement.size import CountsParameters, parts


class LayerSize(BaseModel):
    """One layer: a module that holds weights itself, or in which multiply-accumulates run. Layers add up to the network."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Path of the module; ``""`` is the network itself."""
    kind: str
    """Class of the module."""
    params: int = 0
    """Weights; shared ones count where they are met first."""
    nonzero_params: int = 0
    macs: int = 0
    """Multiply-accumulates of one sample that run in the module, not in a layer below it."""
    bytes: int = 0
    """Coded length of its tensors in the weights file, without the file's headers."""

    @property
    def bits(self) -> float | None:
        """Bits that a weight takes in the file, zeros included; None without weights."""
        return 8 * self.bytes / self.params if self.params else None

    @property
    def sparsity(self) -> float | None:
        """Share of the weights that are zero; None without weights."""
        return 1 - self.nonzero_params / self.params if self.params else None


def layer_sizes(model: nn.Module, macs: Mapping[str, int], tensors: Iterable[TensorInfo]) -> list[LayerSize]:
    """Every layer of ``model``, in the order of its modules.

    A module that counts its own weights is one layer with all that lies below it.

    Args:
        macs: multiply-accumulates by module (`MacCount.by_module`).
        tensors: the tensors of the network's file, named as in its state dict.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    found: dict[str, dict[str, int]] = {}
    whole: list[str] = []

    def add(name: str, **amounts: int) -> None:
        name = next((outer for outer in whole if name == outer or name.startswith(f"{outer}." if outer else "")), name)
        entry = found.setdefault(name, {})
        for key, amount in amounts.items():
            entry[key] = entry.get(key, 0) + amount

    for owner, part in parts(model):
        if isinstance(part, CountsParameters):
            total, nonzero = part.count_parameters()
            whole.append(names[id(owner)])
        else:
            total, nonzero = part.numel(), int(torch.count_nonzero(part.detach()))
        add(names[id(owner)], params=total, nonzero_params=nonzero)
    for name, count in macs.items():
        if count:
            add(name, macs=count)
    for tensor in tensors:
        owner_name = tensor.name.rpartition(".")[0]
        while owner_name not in modules:  # a state dict that names its tensors in its own way
            owner_name = owner_name.rpartition(".")[0]
        if tensor.bytes:
            add(owner_name, bytes=tensor.bytes)
    order = {name: position for position, name in enumerate(modules)}
    return [
        LayerSize(name=name, kind=type(modules[name]).__name__, **found[name])
        for name in sorted(found, key=lambda name: order.get(name, -1))
    ]
