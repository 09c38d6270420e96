"""Object detection: boxes (n, 4) as (x1, y1, x2, y2), labels (n,) from 1 (0 is the background), scores (n,)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientdnns.errors import DataError

THRESHOLDS = torch.arange(10, dtype=torch.float64) * 0.05 + 0.5
"""Overlaps from which a box counts as found: 0.5, 0.55, ... 0.95."""
MOST = 100
"""Detections of one class in one image that are looked at, the best first."""
DECIDED_BY_ROUNDING = 0.1
"""Share of the detections that two runs of one network need not have in common."""


class Found(NamedTuple):
    """What was found of one class in one image."""

    label: int
    scores: Tensor
    """(n,), falling."""
    hits: Tensor
    """(T, n): whether the detection matches a true box, at each of `THRESHOLDS`."""
    truths: int
    """True boxes of the class."""


def detection_loss(outputs: Any, targets: Any) -> Tensor:
    """The sum of the losses that a detector in training mode gives."""
    if not isinstance(outputs, Mapping):
        raise DataError(
            f"the detector gives a {type(outputs).__name__} instead of its losses; "
            "in training mode it must return a dictionary of losses for model(images, targets)"
        )
    return sum(outputs.values(), torch.zeros((), device=next(iter(outputs.values())).device))


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union (n, m) of boxes (n, 4) and (m, 4)."""
    corners = torch.maximum(first[:, None, :2], second[:, :2]), torch.minimum(first[:, None, 2:], second[:, 2:])
    shared = (corners[1] - corners[0]).clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1] - shared).clamp(min=1e-12)


def is_detections(value: Any) -> bool:
    """Whether this is what was detected in one image: a mapping with boxes, labels and scores."""
    return isinstance(value, Mapping) and value.keys() >= {"boxes", "labels", "scores"}


def paired(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Every detection of either side beside the other side's nearest, but for the tenth of these pairs that are farthest
    apart.

    Detections have an order only by scores that may be nearly equal, and rounding decides about boxes that just are or are
    not suppressed, so two runs are compared as sets of which nine tenths are in both.

    Returns:
        (K, C) and (K, C): boxes, as shares of the largest expected coordinate, scores, and the mean of each detection's mask
        and key points where there are any; (K,): whether the labels differ. If one side is empty, the other's are beside
        zeros.
    """
    size = max(float(expected["boxes"].abs().max()) if len(expected["boxes"]) else 1.0, 1.0)
    more = [key for key in ("masks", "keypoints", "keypoints_scores") if key in expected and key in got]
    sides = []
    for value in (expected, got):
        parts = [value["boxes"] / size, value["scores"][:, None]]
        parts += [_mean_of_each(value[key])[:, None] for key in more]
        sides.append(torch.cat([part.double().cpu() for part in parts], 1))
    if 0 in map(len, sides):
        longer = torch.cat(sides)
        zeros = torch.zeros_like(longer)
        return *((longer, zeros) if len(sides[0]) else (zeros, longer)), torch.zeros(len(longer), dtype=torch.bool)
    differ = expected["labels"].cpu()[:, None] != got["labels"].cpu()[None]
    apart = torch.cdist(sides[0][:, :5], sides[1][:, :5], p=1) + 10 * differ.double()
    rows = torch.cat([torch.arange(len(sides[0])), apart.argmin(0)])
    columns = torch.cat([apart.argmin(1), torch.arange(len(sides[1]))])
    distances = (sides[0][rows] - sides[1][columns]).abs().sum(1) + differ[rows, columns]
    alike = distances.sort().indices[: math.ceil(len(rows) * (1 - DECIDED_BY_ROUNDING))]
    rows, columns = rows[alike], columns[alike]
    return sides[0][rows], sides[1][columns], differ[rows, columns]


def _mean_of_each(tensor: Tensor) -> Tensor:
    """(n,) mean of everything in each entry of (n, ...)."""
    return tensor.double().flatten(1).mean(1) if tensor.dim() > 1 else tensor.double()


def find(outputs: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]) -> tuple[list[Found], int]:
    """Match the detections of each image with its true boxes, class by class; and the number of images."""
    found = []
    for output, target in zip(outputs, targets, strict=True):
        output, target = ({k: v.cpu() for k, v in d.items() if isinstance(v, Tensor)} for d in (output, target))
        for label in torch.cat([output["labels"], target["labels"]]).unique().tolist():
            mine, true = output["labels"] == label, target["boxes"][target["labels"] == label].double()
            scores, order = output["scores"][mine].double().sort(descending=True, stable=True)
            boxes = output["boxes"][mine][order[:MOST]].double()
            found.append(Found(int(label), scores[:MOST], match(box_iou(boxes, true)), len(true)))
    return found, len(targets)


def match(overlaps: Tensor) -> Tensor:
    """Greedy matching: each detection in turn (rows, best score first) takes the free true box (columns) it overlaps most.

    Returns (T, n): whether the overlap reaches each of `THRESHOLDS`.
    """
    detections, truths = overlaps.shape
    hits = torch.zeros(len(THRESHOLDS), detections, dtype=torch.bool)
    free = torch.ones(len(THRESHOLDS), truths, dtype=torch.bool)
    for number in range(detections if truths else 0):
        overlap, taken = torch.where(free, overlaps[number], -1.0).max(1)
        hit = hits[:, number] = overlap >= THRESHOLDS - 1e-10
        free[hit, taken[hit]] = False
    return hits


def average_precision(found: Sequence[Found]) -> Tensor:
    """Mean average precision in percent at each of `THRESHOLDS` (T,), as COCO defines it.

    For each class the precision, made non-increasing, is averaged over recalls 0, 0.01, ..., 1; then over the classes
    that have true boxes. Crowd regions and ranges of area are not treated apart.
    """
    labels = sorted({part.label for part in found if part.truths})
    per_class = [_class_precision([part for part in found if part.label == label]) for label in labels]
    return 100 * torch.stack(per_class).mean(0) if per_class else torch.full((len(THRESHOLDS),), torch.nan)


def _class_precision(parts: Sequence[Found]) -> Tensor:
    order = torch.cat([part.scores for part in parts]).sort(descending=True, stable=True).indices
    hits = torch.cat([part.hits for part in parts], 1)[:, order].double().cumsum(1)
    recall = hits / sum(part.truths for part in parts)
    precision = hits / torch.arange(1, hits.shape[1] + 1)
    envelope = precision.flip(1).cummax(1).values.flip(1) if hits.shape[1] else precision
    recalls = (torch.arange(101, dtype=torch.float64) * 0.01).repeat(len(THRESHOLDS), 1)
    points = torch.searchsorted(recall, recalls)  # where each recall is first reached; beyond the end precision is 0
    return F.pad(envelope, (0, 1)).gather(1, points).mean(1)
