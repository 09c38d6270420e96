"""What a detector finds, before and after channels leave it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficientdnns.surgery import ChannelGraph, remove
from efficientdnns.surgery.verify import differing


class Detector(nn.Module):
    """Keeps the boxes of a grid that it is sure of: their number depends on the picture."""

    def __init__(self, score_thresh: float = 0.624) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU6(), nn.Conv2d(12, 8, 1), nn.ReLU6())
        self.head = nn.Conv2d(8, 6, 1)
        self.score_thresh = score_thresh

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []
        for maps in self.head(self.body(torch.stack(images))):
            rows = maps.flatten(1).T
            scores, labels = rows[:, 4:].softmax(1).max(1)
            sure = scores > self.score_thresh
            if bool(sure.any()):
                best = scores[sure].sort(descending=True).indices
                boxes, labels, scores = rows[sure, :4][best], labels[sure][best], scores[sure][best]
            else:
                boxes, labels, scores = rows[:0, :4], labels[:0], scores[:0]
            found.append({"boxes": boxes, "labels": labels, "scores": scores})
        return found


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector().eval()


PICTURES = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((3, 8, 8), 0.4)]


def test_channels_leave_a_detector_that_then_finds_another_number_of_boxes(detector) -> None:
    example = (PICTURES,)
    graph = ChannelGraph.trace(detector, example)
    assert graph.source == "hooks"
    assert [(group.name, group.size) for group in graph.groups] == [("body.0", 12), ("body.2", 8)]
    smaller = remove(detector, example, {"body.0": range(6), "body.2": range(5)}, graph)
    assert smaller.head.in_channels == 3
    counts = [[len(found["boxes"]) for found in network(PICTURES)] for network in (detector, smaller)]
    assert counts[0] != counts[1]
    assert detector.score_thresh == smaller.score_thresh == 0.624, "lowered for the comparison only"


def nudged(model: nn.Module, by: float) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight[0, 0] += by  # type: ignore[union-attr, operator, index]
    return other


def test_detectors_are_compared_by_what_they_find(detector) -> None:
    assert differing(detector, nudged(detector, 0.0), (PICTURES,)) is None
    assert "differ by" in str(differing(detector, nudged(detector, 1e-3), (PICTURES,)))
    blind = copy.deepcopy(detector)
    blind.score_thresh = 2.0  # nothing is found; boxes of any score are compared
    assert "differ by" in str(differing(blind, nudged(blind, 1e-3), (PICTURES,)))


def test_boxes_of_equal_scores_may_come_in_another_order(detector) -> None:
    """In a picture without content all boxes have the same score, and rounding sorts them."""

    class Reversed(Detector):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            return [{key: value.flip(0) for key, value in found.items()} for found in super().forward(images)]

    other = Reversed().eval()
    other.load_state_dict(detector.state_dict())
    assert differing(detector, other, (PICTURES,)) is None
