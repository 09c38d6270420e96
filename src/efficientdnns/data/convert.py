"""From what the user has to a split, and from one split to two."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from efficientdnns.data.split import Augment, DatasetSplit, LoaderSplit, Prepare, Split, TensorSplit, generator
from efficientdnns.errors import DataError


def as_split(
    data: Any,
    name: str,
    *,
    num_workers: int = 0,
    prepare: Prepare | None = None,
    augment: Augment | None = None,
) -> Split:
    """A `Split` of what the user has: a split, a loader, a data set, a tensor or array, or ``(inputs, targets)``.

    A ``TensorDataset`` becomes a `TensorSplit`; a list of images with a list of dictionaries (``boxes``, ``labels``)
    becomes a `DatasetSplit`. The options hold where the split is made here.
    """
    if isinstance(data, Split):
        return data
    if isinstance(data, DataLoader):
        return LoaderSplit(data, name=name)
    if isinstance(data, TensorDataset):
        *inputs, last = data.tensors
        data = (last,) if not inputs else (inputs[0] if len(inputs) == 1 else tuple(inputs), last)
    elif isinstance(data, Tensor | np.ndarray):
        data = (data,)
    if isinstance(data, tuple | list) and len(data) == 2 and _each_a_mapping(data[1]):
        if len(data[0]) != len(data[1]):
            raise DataError(
                f"the {name} split has {len(data[0])} inputs but {len(data[1])} targets; expected one for each"
            )
        data = list(zip(*data))
        return DatasetSplit(data, name=name, num_workers=num_workers, prepare=prepare, augment=augment)
    if isinstance(data, tuple | list) and 1 <= len(data) <= 2 and not isinstance(data[0], Dataset | DataLoader):
        return TensorSplit(*data, name=name, prepare=prepare, augment=augment)
    if isinstance(data, Dataset):
        return DatasetSplit(data, name=name, num_workers=num_workers, prepare=prepare, augment=augment)
    raise DataError(
        f"the {name} split is a {type(data).__name__}; "
        "expected tensors (inputs, targets), a torch Dataset, a DataLoader or a Split"
    )


def _each_a_mapping(targets: Any) -> bool:
    return isinstance(targets, list) and len(targets) > 0 and all(isinstance(target, Mapping) for target in targets)


def carve(
    split: Split, share: float, *, most: int = 5000, seed: int = 0, name: str = "calibration"
) -> tuple[Split, Split]:
    """Cut ``min(share, most)`` samples out of ``split`` at random; returns (the rest, the samples cut out).

    The choice depends on ``seed`` and the split's length alone; both parts keep the order of the split.
    """
    count = min(int(share * len(split)), most)
    order = torch.randperm(len(split), generator=generator(seed, len(split)))
    kept, cut = split.subset(order[count:].sort().values), copy.copy(split.subset(order[:count].sort().values))
    cut.name = name
    return kept, cut
