from __future__ import annotations

import pytest
import torch
from surgery_networks import LeNet5, ResNet, randomise
from torch import nn

from efficientdnns.errors import SurgeryError
from efficientdnns.surgery import (
    ScatterChannels,
    SelectChannels,
    get_module,
    narrow_input,
    narrow_output,
    replace_module,
)

IMAGE = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_select_and_scatter_values() -> None:
    x = torch.arange(6.0).reshape(1, 3, 2)
    assert torch.equal(SelectChannels([2, 0])(x), x[:, [2, 0]])
    wide = ScatterChannels([3, 0, 1], 5, [7.0, 9.0])(x)
    assert torch.equal(wide[:, [3, 0, 1]], x)
    assert wide[0, 2].tolist() == [7, 7]
    assert wide[0, 4].tolist() == [9, 9]
    assert ScatterChannels([0, 2], 3, dim=-1)(torch.ones(4, 2)).tolist() == [[1, 0, 1]] * 4


@pytest.mark.parametrize("module", [SelectChannels([4, 1], dim=-1), ScatterChannels([3, 0], 5, [1.0, 2.0, 3.0])])
def test_config_and_state_rebuild(module: nn.Module) -> None:
    again = type(module)(**module.config())  # type: ignore[operator]
    again.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(3, 2, 5) if isinstance(module, SelectChannels) else torch.randn(3, 2, 4)
    assert torch.equal(again(x), module(x))


@pytest.mark.parametrize("name", ["conv1", "layers.1.conv2", "layers.2.conv1"])
def test_narrow_output_equals_zero_filters(name: str) -> None:
    model = randomise(ResNet("A"))
    width = model.get_submodule(name).out_channels
    keep = list(range(1, width, 2))
    narrow = narrow_output(model, IMAGE, name, keep)
    reference = randomise(ResNet("A"))
    reference.load_state_dict(model.state_dict())
    reference.get_submodule(name).weight.data[::2] = 0
    with torch.no_grad():
        assert (narrow(IMAGE) - reference(IMAGE)).abs().max() < 1e-9
        assert (narrow(IMAGE) - model(IMAGE)).abs().max() > 1e-6
    assert model.get_submodule(name).out_channels == width
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in model.parameters())


def test_narrow_output_fill_and_linear_with_bias() -> None:
    model = randomise(LeNet5())
    x = torch.randn(2, 1, 28, 28).double()
    keep = list(range(20))
    narrow = narrow_output(model, x, "fc1", keep, fill=torch.zeros(10))
    reference = randomise(LeNet5())
    reference.load_state_dict(model.state_dict())
    reference.fc1.weight.data[20:] = 0
    reference.fc1.bias.data[20:] = 0
    assert (narrow(x) - reference(x)).abs().max() < 1e-9
    reference.fc1.bias.data.copy_(model.fc1.bias)
    assert (narrow_output(model, x, "fc1", keep)(x) - reference(x)).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["fc1", "conv2"])
def test_narrow_input_equals_zero_columns(name: str) -> None:
    model = randomise(LeNet5())
    x = torch.randn(2, 1, 28, 28).double()
    keep = list(range(0, model.get_submodule(name).weight.shape[1], 2))
    narrow = narrow_input(model, name, keep)
    reference = randomise(LeNet5())
    reference.load_state_dict(model.state_dict())
    reference.get_submodule(name).weight.data[:, 1::2] = 0
    assert (narrow(x) - reference(x)).abs().max() < 1e-9


def test_refusals() -> None:
    model = LeNet5()
    with pytest.raises(SurgeryError, match="did you mean 'conv1'"):
        get_module(model, "conv11")
    with pytest.raises(SurgeryError, match=r"0\.\.5"):
        narrow_input(model, "conv2", [6])
    with pytest.raises(SurgeryError, match="one constant for each of 2"):
        ScatterChannels([0], 3, [1.0])
    replace_module(model, "fc2", nn.Identity())
    assert isinstance(model.fc2, nn.Identity)
