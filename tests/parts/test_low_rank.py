import pytest
import torch
from torch import nn

from efficientdnns.parts.low_rank import replace_everywhere, round_rank, three_convs, truncated_svd, two_layers, unfold


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(12, 7),
        nn.Linear(12, 7, bias=False),
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(6, 8, 1, stride=2, bias=False),
    ],
)
def test_two_layers_of_full_rank_are_the_layer(layer):
    weight = layer.weight.detach().flatten(1)
    rank = min(weight.shape)
    chain = two_layers(layer, rank, truncated_svd(weight, rank))
    x = torch.randn(4, 12) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 9, 9)
    torch.testing.assert_close(chain(x), layer(x), atol=1e-5, rtol=1e-5)
    assert [type(part) for part in chain] == [type(layer)] * 2


def test_truncation_is_the_best_approximation():
    matrix = torch.randn(10, 15)
    singular = torch.linalg.svdvals(matrix)
    left, right = truncated_svd(matrix, 4)
    torch.testing.assert_close((matrix - left @ right).norm(), singular[4:].norm(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(left.T @ left, torch.eye(4), atol=1e-5, rtol=0)


def test_open_values_have_the_right_shapes_and_draw_no_random_numbers():
    conv = nn.Conv2d(6, 8, 3, padding=2, dilation=2, padding_mode="circular")
    state = torch.get_rng_state()
    chain = three_convs(conv, 2, 3, None)
    assert torch.equal(state, torch.get_rng_state())
    assert [tuple(part.weight.shape) for part in chain] == [(2, 6, 1, 1), (3, 2, 3, 3), (8, 3, 1, 1)]
    assert (chain[1].padding, chain[1].dilation, chain[1].padding_mode) == ((2, 2), (2, 2), "circular")
    assert chain(torch.randn(1, 6, 7, 7)).shape == conv(torch.randn(1, 6, 7, 7)).shape


def test_unfolding_puts_the_mode_into_the_rows():
    kernel = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    assert unfold(kernel, 1).shape == (3, 8)
    assert torch.equal(unfold(kernel, 1)[2], kernel[:, 2].flatten())


def test_ranks_are_never_empty_nor_too_large():
    assert round_rank(0, 10) == 1
    assert round_rank(0, 10, lowest=3) == 3
    assert round_rank(5, 10, multiple_of=4) == 8
    assert round_rank(9, 10, multiple_of=4) == 10


def test_a_shared_module_is_replaced_wherever_it_is_used():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    new = nn.Identity()
    replace_everywhere(model, "0", new)
    assert model[0] is new
    assert model[2] is new
