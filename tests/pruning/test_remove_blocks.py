"""Whole blocks that go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.errors import ConfigurationError, EfficientDNNsError, ModelError
from efficientdnns.pruning.remove_blocks import RemoveBlocks


@pytest.fixture
def model() -> nn.Module:
    return ed.models.build("small-resnet", blocks=2)


def test_the_network_is_the_one_without_the_block(model, digits, tmp_path) -> None:
    result = ed.compress(model, digits, RemoveBlocks(blocks=("layer1.1", "layer2.1")), latency=False, quiet=True)
    expected = ed.models.build("small-resnet", blocks=1)
    state = {name: value for name, value in model.state_dict().items() if ".1." not in name}
    expected.load_state_dict(state)
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(result.model.eval()(x), expected.eval()(x))
    assert result.after.params < result.before.params
    result.save(tmp_path / "result")
    with torch.no_grad():
        assert torch.equal(ed.load(tmp_path / "result").eval()(x), expected(x))


def test_a_block_that_changes_the_shape_is_refused(model, digits) -> None:
    with pytest.raises(ModelError, match=r"layer2\.0.*keeps the shape"):
        ed.compress(model, digits, RemoveBlocks(blocks=("layer2.0",)), latency=False, quiet=True)


def test_names_are_checked_before_work_starts(model, digits) -> None:
    with pytest.raises(ConfigurationError, match="names no block"):
        ed.compress(model, digits, RemoveBlocks(), latency=False, quiet=True)
    with pytest.raises(EfficientDNNsError, match=r"layer1\.7"):
        ed.compress(model, digits, RemoveBlocks(blocks=("layer1.7",)), latency=False, quiet=True)
