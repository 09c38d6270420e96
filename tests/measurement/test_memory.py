"""Peak memory of networks whose peak is known."""

from __future__ import annotations

import torch
from torch import nn

from efficientdnns.measurement import peak_memory


def weights(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


def test_peak_is_where_two_layers_meet():
    model = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(), nn.Linear(1000, 10))
    inputs = torch.randn(7, 10)
    assert peak_memory(model, inputs) == weights(model) + 4 * (70 + 7000 + 7000)


def test_in_place_and_views_take_nothing():
    model = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(inplace=True), nn.Unflatten(1, (10, 100)), nn.Flatten())
    assert peak_memory(model, torch.randn(7, 10)) == weights(model) + 4 * (70 + 7000)


def test_a_skip_connection_keeps_its_input():
    class Residual(nn.Module):
        def forward(self, x):
            y = x * 2
            z = y * 3
            z = z * 4
            return y + z

    # x, y, the old z, and the new one while it is made; then x, y, z and their sum
    assert peak_memory(Residual(), torch.zeros(100)) == 4 * 400


def test_released_tensors_do_not_add_up():
    class Chain(nn.Module):
        def __init__(self, length):
            super().__init__()
            self.length = length

        def forward(self, x):
            for _ in range(self.length):
                x = x * 2
            return x

    assert peak_memory(Chain(3), torch.zeros(100)) == peak_memory(Chain(30), torch.zeros(100)) == 1200


def test_buffers_dtype_and_tied_weights():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False)).double()
    model[2].weight = model[0].weight
    inputs = torch.randn(2, 8, dtype=torch.float64)
    known = 8 * 64 + weights(model[1])
    assert known + 8 * 2 * 16 <= peak_memory(model, inputs) <= known + 8 * 3 * 16 + 8 * 4 * 8


def test_the_same_every_time_and_nothing_is_touched():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.LSTM(6, 4)).train()
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))).flatten(1, 2))  # type: ignore[method-assign]
    peaks = {peak_memory(model, torch.randn(2, 3, 8, 8)) for _ in range(4)}
    assert len(peaks) == 1
    assert model.training
    assert model[1].training
