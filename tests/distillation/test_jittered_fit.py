"""The regularised teacher of the MNIST experiment."""

from __future__ import annotations

import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.distillation.jittered_fit import JitteredFit, jitter, limit_norms


def test_images_move_by_up_to_two_pixels_over_a_dark_ground():
    images = torch.full((64, 1, 9, 9), -0.4)
    images[:, :, 4, 4] = 1.0
    moved = jitter(images, 2, torch.Generator().manual_seed(0))
    place = moved.flatten(1).argmax(1)
    rows, columns = place // 9 - 4, place % 9 - 4
    assert set(rows.tolist()) == set(columns.tolist()) == {-2, -1, 0, 1, 2}
    assert ((moved == 1).flatten(1).sum(1) == 1).all()
    assert moved.min() == images.min()


def test_norms_are_limited_and_short_weights_are_left():
    layer = nn.Linear(50, 20)
    with torch.no_grad():
        layer.weight[:10].mul_(20)
    before = layer.weight.detach().clone()
    limit_norms(nn.Sequential(layer), 2.0)
    norms = layer.weight.norm(dim=1)
    assert torch.allclose(norms[:10], torch.tensor(2.0))
    assert torch.equal(layer.weight[10:], before[10:])


def test_training_keeps_the_limit(session):
    work = session()
    JitteredFit(epochs=1, max_norm=0.5, batch_size=64).apply(work)
    assert max(layer.weight.norm(dim=1).max() for layer in work.model.layers[1::2]) < 0.5 + 1e-5


def test_a_leading_one_makes_the_teacher(digits):
    """A student that hears nothing but its teacher learns the digits only if the teacher was trained."""
    torch.manual_seed(0)
    model = ed.models.build("mlp", hidden=[32])
    common = {"epochs": 6, "learning_rate": 0.05, "batch_size": 32}
    student = {"name": "mlp", "hidden": [32]}
    distil = ed.KnowledgeDistillation(student=student, soft_weight=1.0, hard_weight=0.0, **common)
    result = ed.compress(model, digits, [JitteredFit(pixels=1, **common), distil], quiet=True, latency=False)
    assert result.before.metric.value > 60
    assert result.after.metric.value > 60
