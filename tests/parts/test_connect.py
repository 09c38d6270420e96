"""Connectors and pairs of layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from efficientdnns.errors import ConfigurationError, ModelError
from efficientdnns.models import build
from efficientdnns.parts.connect import connector
from efficientdnns.parts.pair import pair_layers, pair_stages


def test_a_connector_maps_to_the_teachers_width():
    student = torch.randn(3, 32, 8, 8)
    for kind in ("conv1x1-bn", "linear"):
        assert connector(student.shape, (3, 64, 8, 8), kind)(student).shape == (3, 64, 8, 8)
    assert connector((3, 5), (3, 7))(torch.randn(3, 5)).shape == (3, 7)
    assert connector((3, 5, 4), (3, 7, 4))(torch.randn(3, 5, 4)).shape == (3, 7, 4)


def test_equal_widths_need_no_connector():
    assert isinstance(connector((1, 8, 4, 4), (1, 8, 4, 4)), nn.Identity)


def test_weights_are_he_normal():
    weight = connector((1, 400, 1, 1), (1, 300, 1, 1), "linear").weight
    assert weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.02)


def test_spatial_mismatch_names_both_shapes():
    with pytest.raises(ModelError, match=r"\(1, 8, 4, 4\).*\(1, 8, 8, 8\)"):
        connector((1, 8, 4, 4), (1, 8, 8, 8))


def test_stages_pair_by_size():
    pairs = pair_stages(build("cifar-resnet32"), build("wide-resnet", depth=10, width=2), torch.randn(1, 3, 32, 32))
    assert [pair.teacher for pair in pairs] == ["layer1", "layer2", "layer3"]
    assert [pair.teacher_shape[2:] for pair in pairs] == [pair.student_shape[2:] for pair in pairs]
    assert [pair.student_shape[1] for pair in pairs] == [32, 64, 128]


def test_hidden_vectors_pair_from_the_output_backwards():
    teacher = build("mlp", hidden=[40, 30, 20])
    pairs = pair_stages(teacher, build("mlp", hidden=[9, 8]), torch.randn(1, 784))
    assert [(pair.teacher_shape[1], pair.student_shape[1]) for pair in pairs] == [(30, 9), (20, 8)]


def test_nothing_in_common_is_an_error():
    with pytest.raises(ConfigurationError, match="no stage sizes match: teacher 28x28, 14x14, student vector"):
        pair_stages(build("small-resnet"), build("lenet-300-100"), torch.randn(1, 1, 28, 28))


def test_named_layers():
    teacher, student = build("small-resnet"), build("small-resnet", width=0.5)
    (pair,) = pair_layers(teacher, student, [("layer2", "layer2")], torch.randn(1, 1, 28, 28))
    assert pair.teacher_shape == (1, 32, 14, 14)
    assert pair.student_shape == (1, 16, 14, 14)
