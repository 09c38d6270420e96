"""Detectors as files: no branches on the data, any number of boxes, compared as sets, torchvision left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efficientdnns as ed
from efficientdnns.deployment import check_result, export, export_all, open_onnx, open_pt2
from efficientdnns.deployment.detectors import batched_nms, decoded, multiscale_roi_align
from efficientdnns.deployment.graph import trace
from efficientdnns.deployment.opened import difference
from efficientdnns.errors import ModelError

torchvision = pytest.importorskip("torchvision")


def some_boxes(count: int, size: float = 100.0) -> Tensor:
    corners = torch.rand(count, 2) * size
    return torch.cat([corners, corners + torch.rand(count, 2) * size / 2 + 1], 1)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_suppression_is_that_of_torchvision(count) -> None:
    boxes, scores, classes = some_boxes(count), torch.rand(count), torch.randint(5, (count,))
    kept = batched_nms(boxes, scores, classes, 0.4)
    assert torch.equal(kept, torchvision.ops.batched_nms(boxes, scores, classes, 0.4))


@pytest.mark.parametrize("levels", [1, 3])
def test_pooling_of_regions_is_that_of_torchvision(levels) -> None:
    names = [str(level) for level in range(levels)]
    pool = torchvision.ops.MultiScaleRoIAlign(names, 3, 2)
    features = {name: torch.rand(2, 4, 64 >> level, 64 >> level) for level, name in enumerate(names)}
    boxes = [some_boxes(20, 200.0), some_boxes(7, 60.0)]
    expected = pool(features, boxes, [(256, 256)] * 2)
    got = multiscale_roi_align(list(features.values()), boxes, (3, 3), 2, pool.scales, pool.map_levels)
    assert torch.equal(got, expected)


def test_torchvision_is_as_it_was_after_tracing_fails() -> None:
    ops = torchvision.ops
    before = ops.batched_nms, ops.boxes.batched_nms, ops.poolers._multiscale_roi_align

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            used = (ops.batched_nms, ops.boxes.batched_nms, ops.poolers._multiscale_roi_align)
            seen.append({function.__module__ for function in used})
            return x if x.sum() > 0 else -x

    seen: list[set[str]] = []
    with pytest.raises(ModelError):
        trace(Failing(), torch.randn(1, 3))
    assert {"efficientdnns.deployment.detectors"} in seen
    assert (ops.batched_nms, ops.boxes.batched_nms, ops.poolers._multiscale_roi_align) == before


class OneStage(nn.Module):
    """A head on a grid of boxes; takes images of any size."""

    def __init__(self, threshold: float = 0.4) -> None:
        super().__init__()
        self.head, self.threshold = nn.Conv2d(3, 7, 8, 8), threshold

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            grid = self.head(nn.functional.interpolate(image[None], (64, 64), mode="bilinear"))[0].flatten(1).T
            places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)) * 8
            boxes = torch.cat([places, places + 12 * grid[:, :2].sigmoid() + 8], 1)
            scores, labels = grid[:, 3:].softmax(1).max(1)
            (sure,) = torch.where(scores > self.threshold)
            boxes, scores, labels = boxes[sure], scores[sure], labels[sure]
            kept = torchvision.ops.boxes.batched_nms(boxes, scores, labels, 0.3)[:20]
            found.append({"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]})
        return found


@pytest.fixture(scope="module")
def one_stage(tmp_path_factory) -> tuple[OneStage, Path]:
    torch.manual_seed(0)
    network, folder = OneStage(), tmp_path_factory.mktemp("one-stage")
    samples = [torch.rand(3, 40 + 8 * n, 56) for n in range(3)]
    for exported, _ in export_all(network, (samples[:1],), folder, samples=samples):
        assert exported.error == ""
        assert exported.sizes is None, "any size"
        assert exported.compared == 3
        assert exported.max_difference < 1e-5
    return network, folder


@pytest.mark.parametrize(("opens", "file"), [(open_pt2, "model.pt2"), (open_onnx, "model.onnx")])
def test_files_take_any_size_and_find_as_many_boxes_as_there_are(one_stage, opens, file) -> None:
    network, folder = one_stage
    opened = opens(folder / file)
    counts = set()
    for picture in (torch.rand(3, 90, 33), torch.zeros(3, 50, 50), 4 * torch.rand(3, 64, 64)):
        with torch.no_grad():
            expected, got = network([picture]), opened([picture])
        assert difference(expected, got)[0] < 1e-4
        counts.add(len(got[0]["boxes"]))
    assert 0 in counts, "the picture of zeros has nothing in it"
    assert max(counts) > 3


def test_detections_are_compared_as_sets() -> None:
    found = {"boxes": some_boxes(6), "labels": torch.tensor([1, 1, 2, 2, 3, 3]), "scores": torch.rand(6)}
    shuffled = {key: value[torch.tensor([3, 1, 0, 5, 4, 2])] for key, value in found.items()}
    assert difference([found], [shuffled])[:2] == (0, 0)
    worse = {**found, "scores": found["scores"] + 0.25}
    assert difference([found], [worse])[0] == pytest.approx(0.25, abs=1e-6)
    assert difference([found], [{**found, "labels": found["labels"] + 3}])[0] == 1
    fewer = {key: value[:4] for key, value in found.items()}
    none = {key: value[:0] for key, value in found.items()}
    assert 0 < difference([found], [fewer])[1] < difference([found], [none])[1]
    assert difference([none], [none]) == (0, 0, 0)
    masked = {**found, "masks": torch.rand(6, 1, 4, 4)}
    assert difference([masked], [{**masked, "masks": masked["masks"] + 0.5}])[0] == pytest.approx(0.5, abs=1e-6)
    assert difference([{**none, "masks": torch.zeros(0, 1, 4, 4)}], [masked])[0] > 0


@pytest.mark.parametrize("count", [5, 0])
def test_boxes_are_decoded_whatever_their_number(count) -> None:
    coder = torchvision.models.detection._utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    codes, boxes = torch.randn(count, 12), [some_boxes(count)]
    got = decoded(coder, codes, boxes)
    assert got.shape == (count, 3, 4)
    if count:
        torch.testing.assert_close(got, coder.decode(codes, boxes))


class OfOneSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 40 * 48, 2)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.layer(image.flatten()) for image in images]


def test_a_network_that_lets_one_size_only_says_so(tmp_path) -> None:
    samples = [torch.rand(3, 40, 48), torch.rand(3, 48, 50), torch.rand(3, 40, 48)]
    exported = export(OfOneSize(), (samples[:1],), tmp_path, "pt2", samples=samples)
    assert exported.sizes == (3, 40, 48)
    assert "samples of 3 x 40 x 48 only" in exported.note
    assert exported.compared == 2
    assert exported.max_difference < 1e-5


class Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_traced_is_refused_with_the_module(tmp_path) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"unsure": Undecided()})["unsure"])
    with pytest.raises(ModelError, match=r"cannot trace the network at '1' \(Undecided\): .*data-dependent") as error:
        export(network, torch.randn(2, 3), tmp_path, "pt2")
    assert "\n" not in str(error.value)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"]
)
def test_torchvisions_detectors(name, tmp_path) -> None:
    g = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 96 + 16 * (n % 2), 128, generator=g) for n in range(4)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([1])} for _ in images]
    task = ed.Task((images, targets), (images, targets), (images, targets), kind="detection", num_classes=3)
    model = ed.models.build(f"torchvision:{name}", num_classes=3)
    for module in model.modules():  # scores of a new network are all the same but for this
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.fill_(0.05)
    result = ed.compress(model, task, [], quiet=True, latency=False)
    result.save(tmp_path / "out")
    assert [exported.error for exported in result.exports] == ["", ""]
    assert all((exported.sizes is None) == name.startswith("ssd") for exported in result.exports)
    check_result(tmp_path / "out", inputs=images)
