from __future__ import annotations

import torch
from torch.nn import functional as F

from efficientdnns.data.segmentation import confusion, mean_iou, pixel_accuracy, segmentation_loss


def test_mean_iou_is_that_of_all_pixels_together() -> None:
    targets, predicted = torch.randint(0, 4, (8, 5, 6)), torch.randint(0, 4, (8, 5, 6))
    targets[torch.rand(targets.shape) < 0.2] = 255
    logits = F.one_hot(predicted, 5).permute(0, 3, 1, 2).float()  # class 4 never occurs and does not count
    parts = [confusion(logits[rows], targets[rows]) for rows in (slice(0, 3), slice(3, 8))]
    matrix = parts[0][0] + parts[1][0]
    valid = targets != 255
    assert parts[0][1] + parts[1][1] == int(valid.sum()) == int(matrix.sum())
    ious = []
    for k in range(4):
        a, b = (targets == k) & valid, (predicted == k) & valid
        ious.append((a & b).sum() / (a | b).sum())
    torch.testing.assert_close(mean_iou(matrix), 100 * float(torch.stack(ious).mean()), rtol=1e-5, atol=0)
    accuracy = 100 * float((targets == predicted)[valid].float().mean())
    torch.testing.assert_close(pixel_accuracy(matrix), accuracy, rtol=1e-5, atol=0)


def test_loss_ignores_pixels_and_adds_half_of_the_auxiliary() -> None:
    out, aux, targets = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    targets[0, :2] = 255
    main, extra = (F.cross_entropy(logits, targets, ignore_index=255) for logits in (out, aux))
    torch.testing.assert_close(segmentation_loss(out, targets), main)
    torch.testing.assert_close(segmentation_loss({"out": out}, targets), main)
    torch.testing.assert_close(segmentation_loss({"out": out, "aux": aux}, targets), main + 0.5 * extra)
    assert segmentation_loss(out, torch.full_like(targets, 255)) == 0


def test_logits_of_another_size_are_resized() -> None:
    targets = torch.zeros(1, 8, 8, dtype=torch.long)
    targets[:, :, 4:] = 1
    small = F.one_hot(targets[:, ::4, ::4], 2).permute(0, 3, 1, 2).float() * 20
    matrix, count = confusion(small, targets)
    assert count == 64
    assert pixel_accuracy(matrix.double()) == 100
    assert torch.isfinite(segmentation_loss(small, targets))
