from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efficientdnns.data.detection import average_precision, box_iou, detection_loss, find
from efficientdnns.errors import DataError


def boxes(count: int, g: torch.Generator) -> Tensor:
    corner, size = torch.rand(count, 2, generator=g) * 60, torch.rand(count, 2, generator=g) * 40 + 4
    return torch.cat([corner, corner + size], 1)


def scene(g: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Detections around the true boxes, and false ones."""
    count, extra = torch.randint(0, 5, (2,), generator=g).tolist()
    true, labels = boxes(count, g), torch.randint(1, 4, (count,), generator=g)
    near = true.repeat(2, 1) + 2 * torch.randn(2 * count, 4, generator=g)
    near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
    found = torch.cat([near, boxes(extra, g)])
    kinds = torch.cat([labels.repeat(2), torch.randint(1, 5, (extra,), generator=g)])
    scores = torch.rand(len(found), generator=g)
    return {"boxes": found, "labels": kinds, "scores": scores}, {"boxes": true, "labels": labels}


def precision(outputs: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> Tensor:
    return average_precision(find(outputs, targets)[0])


def test_box_iou() -> None:
    first, second = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]])
    torch.testing.assert_close(box_iou(first, second), torch.tensor([[1 / 7, 1.0, 0.0]]))


def test_by_hand() -> None:
    """Two true boxes; right, wrong, right in the order of scores: precision 1 up to recall 1/2, then 2/3."""
    true = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    found = torch.stack([true[0], torch.tensor([50.0, 50, 60, 60]), true[1]])
    output = {"boxes": found, "labels": torch.ones(3).long(), "scores": torch.tensor([0.9, 0.8, 0.7])}
    target = {"boxes": true, "labels": torch.ones(2).long()}
    expected = 100 * (51 * 1 + 50 * 2 / 3) / 101
    torch.testing.assert_close(precision([output], [target]), torch.full((10,), expected, dtype=torch.float64))


def test_a_second_detection_of_one_box_is_wrong_and_overlap_decides() -> None:
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1])}
    twice = {"boxes": target["boxes"].repeat(2, 1), "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.5, 0.9])}
    assert precision([twice], [target]).tolist() == [pytest.approx(100)] * 10
    (found,), images = find([twice], [target])
    assert found.hits[0].tolist() == [True, False]
    assert images == 1
    partly = {"boxes": torch.tensor([[0.0, 0, 10, 7.2]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    assert [value > 0 for value in precision([partly], [target]).tolist()] == [True] * 5 + [False] * 5


@pytest.mark.parametrize(
    ("seed", "mean", "at_half"),
    [(0, 26.211086513300547, 58.41262702555873), (1, 28.722771469907183, 59.17961030828083)],
)
def test_the_figures_of_pycocotools(seed: int, mean: float, at_half: float) -> None:
    """stats[0] and stats[1] of COCOeval (pycocotools 2.0.11) on the same scenes."""
    g = torch.Generator().manual_seed(seed)
    scenes = [scene(g) for _ in range(30)]
    value = precision([o for o, _ in scenes], [t for _, t in scenes])
    assert float(value.mean()) == pytest.approx(mean)
    assert float(value[0]) == pytest.approx(at_half)


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_properties(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scenes = [scene(g) for _ in range(4)]
    outputs, targets = [o for o, _ in scenes], [t for _, t in scenes]
    if not any(len(t["labels"]) for t in targets):
        assert precision(outputs, targets).isnan().all()
        return
    value = precision(outputs, targets)
    assert ((value >= 0) & (value <= 100 + 1e-9)).all()
    assert (value.diff() <= 1e-9).all()  # a higher overlap is harder
    squeezed = [o | {"scores": o["scores"] ** 3} for o in outputs]  # only the order of scores counts
    torch.testing.assert_close(precision(squeezed, targets), value)
    order = torch.randperm(4, generator=g).tolist()
    torch.testing.assert_close(precision([outputs[i] for i in order], [targets[i] for i in order]), value)
    perfect = [t | {"scores": torch.ones(len(t["labels"]))} for t in targets]
    torch.testing.assert_close(precision(perfect, targets), torch.full((10,), 100.0, dtype=torch.float64))
    nothing = [{k: v[:0] for k, v in o.items()} for o in outputs]
    assert (precision(nothing, targets) == 0).all()


def test_losses_are_added() -> None:
    assert detection_loss({"a": torch.tensor(1.0), "b": torch.tensor(2.5)}, None) == 3.5
    with pytest.raises(DataError, match="instead of its losses"):
        detection_loss([], None)
