"""Dead channels and inputs go without a trace in the outputs."""

from __future__ import annotations

import torch
from torch import nn

from efficientdnns.models import build
from efficientdnns.parts.dead import (
    remove_constant_channels,
    remove_dead_channels,
    remove_dead_inputs,
    remove_without_effect,
)


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(x.double())


def test_channels_that_are_silent_or_unread_are_removed_with_all_that_feeds_them() -> None:
    model = build("lenet5").eval()
    x = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        model.conv1.weight[:3] = 0
        model.conv1.bias[:3] = 0
        model.fc1.weight[:, 16 * 5 : 16 * 9] = 0
        model.fc2.weight[:, :100] = 0
        model.conv2.weight[9:, 10] = 0
        model.conv2.weight[:5, 10] = 0  # conv1's map 10 is now read by conv2's dead filters alone
    smaller = remove_dead_channels(model, x[:1])
    assert smaller.conv1.out_channels == 16
    assert smaller.conv2.out_channels == 46
    assert smaller.fc1.weight.shape == (400, 46 * 16)
    torch.testing.assert_close(outputs(smaller, x), outputs(model, x))


def test_silent_channels_stay_where_the_activation_turns_zero_into_something() -> None:
    x = torch.randn(3, 5)
    for activation, left in ((nn.Sigmoid(), 8), (nn.Tanh(), 6)):
        model = nn.Sequential(nn.Linear(5, 8), activation, nn.Linear(8, 2))
        with torch.no_grad():
            model[0].weight[:2] = 0
            model[0].bias[:2] = 0
        smaller = remove_dead_channels(model, x)
        assert smaller[0].out_features == left
        torch.testing.assert_close(outputs(smaller, x), outputs(model, x))


def test_one_channel_stays_when_all_are_dead() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[2].weight.zero_()
    smaller = remove_dead_channels(model, torch.randn(1, 5))
    assert smaller[0].out_features == 1


def test_what_a_zero_switches_off_goes_with_it() -> None:
    """The first convolution still makes something of the channels that the depthwise one sets to zero."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter[2:5] = 0
    x = torch.randn(2, 3, 6, 6)
    assert remove_without_effect(model, x, {"2": torch.tensor([1, 2])}) is model, "channel 1 has an effect"
    smaller = remove_without_effect(model, x, {"2": torch.tensor([2, 3, 4])})
    assert smaller[0].out_channels == smaller[2].groups == smaller[4].in_channels == 5
    torch.testing.assert_close(outputs(smaller, x), outputs(model, x))


def test_nothing_dead_gives_the_network_itself() -> None:
    model = build("lenet-300-100")
    assert remove_dead_channels(model, torch.randn(1, 1, 28, 28)) is model
    assert remove_dead_inputs(model, ["fc1", "fc2"]) is model


def test_unread_inputs_are_dropped() -> None:
    model = build("lenet-300-100").eval()
    x = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        model.fc1.weight[:, 200:] = 0
        model.fc2.weight.zero_()
    smaller = remove_dead_inputs(model, ["fc1", "fc2", "relu1", "gone"])
    assert smaller.fc1[1].in_features == 200
    assert smaller.fc2[1].in_features == 1
    torch.testing.assert_close(outputs(smaller, x), outputs(model, x))


def test_constant_channels_go_and_leave_their_constants() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(180, 3),
    )
    model[0].weight.data[[1, 4]] = 0
    model[0].bias.data[[1, 4]] = torch.tensor([0.7, 0.3])  # seen through padding: one stays as carrier
    model[2].weight.data[[0, 3]] = 0
    model[2].bias.data[[0, 3]] = torch.tensor([0.5, 0.2])  # read without padding: both go
    x = torch.randn(4, 1, 6, 6)
    smaller = remove_constant_channels(model, x[:1])
    assert smaller[0].out_channels == 5
    assert smaller[2].out_channels == 3
    torch.testing.assert_close(smaller(x), model(x), atol=1e-5, rtol=1e-5)


def test_zeros_in_the_statistics_of_a_norm_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[2:4] = 0
        model[0].bias[2:4] = 0
        model[2].weight[:, 2:4] = 0
    x = torch.randn(4, 6)
    smaller = remove_dead_channels(model, x)
    torch.testing.assert_close(smaller(x), model(x))
    assert smaller[0].out_features == 8
