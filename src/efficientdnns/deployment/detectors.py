"""Torchvision's detectors as graphs: what branches on the data in them, written without branches while they are traced."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`torchvision.ops.batched_nms` whatever the number of boxes, none included: the boxes of every class are moved to a
    place of their own, beyond the largest coordinate of the class before, so that one suppression serves all."""
    from torchvision.ops import nms

    beyond = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
    kept: Tensor = nms(boxes + (idxs.to(boxes) * beyond)[:, None], scores, iou_threshold)
    return kept


def multiscale_roi_align(
    features: list[Tensor],
    boxes: list[Tensor],
    output_size: Any,
    sampling_ratio: int,
    scales: list[float],
    mapper: Any,
) -> Tensor:
    """What `torchvision.ops.MultiScaleRoIAlign` computes, without the number of boxes becoming a constant."""
    from torchvision.ops import poolers, roi_align

    regions = poolers._convert_to_roi_format(boxes)
    if len(features) == 1:
        only: Tensor = roi_align(features[0], regions, output_size, scales[0], sampling_ratio)
        return only
    levels = mapper(boxes)
    pooled = features[0].new_zeros((regions.size(0), features[0].size(1), *output_size))
    for level, (feature, scale) in enumerate(zip(features, scales)):
        (here,) = torch.where(levels == level)
        pooled = pooled.index_put((here,), roi_align(feature, regions[here], output_size, scale, sampling_ratio))
    return pooled


def decoded(coder: Any, rel_codes: Tensor, boxes: list[Tensor]) -> Tensor:
    """`torchvision.models.detection._utils.BoxCoder.decode` whatever the number of boxes, none included."""
    flat: Tensor = coder.decode_single(rel_codes, torch.cat(boxes))
    return flat.reshape(flat.size(0), flat.size(1) // 4, 4)


@contextmanager
def without_branches() -> Iterator[None]:
    """Install these in place of torchvision's, and put torchvision's back in any case."""
    if "torchvision.ops" not in sys.modules:  # then no network here comes from it
        yield
        return
    import torchvision.ops as ops
    from torchvision.models.detection._utils import BoxCoder

    with (
        patch.object(BoxCoder, "decode", decoded),
        patch.object(ops, "batched_nms", batched_nms),
        patch.object(ops.boxes, "batched_nms", batched_nms),
        patch.object(ops.poolers, "_multiscale_roi_align", multiscale_roi_align),
    ):
        yield


def finds_objects(graph: torch.fx.GraphModule) -> bool:
    """Whether there is a suppression in a traced graph."""
    return any(str(node.target).startswith("torchvision.nms") for node in graph.graph.nodes)
