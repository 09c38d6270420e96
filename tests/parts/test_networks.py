"""Networks that fields name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from efficientdnns.errors import ConfigurationError, ModelError
from efficientdnns.parts.networks import check_trained, network


def test_a_name_a_mapping_and_a_module():
    assert network("lenet5", 7)(torch.randn(1, 1, 28, 28)).shape == (1, 7)
    made = network({"name": "mlp", "hidden": [5], "num_classes": 3}, 7)
    assert made(torch.randn(1, 784)).shape == (1, 3)
    assert made.factory == {"spec": "mlp", "options": {"num_classes": 3, "hidden": [5]}}
    own = nn.Linear(2, 2)
    copied = network(own)
    assert copied is not own
    assert torch.equal(copied.weight, own.weight)


def test_what_is_no_network():
    for wrong in (3, {"weights": "x"}, ["lenet5"]):
        with pytest.raises(ConfigurationError, match="is no network"):
            network(wrong)
    with pytest.raises(ModelError, match="no model is named"):
        network("lenet55")


def test_a_teacher_has_weights():
    for fresh in ("lenet5", {"name": "lenet5"}, "torchvision:resnet18"):
        with pytest.raises(ConfigurationError, match="would be untrained"):
            check_trained(fresh)
    for trained in (
        "original",
        {"name": "lenet5", "weights": "x"},
        {"name": "timm:x", "pretrained": True},
        nn.Linear(2, 2),
    ):
        check_trained(trained)
