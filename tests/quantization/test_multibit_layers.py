import copy

import pytest
import torch
from torch import nn

from efficientdnns.measurement import count_macs, nonzero_parameters, parameter_count
from efficientdnns.parts.binary_codes import binary_product, decode, multibit_quantize, pack_binary
from efficientdnns.quantization.multibit_layers import LatentMultiBit, MultiBitRecurrent, coded_layer, quantize_rows
from efficientdnns.surgery import apply_difference, difference

IDS = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "linear": (lambda: nn.Linear(10, 7), VECTORS),
    "linear without bias": (lambda: nn.Linear(10, 7, bias=False), VECTORS),
    "embedding": (lambda: nn.Embedding(11, 10), IDS),
    "lstm": (lambda: nn.LSTM(10, 8, 2, batch_first=True), VECTORS),
    "lstm, time first": (lambda: nn.LSTM(10, 8, bias=False), VECTORS),
    "lstm, unbatched": (lambda: nn.LSTM(10, 8, batch_first=True), VECTORS[0]),
    "gru": (lambda: nn.GRU(10, 8, 2, batch_first=True), VECTORS),
}
BIDIRECTIONAL = {"both directions": (lambda: nn.LSTM(10, 8, bidirectional=True, proj_size=4), VECTORS)}


def first(output):
    return output[0] if isinstance(output, tuple) else output


def coded(layer, bits=2, activation_bits=None, **options):
    packed = coded_layer(
        layer, bits, activation_bits, options.get("method", "alternating"), options.get("iterations", 2)
    )
    packed.fill(dict(layer.named_parameters()))
    return packed.eval()


def with_coded_weights(layer, bits):
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() == 2:
                parameter.copy_(decode(*multibit_quantize(parameter, bits)))
    return dense.eval()


@pytest.mark.parametrize("name", LAYERS | BIDIRECTIONAL)
@pytest.mark.parametrize("bits", [1, 3])
def test_packed_layers_compute_with_the_decoded_matrices(name, bits):
    build, x = (LAYERS | BIDIRECTIONAL)[name]
    layer = build()
    expected, got = with_coded_weights(layer, bits)(x), coded(layer, bits)(x)
    assert torch.allclose(first(got), first(expected), atol=1e-6)
    if isinstance(layer, nn.LSTM):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got[1], expected[1]))
    if isinstance(layer, nn.GRU):
        assert torch.allclose(got[1], expected[1], atol=1e-6)


@pytest.mark.parametrize("name", ["lstm", "lstm, time first", "lstm, unbatched", "gru"])
def test_the_open_cell_is_the_fused_one(name, monkeypatch):
    build, x = LAYERS[name]
    layer = build()
    fused, opened = coded(layer), coded(layer, activation_bits=2)
    monkeypatch.setattr(opened, "activations", lambda h: h)
    expected = fused(x)
    assert torch.allclose(opened(x)[0], expected[0], atol=1e-5)
    states = zip(opened(x)[1], expected[1]) if isinstance(layer, nn.LSTM) else [(opened(x)[1], expected[1])]
    for a, b in states:
        assert torch.allclose(a, b, atol=1e-5)
    again, more = opened(x, expected[1])[0], fused(x, expected[1])[0]
    assert torch.allclose(again, more, atol=1e-5)


def test_hidden_states_are_coded_for_the_recurrence_and_the_output():
    layer = coded(nn.LSTM(10, 64), activation_bits=2)
    y, (h, _) = layer(VECTORS)
    for state in y.reshape(-1, 64):
        assert len(state.unique()) <= 4
    assert torch.equal(y[-1], h[0])
    step, _ = layer(VECTORS[1:], layer(VECTORS[:1])[1])
    assert torch.allclose(step, y[1:], atol=1e-5)


def test_coding_a_coded_vector_gives_it_back():
    for bits in (1, 2, 3, 4):
        h = quantize_rows(torch.randn(50, 128).tanh(), bits)
        assert torch.allclose(quantize_rows(h, bits), h, atol=1e-5)


def test_gradient_passes_the_coding_unchanged():
    h = torch.randn(4, 16, requires_grad=True)
    (quantize_rows(h, 2) * torch.arange(16)).sum().backward()
    assert torch.equal(h.grad, torch.arange(16.0).expand(4, 16))


def test_an_embedding_row_is_the_coded_row():
    layer = nn.Embedding(11, 10)
    alpha, codes = multibit_quantize(layer.weight, 2)
    assert torch.equal(coded(layer)(IDS), decode(alpha, codes)[IDS])


def test_the_layer_is_a_product_of_codes():
    layer, h = nn.Linear(40, 9, bias=False), torch.randn(5, 40)
    packed = coded(layer, 3, activation_bits=2)
    alpha, codes = multibit_quantize(h, 2)
    product = binary_product(packed.weight_alpha, packed.weight_codes, alpha, pack_binary(codes), 40)
    assert torch.allclose(packed(h), product, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("activation_bits", [None, 2])
def test_latent_layers_compute_what_is_packed_and_train(name, activation_bits):
    build, x = LAYERS[name]
    layer = build()
    latent = LatentMultiBit(layer, coded_layer(layer, 2, activation_bits, "alternating", 2))
    assert {n: p.shape for n, p in latent.named_parameters()} == {n: p.shape for n, p in layer.named_parameters()}
    y = first(latent(x))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in latent.parameters())
    assert torch.allclose(first(latent.packed()(x)), y, atol=1e-5)


def test_the_gradient_is_that_of_the_coded_weight():
    layer = nn.Linear(10, 7, bias=False)
    dense = with_coded_weights(layer, 2)
    latent = LatentMultiBit(layer, coded_layer(layer, 2, None, "alternating", 2))
    latent(VECTORS).square().sum().backward()
    dense(VECTORS).square().sum().backward()
    assert torch.allclose(latent.weight.grad, dense.weight.grad, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS | BIDIRECTIONAL)
def test_rebuilt_from_data(name):
    build, x = (LAYERS | BIDIRECTIONAL)[name]
    layer = build()
    model = nn.Sequential(coded(layer, 2))
    again = apply_difference(nn.Sequential(build()), difference(model, nn.Sequential(layer))).eval()
    again(x)  # a decoded matrix must not outlive its codes
    again.load_state_dict(model.state_dict())
    assert torch.equal(first(again(x)), first(model(x)))


def test_counts_and_sizes():
    layer = nn.LSTM(32, 64)
    packed = coded(layer, 2)
    assert parameter_count(packed) == parameter_count(layer)
    assert nonzero_parameters(packed) == parameter_count(layer)
    bytes_of = {name: t.numel() * t.element_size() for name, t in packed.state_dict().items()}
    assert sum(v for name, v in bytes_of.items() if name.endswith("codes")) == 2 * 256 * (32 + 64) // 8
    assert not any(name.endswith("dense") for name in bytes_of)
    x = torch.randn(5, 1, 32)
    assert count_macs(packed, x, samples=1).total == count_macs(layer, x, samples=1).total


def test_used_under_inference_mode_and_trained_around_afterwards():
    packed = coded(nn.Linear(10, 7))
    with torch.inference_mode():
        packed(VECTORS)
    x = VECTORS.clone().requires_grad_()
    packed(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert torch.equal(copy.deepcopy(packed)(VECTORS), packed(VECTORS))


def test_dropout_between_layers_only_while_training():
    packed = coded(nn.LSTM(10, 32, 2, dropout=0.5), activation_bits=2)
    assert isinstance(packed, MultiBitRecurrent)
    assert torch.equal(packed(VECTORS)[0], packed(VECTORS)[0])
    packed.train()
    assert not torch.equal(packed(VECTORS)[0], packed(VECTORS)[0])
