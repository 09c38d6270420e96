"""MACs against formulas worked out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.errors import DataError
from efficientdnns.measurement import count_macs


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def total(model: nn.Module, *inputs: Tensor) -> int:
    return count_macs(model, inputs).total


@pytest.mark.parametrize(
    ("layer", "size", "expected"),
    [
        (nn.Conv1d(4, 6, 3), (10,), 8 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, (3, 5), padding=1), (8, 9), 8 * 7 * 6 * 4 * 15),
        (nn.Conv2d(4, 6, 3, groups=2, stride=2), (9, 9), 4 * 4 * 6 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4, dilation=2), (9, 9), 5 * 5 * 4 * 9),
        (nn.Conv3d(2, 3, 2), (4, 4, 4), 27 * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (5, 5), 25 * 4 * 6 * 9),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (5, 5), 25 * 4 * 3 * 9),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_convolution_per_sample(layer, size, expected, batch):
    channels = layer.in_channels
    assert count_macs(layer, torch.randn(batch, channels, *size)).total == expected
    double = copy.deepcopy(layer).double()
    assert count_macs(double, torch.randn(batch, channels, *size).double()).total == expected


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda a, b: a @ b, [(1, 3, 4), (1, 4, 5)], 60),
        (torch.mm, [(3, 4), (4, 5)], 60),
        (lambda a, b: torch.addmm(torch.zeros(5), a, b), [(3, 4), (4, 5)], 60),
        (torch.bmm, [(2, 3, 4), (2, 4, 5)], 120),
        (lambda a, b: torch.baddbmm(torch.zeros(1), a, b), [(2, 3, 4), (2, 4, 5)], 120),
        (lambda a, b: torch.addbmm(torch.zeros(1), a, b), [(2, 3, 4), (2, 4, 5)], 120),
        (lambda a, b: torch.zeros(3, 5).addmm_(a, b), [(3, 4), (4, 5)], 60),
        (torch.mv, [(3, 4), (4,)], 12),
        (torch.dot, [(4,), (4,)], 4),
        (lambda a, b: torch.einsum("bij,bkj->bik", a, b), [(2, 3, 4), (2, 5, 4)], 120),
        (lambda a, b: a * b + a, [(3, 4), (3, 4)], 0),
        (lambda a, b: F.layer_norm(a, (4,)).softmax(-1), [(3, 4), (3, 4)], 0),
    ],
)
def test_matrix_products(function, shapes, expected):
    inputs = tuple(torch.randn(shape) for shape in shapes)
    assert count_macs(Call(function), inputs, samples=1).total == expected


def test_integer_products_count():
    one = torch.ones(1, 3, 8, 8, dtype=torch.int64)
    assert total(Call(lambda x: F.conv2d(x, torch.ones(2, 3, 3, 3, dtype=torch.int64))), one) == 36 * 2 * 27
    assert total(Call(lambda x: x @ torch.ones(8, 5, dtype=torch.int64)), one) == 24 * 8 * 5


def test_bilinear_counts_both_products():
    assert total(nn.Bilinear(4, 5, 6), torch.randn(1, 4), torch.randn(1, 5)) == 6 * 4 * 5 + 6 * 5


def test_embedding_is_free_and_linear_is_not():
    model = nn.Sequential(nn.Embedding(100, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    assert count_macs(model, torch.zeros(2, 5, dtype=torch.int64)).total == 5 * 8 * 4


GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inference", [False, True])
def test_recurrent_layers(kind, directions, dtype, inference):
    steps, features, hidden = 7, 5, 6
    model = kind(features, hidden, num_layers=2, bidirectional=directions == 2, batch_first=True, dtype=dtype)
    first = hidden * (features + hidden)
    second = hidden * (directions * hidden + hidden)
    with torch.inference_mode(inference):
        inputs = torch.randn(3, steps, features, dtype=dtype)
        assert count_macs(model, inputs).total == steps * GATES[kind] * directions * (first + second)


def test_recurrent_cell_packed_and_projected():
    assert count_macs(nn.LSTMCell(5, 6), torch.randn(3, 5)).total == 4 * 6 * (5 + 6)
    assert count_macs(nn.LSTM(5, 6, proj_size=2), torch.randn(7, 1, 5), samples=1).total == 7 * (24 * (5 + 2) + 2 * 6)
    packed = Call(
        lambda x: lstm(nn.utils.rnn.pack_padded_sequence(x, [4, 2], batch_first=True))[0].data  # six steps in all
    )
    lstm = nn.LSTM(5, 6)
    assert count_macs(packed, torch.randn(2, 4, 5), samples=1).total == 6 * 4 * 6 * (5 + 6)


def encoder_macs(tokens: int, width: int, feed_forward: int) -> int:
    return tokens * (4 * width**2 + 2 * width * feed_forward) + 2 * tokens**2 * width


@pytest.mark.parametrize("heads", [3, 4])  # PyTorch fuses the layer only if the number of heads is even
@pytest.mark.parametrize("batch", [1, 2])
def test_transformer_encoder_layer(heads, batch):
    layer = nn.TransformerEncoderLayer(192, heads, 768, batch_first=True)
    count = count_macs(layer, torch.randn(batch, 197, 192))
    assert count.total == encoder_macs(197, 192, 768)
    assert round(count.total / 1e6, 1) == 102.0
    assert ("aten._transformer_encoder_layer_fwd" in count.by_operation) == (heads == 4)


def test_padding_that_the_fused_encoder_skips_is_not_counted():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 4:] = True
    inputs = {"src": torch.randn(2, 10, 16), "src_key_padding_mask": mask}
    assert count_macs(encoder, inputs).total == encoder_macs(4, 16, 32) + encoder_macs(10, 16, 32)


class Attention(nn.Module):
    """A block that calls the attention kernel directly."""

    def __init__(self, width: int, heads: int, key_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.size, self.key_heads = heads, width // heads, key_heads or heads
        self.qkv = nn.Linear(width, (heads + 2 * self.key_heads) * self.size)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        q, k, v = parts.split([self.heads, self.key_heads, self.key_heads], dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_direct_attention(dtype):
    count = count_macs(Attention(192, 3).to(dtype), torch.randn(1, 197, 192, dtype=dtype))
    assert count.total == 4 * 197 * 192**2 + 2 * 197**2 * 192
    assert round(count.total / 1e6, 1) == 44.0
    assert count.by_module == {"": 2 * 197**2 * 192, "qkv": 3 * 197 * 192**2, "out": 197 * 192**2}


def test_attention_variants_agree():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    expected = 4 * 7 * 9 * (8 + 8)
    model = Call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            assert total(model, query, key, value) == expected
    with torch.inference_mode():
        assert total(model, query.clone(), key.clone(), value.clone()) == expected


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("weights", [False, True])
def test_multi_head_attention(heads, weights):
    attention = nn.MultiheadAttention(12, heads, batch_first=True)
    model = Call(lambda x: attention(x, x, x, need_weights=weights)[0])
    assert count_macs(model.eval(), torch.randn(1, 5, 12)).total == 4 * 5 * 144 + 2 * 25 * 12
    cross = Call(lambda x, y: attention(x, y, y, need_weights=weights)[0])
    assert total(cross, torch.randn(1, 5, 12), torch.randn(1, 7, 12)) == (2 * 5 + 2 * 7) * 144 + 2 * 35 * 12


def test_modules_add_up_and_repeated_calls_count_twice():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Sequential(nn.Linear(4, 2)))
    count = count_macs(model, torch.randn(5, 4))
    assert count.by_module == {"0": 32, "3.0": 8}
    assert sum(count.by_module.values()) == sum(count.by_operation.values()) == count.total == 40


def test_zero_weights_still_count():
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    assert count_macs(layer, torch.randn(1, 4)).total == 16


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))
    model[1].eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    count_macs(model, torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(1)))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model._forward_hooks
    assert torch.is_grad_enabled()


def test_an_error_in_the_network_restores_it_too():
    from torch.nn.modules import module as module_hooks

    model = nn.Linear(3, 3).train()
    with pytest.raises(RuntimeError):
        count_macs(model, torch.randn(1, 4))
    assert model.training
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks


def test_exported_compiled_and_unknown():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 5)).eval()
    example = torch.randn(1, 1, 5, 5)
    expected = 9 * 2 * 9 + 90
    assert total(torch.export.export(model, (example,)).module(), example) == expected
    assert total(torch.compile(model, backend="eager"), example) == expected

    @torch.library.custom_op("efficientdnns_tests::mystery", mutates_args=())
    def mystery(x: Tensor) -> Tensor:
        return x @ x

    count = count_macs(Call(mystery), torch.randn(3, 3))
    assert count.unknown == ("efficientdnns_tests.mystery",)
    assert count.total == 0


def test_forward_adaptor_and_mapping():
    model = nn.Linear(4, 3)
    assert count_macs(model, {"input": torch.randn(2, 4)}).total == 12
    assert count_macs(model, {"pixels": torch.randn(2, 4)}, lambda m, inputs: m(inputs["pixels"])).total == 12
    with pytest.raises(DataError, match="no tensor"):
        count_macs(model, {"input": None})
