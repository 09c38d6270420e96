"""Semantic segmentation: one class a pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = 255
"""The label of pixels that count for nothing."""
AUXILIARY = 0.5
"""Weight of the auxiliary output's loss."""


def segmentation_loss(outputs: Any, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the pixels that are not `IGNORED`, plus `AUXILIARY` times that of an output ``aux``.

    ``outputs`` are logits (B, C, h, w) or a mapping with ``out`` and perhaps ``aux``; ``targets`` (B, H, W) hold class
    indices. Logits of another size are resized bilinearly to that of the targets. A batch without any pixel that counts
    has loss 0.
    """
    if not isinstance(outputs, Mapping):
        return _cross_entropy(outputs, targets)
    loss = _cross_entropy(outputs["out"], targets)
    return loss + AUXILIARY * _cross_entropy(outputs["aux"], targets) if "aux" in outputs else loss


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    total = F.cross_entropy(_fitted(logits, targets), targets.long(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def _fitted(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.shape[2:] == targets.shape[1:]:
        return logits
    return F.interpolate(logits, size=targets.shape[1:], mode="bilinear", align_corners=False)


def confusion(outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
    """(C, C) counts of pixels of true class (row) and predicted class (column), and how many pixels count."""
    logits = outputs["out"] if isinstance(outputs, Mapping) else outputs
    classes = logits.shape[1]
    valid = targets != IGNORED
    pairs = targets[valid].long() * classes + _fitted(logits, targets).argmax(1)[valid]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes), int(valid.sum())


def mean_iou(matrix: Tensor) -> float:
    r"""Intersection over union in percent, from the confusion matrix of a whole split.

    .. math:: \frac{100}{|K|} \sum_{k \in K} \frac{n_{kk}}{\sum_j n_{kj} + \sum_i n_{ik} - n_{kk}}

    over the classes K that occur among the true or the predicted ones.
    """
    right = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - right
    return 100 * float((right / union)[union > 0].mean())


def pixel_accuracy(matrix: Tensor) -> float:
    """Share of right pixels in percent."""
    return 100 * float(matrix.diagonal().sum() / matrix.sum())
