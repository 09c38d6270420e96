"""Weights: tied ones, integer ones and coded ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from efficientdnns.errors import ModelError
from efficientdnns.measurement import nonzero_parameters, parameter_count


def test_plain_and_zero_weights():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert parameter_count(model) == 12 + 3 + 6
    with torch.no_grad():
        model[0].weight[0] = 0
        model[1].bias.zero_()
        model[0].bias.fill_(1)
    assert nonzero_parameters(model) == 8 + 3 + 3


def test_tied_weights_count_once():
    encoder, decoder = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    decoder.weight = encoder.weight
    assert parameter_count(nn.Sequential(encoder, decoder)) == 40
    decoder.weight = nn.Parameter(encoder.weight.data)  # two Parameter objects on the same memory
    assert parameter_count(nn.Sequential(encoder, decoder)) == 40
    decoder.weight = nn.Parameter(encoder.weight.data.clone())
    assert parameter_count(nn.Sequential(encoder, decoder)) == 80
    assert parameter_count(nn.Sequential(encoder, encoder)) == 40


def test_tensors_without_memory_are_not_taken_for_each_other():
    assert parameter_count(nn.Sequential(nn.Linear(4, 3, device="meta"), nn.Linear(4, 3, device="meta"))) == 30


class IntegerLinear(nn.Module):
    weight_buffers = ("weight",)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([[1, 0, -3], [0, 0, 7]], dtype=torch.int8))
        self.register_buffer("scale", torch.ones(2))
        self.bias = nn.Parameter(torch.ones(2))


def test_weight_buffers_count_and_other_buffers_do_not():
    model = nn.Sequential(IntegerLinear(), nn.Linear(2, 1, bias=False))
    assert parameter_count(model) == 6 + 2 + 2
    assert nonzero_parameters(model) == 3 + 2 + 2


def test_a_weight_buffer_that_is_missing():
    module = IntegerLinear()
    module.weight_buffers = ("codes",)
    with pytest.raises(ModelError, match="no buffer 'codes'"):
        parameter_count(module)


class PackedBits(nn.Module):
    """Twenty binary weights in three bytes, and a child that it counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(3, dtype=torch.uint8))
        self.scale = nn.Linear(1, 1)

    def count_parameters(self) -> tuple[int, int]:
        return 20, 20


def test_modules_that_count_themselves():
    packed = PackedBits()
    model = nn.Sequential(packed, nn.Linear(2, 2), packed)
    assert parameter_count(model) == 26
    assert nonzero_parameters(packed) == 20
