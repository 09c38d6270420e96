"""Winograd convolution: equal to the convolution for every tile, and the layer that does it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from efficientdnns.errors import ConfigurationError
from efficientdnns.parts.winograd import (
    WinogradConv2d,
    has_winograd_form,
    prune_winograd,
    winograd_conv2d,
    winograd_matrices,
    winograd_transform,
)


def test_the_matrices_of_two_by_two_tiles() -> None:
    bt, g, at = winograd_matrices(2, 3)
    assert g.tolist() == [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
    assert bt[:3].tolist() == [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0]]
    # The last row is written with either sign, and so is the last column of A^T.
    assert bt[3].tolist() == [0, -1, 0, 1]
    assert at.tolist() == [[1, 1, 1, 0], [0, 1, -1, 1]]


@pytest.mark.parametrize(
    ("m", "k", "tolerance"), [(2, 3, 1e-5), (4, 3, 1e-3), (2, 5, 1e-3), (6, 3, 1e-2), (2, 2, 1e-5)]
)
@pytest.mark.parametrize(("padding", "groups"), [(0, 1), (1, 1), ((2, 1), 2), (1, 4)])
def test_equals_the_convolution(m, k, tolerance, padding, groups) -> None:
    x, weight, bias = torch.randn(2, 4, 13, 10), torch.randn(8, 4 // groups, k, k) / k, torch.randn(8)
    expected = nn.functional.conv2d(x, weight, bias, padding=padding, groups=groups)
    found = winograd_conv2d(x, weight, bias, m, padding, groups)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_pruning_counts_exactly_and_takes_the_smallest() -> None:
    u = winograd_transform(torch.randn(6, 5, 3, 3), 4)
    assert u.shape == (6, 5, 6, 6)
    pruned = prune_winograd(u, 0.8)
    assert int((pruned == 0).sum()) == round(0.8 * u.numel())
    assert u[pruned == 0].abs().max() <= u[pruned != 0].abs().min()
    assert torch.equal(prune_winograd(u, 0.0), u)


def test_layer_is_the_convolution_and_follows_its_weights() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    layer = WinogradConv2d.of(conv).eval()
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), conv(x), atol=1e-5, rtol=0)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * conv(x), atol=1e-5, rtol=0)
    again = WinogradConv2d(**layer.config())
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x), layer(x))


def test_threshold_prunes_in_the_winograd_domain() -> None:
    conv = nn.Conv2d(3, 4, 3)
    u = winograd_transform(conv.weight, 2).detach()
    threshold = float(u.abs().median())
    layer = WinogradConv2d.of(conv, threshold=threshold).eval()
    assert torch.equal(layer.transformed() == 0, u.abs() <= threshold)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(layer(x), winograd_conv2d(x, conv.weight, conv.bias, 2, transformed=layer.transformed()))


def test_which_convolutions_have_a_winograd_form() -> None:
    assert has_winograd_form(nn.Conv2d(2, 2, 3, padding=1, groups=2))
    for conv in (
        nn.Conv2d(2, 2, 1),
        nn.Conv2d(2, 2, 3, stride=2),
        nn.Conv2d(2, 2, 3, dilation=2),
        nn.Conv2d(2, 2, (3, 5)),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Linear(2, 2),
    ):
        assert not has_winograd_form(conv)


def test_tiles_that_lose_all_precision_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="F\\(9, 5\\)"):
        winograd_conv2d(torch.randn(1, 1, 20, 20), torch.randn(1, 1, 5, 5), m=9)
