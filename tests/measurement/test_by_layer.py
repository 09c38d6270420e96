"""Weights, multiply-accumulates and bytes by layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from efficientdnns.coding import weights_layout, weights_size
from efficientdnns.measurement.by_layer import LayerSize, layer_sizes
from efficientdnns.measurement.macs import count_macs
from efficientdnns.measurement.size import nonzero_parameters, parameter_count
from efficientdnns.quantization.multibit_layers import MultiBitLinear


def sizes(model: nn.Module, example: torch.Tensor) -> dict[str, LayerSize]:
    size, tensors = weights_layout(model.state_dict())
    assert size == weights_size(model.state_dict())
    found = layer_sizes(model.eval(), count_macs(model, example).by_module, tensors)
    assert sum(layer.params for layer in found) == parameter_count(model)
    assert sum(layer.nonzero_params for layer in found) == nonzero_parameters(model)
    assert sum(layer.macs for layer in found) == count_macs(model, example).total
    assert 0 < sum(layer.bytes for layer in found) <= size
    return {layer.name: layer for layer in found}


def test_a_sparse_layer_has_few_bits() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 64))
    with torch.no_grad():
        model[4].weight *= torch.rand_like(model[4].weight) < 0.05
    found = sizes(model, torch.zeros(1, 1, 8, 8))
    assert list(found) == ["0", "1", "4"]
    assert found["0"].kind == "Conv2d"
    assert found["0"].bits == 32
    assert found["0"].sparsity == 0
    assert found["4"].sparsity == pytest.approx(0.95, abs=0.01)
    assert 1 < found["4"].bits < 4
    assert found["1"].macs == 0
    assert found["1"].params == 16


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x) * self.scale) @ torch.ones(7, 2)


def test_the_networks_own_weights_and_products_stand_under_its_empty_name() -> None:
    found = sizes(Shared(), torch.zeros(1, 3, dtype=torch.long))
    assert found[""].params == 5
    assert found[""].macs == 3 * 7 * 2
    assert found["embedding"].params == 35
    assert found["head"].params == 0, "tied weights count once"
    assert found["head"].macs == 3 * 35
    assert found["head"].bits is None


def test_a_module_that_counts_itself_is_one_layer() -> None:
    layer = MultiBitLinear(64, 32, bits=2)
    layer.fill({"weight": torch.randn(32, 64), "bias": torch.randn(32)})
    found = sizes(nn.Sequential(layer, nn.ReLU()), torch.zeros(1, 64))
    assert list(found) == ["0"]
    assert found["0"].params == 32 * 64 + 32
    assert found["0"].bits is not None
    assert found["0"].bits < 5
