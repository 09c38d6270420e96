"""What an item of a data set or a batch of a loader is: inputs and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

TARGET_KEYS = ("targets", "target", "labels", "label")


def pair(item: Any) -> tuple[Any, Any | None]:
    """(inputs, targets) of an item or a collated batch."""
    if isinstance(item, Mapping):
        for key in TARGET_KEYS:
            if key in item:
                return {k: v for k, v in item.items() if k != key}, item[key]
        return dict(item), None
    if isinstance(item, tuple | list):
        return (item[0], None) if len(item) == 1 else (_one(item[:-1]), item[-1])
    return item, None


def as_batch(item: Any, collate: Any) -> tuple[Any, Any | None]:
    """(inputs, targets) of a collated batch; the lists that torch makes of tuples are tuples again."""
    inputs, targets = pair(item)
    if collate is default_collate and isinstance(inputs, list) and all(isinstance(part, Tensor) for part in inputs):
        inputs = tuple(inputs)
    return inputs, targets


def collate_lists(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """A batch whose samples stay apart: the list of inputs and the list of targets."""
    inputs, targets = zip(*map(pair, items))
    return list(inputs), list(targets)


def _one(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)
