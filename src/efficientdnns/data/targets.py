"""Whether the targets of a split fit the kind of task, and the number of classes that they tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from efficientdnns.data.segmentation import IGNORED
from efficientdnns.data.split import DatasetSplit, Split, TensorSplit
from efficientdnns.errors import DataError


def count_classes(kind: str, split: Split) -> int | None:
    """Classes of a split where its kind has classes and the data tells; in detection label 0, the background, counts."""
    if kind in ("classification", "language-modelling"):
        return split.classes()
    if kind == "segmentation" and isinstance(split, TensorSplit) and isinstance(split.targets, Tensor):
        labels = split.targets[split.targets != IGNORED]
        return int(labels.max()) + 1 if len(labels) else None
    if kind == "detection" and isinstance(split, DatasetSplit) and isinstance(split.dataset, list):
        return max((int(t["labels"].max()) + 1 for _, t in split.dataset if len(t["labels"])), default=None)
    return split.classes() if kind == "segmentation" else None


def check_targets(kind: str, split: Split, num_classes: int | None) -> None:
    """Raise `DataError` for targets that do not fit; data that is read only when needed is checked by its first item."""
    if not split.has_labels:
        return
    if kind == "detection":
        if isinstance(split, DatasetSplit):
            _check_boxes(split, split.take([0]).targets)
        return
    if kind not in ("classification", "segmentation") or not isinstance(split, TensorSplit):
        return
    targets: Any = split.targets
    if kind == "segmentation":
        _check_masks(split, targets)
    elif not isinstance(targets, Tensor) or (targets.is_floating_point() and targets.dim() < 2):
        raise DataError(f"the {split.name} targets are no class indices; expected integers, or kind='regression'")
    if not targets.is_floating_point() and targets.numel() and int(targets.min()) < 0:
        raise DataError(f"the {split.name} targets hold class {int(targets.min())}; expected integers from 0")
    classes = count_classes(kind, split)
    if classes is not None and num_classes is not None and classes > num_classes:
        raise DataError(f"the {split.name} targets hold {classes} classes, but num_classes is {num_classes}")


def _check_masks(split: TensorSplit, targets: Any) -> None:
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dim() != 3:
        found = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise DataError(
            f"the {split.name} targets are {found}; expected class indices (N, H, W), {IGNORED} for pixels to ignore"
        )


def _check_boxes(split: Split, targets: Any) -> None:
    first = targets[0] if isinstance(targets, list) and targets else targets
    boxes = first.get("boxes") if isinstance(first, Mapping) else None
    if not isinstance(boxes, Tensor) or boxes.dim() != 2 or boxes.shape[1] != 4 or "labels" not in first:
        raise DataError(
            f"the {split.name} targets are no boxes; expected a dictionary for each image with "
            "boxes (n, 4) as x1, y1, x2, y2 and labels (n,) from 1"
        )
