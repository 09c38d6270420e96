"""Frequency-domain dynamic pruning: the transform, the mask rule, bands, and the network that comes out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.measurement.size import nonzero_parameters
from efficientdnns.models import build
from efficientdnns.parts.dct import DCTConv2d, bands, dct_filters, dct_matrix, frequency_conv2d, idct_filters
from efficientdnns.parts.select import layer_weights
from efficientdnns.pruning.frequency_domain_dynamic_pruning import (
    FrequencyDomainDynamicPruning,
    band_factors,
    frequency_macs,
    hysteresis_mask,
    kept_by_band,
    update_probability,
)
from efficientdnns.session import Session

QUICK = {"epochs": 2, "frequency": 4, "learning_rate": 0.01}


def compress(model, task, methods, **options):
    return ed.compress(model, task, methods, quiet=True, latency=False, **options)


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_the_transform_is_orthonormal_and_keeps_energy(k) -> None:
    torch.testing.assert_close(dct_matrix(k) @ dct_matrix(k).T, torch.eye(k), atol=1e-6, rtol=0)
    weight = torch.randn(6, 4, k, k)
    v = dct_filters(weight)
    torch.testing.assert_close(v.norm(), weight.norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(idct_filters(v), weight, atol=1e-6, rtol=0)
    if k == 1:
        torch.testing.assert_close(v, weight)


def test_kernels_that_are_not_square() -> None:
    weight = torch.randn(2, 3, 3, 5)
    torch.testing.assert_close(dct_filters(weight), dct_matrix(3) @ weight @ dct_matrix(5).T, atol=1e-6, rtol=0)
    assert bands(3, 5).max() == 6


@pytest.mark.parametrize(
    ("stride", "padding", "groups", "dilation"), [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (2, 2, 4, 2)]
)
@pytest.mark.parametrize("k", [3, 5])
def test_frequency_convolution_is_the_convolution(k, stride, padding, groups, dilation) -> None:
    conv = nn.Conv2d(4, 8, k, stride, padding, dilation, groups)
    x = torch.randn(2, 4, 13, 11)
    pairs = [(n, n) for n in (stride, padding, dilation)]
    found = frequency_conv2d(x, dct_filters(conv.weight), conv.bias, *pairs, groups)
    torch.testing.assert_close(found, conv(x), atol=1e-4, rtol=0)
    for domain in ("spatial", "frequency"):
        layer = DCTConv2d.of(conv, domain)
        torch.testing.assert_close(layer(x), conv(x), atol=1e-4, rtol=0)
        torch.testing.assert_close(layer.eval()(x), conv(x), atol=1e-4, rtol=0)
        torch.testing.assert_close(layer.to_spatial()(x), conv(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("padding", ["same", "valid", 2])
def test_layers_with_other_paddings(padding) -> None:
    conv = nn.Conv2d(2, 3, 3, padding=padding, padding_mode="reflect")
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(DCTConv2d.of(conv)(x), conv(x), atol=1e-5, rtol=0)


def test_decoded_kernels_follow_every_change_of_the_coefficients() -> None:
    layer = DCTConv2d.of(nn.Conv2d(1, 2, 3)).eval()
    x = torch.randn(1, 1, 5, 5)
    with torch.no_grad():
        before = layer(x)
        layer.weight_dct.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
        layer.load_state_dict(DCTConv2d.of(nn.Conv2d(1, 2, 3)).state_dict())
        torch.testing.assert_close(layer(x), layer.to_spatial()(x))
    layer(x).sum().backward()
    assert layer.weight_dct.grad is not None, "in evaluation mode, too, gradients reach the coefficients"


def test_gradient_of_the_coefficients_is_the_transformed_gradient() -> None:
    conv = nn.Conv2d(2, 3, 3)
    layer = DCTConv2d.of(conv)
    x = torch.randn(4, 2, 6, 6)
    (conv(x).square().sum() + layer(x).square().sum()).backward()
    torch.testing.assert_close(layer.weight_dct.grad, dct_filters(conv.weight.grad), atol=1e-2, rtol=1e-4)


def test_energy_is_in_few_coefficients() -> None:
    line = torch.tensor([1.0, 2.0, 1.0])
    kernel = torch.outer(line, line)[None, None]
    energy = dct_filters(kernel).square().flatten().sort(descending=True).values.cumsum(0) / kernel.square().sum()
    torch.testing.assert_close(energy[:3], torch.tensor([0.790, 0.889, 0.988]), atol=1e-3, rtol=0)
    spatial = kernel.square().flatten().sort(descending=True).values
    assert float(spatial[:3].sum() / spatial.sum()) == pytest.approx(0.667, abs=1e-3)


def test_between_the_thresholds_everything_stays_as_it_was() -> None:
    scores = torch.tensor([0.5, 0.95, 0.95, 1.5, 1.5])
    previous = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    assert hysteresis_mask(scores, previous, 0.9, 1.0).tolist() == [False, True, False, True, True]


def test_refreshes_get_rarer() -> None:
    probabilities = [update_probability(t, 1e-2, 1.0) for t in (0, 100, 1000)]
    assert probabilities[0] == 1.0
    assert probabilities == sorted(probabilities, reverse=True)
    assert update_probability(10_000, 0.0, 1.0) == 1.0


def test_thresholds_of_bands() -> None:
    assert torch.equal(band_factors(3, 3, 1.0, 1.0), torch.ones(3, 3)), "flat"
    for shape in ((1.2, 0.8), (1.0, 0.5), (3.0, 1.0)):
        factors, band = band_factors(5, 5, *shape), bands(5, 5)
        by_band = [float(factors[band == b][0]) for b in range(9)]
        assert by_band == sorted(by_band)
        assert all((factors[band == b] == factors[band == b][0]).all() for b in range(9))


def test_flat_bands_are_the_plain_method_and_rising_ones_keep_low_frequencies(digits) -> None:
    model = nn.Sequential(nn.Conv2d(1, 64, 5), nn.Conv2d(64, 64, 5), nn.Flatten(), nn.Linear(25600, 10))
    nn.init.normal_(model[1].weight)
    options = {"sparsity": 0.8, "skip": ("0", "3")}
    plain = FrequencyDomainDynamicPruning(band_adaptive=False, **options).pruned(model, 20_480)
    flat = FrequencyDomainDynamicPruning(band_shape=(1.0, 1.0), **options).pruned(model, 20_480)
    assert torch.equal(plain[1].weight_dct, flat[1].weight_dct)
    assert int(flat[1].weight_dct.count_nonzero()) == 20_480
    rising = FrequencyDomainDynamicPruning(band_shape=(1.5, 0.5), **options).pruned(model, 20_480)
    kept = kept_by_band(rising[1].weight_dct)
    assert int(rising[1].weight_dct.count_nonzero()) == 20_480
    # Gaussian kernels have Gaussian coefficients, the same in every band.
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 2 * kept[-1]


def test_the_run_leaves_exactly_what_was_asked_as_coefficients(trained, digits) -> None:
    method = FrequencyDomainDynamicPruning(sparsity=0.8, **QUICK | {"epochs": 4})
    result = compress(trained, digits, [method, ed.Fit(epochs=1, learning_rate=0.01)])
    names = ("conv1.weight_dct", "conv2.weight_dct", "fc1.weight", "fc2.weight")
    for name in names:
        weight = result.model.get_parameter(name)
        assert int(weight.count_nonzero()) == weight.numel() - round(0.8 * weight.numel())
    assert result.after.metric.value > result.before.metric.value - 10
    finding = result.report.methods[0].findings
    assert finding["refreshed"] > 5
    assert len(finding["kept_by_band"]["conv2.weight_dct"]) == 9
    assert finding["macs"]["sparse"] < 0.3 * finding["macs"]["dense"]
    # Spatially the kernels are not sparse: the masks are on the coefficients.
    assert result.model.conv2.to_spatial().weight.count_nonzero() > 24_000


def test_pruned_coefficients_come_back(trained, digits) -> None:
    method = FrequencyDomainDynamicPruning(sparsity=0.9, update=(0.0, 1.0), **QUICK)
    session = Session(trained, digits, trained)
    method.prepare(session)
    callback = method.callback(session)
    returned = 0

    class Spy(ed.Callback):
        def batch(self, trainer, batch):
            nonlocal returned
            now = {name: mask.clone() for name, mask in callback.masks.items()}
            if hasattr(self, "before"):
                returned += sum(int((now[n] > self.before[n]).sum()) for n in now)
            self.before = now
            return batch

    session.train([callback, Spy()], epochs=3, batch_size=32, learning_rate=0.02)
    assert returned > 0
    assert session.sparse == set(callback.sizes)


def test_spatial_control_prunes_the_weights_themselves(trained, digits) -> None:
    result = compress(trained, digits, [FrequencyDomainDynamicPruning(transform="spatial", sparsity=0.9, **QUICK)])
    assert {type(m) for m in result.model.modules()} == {type(m) for m in trained.modules()}
    for weight in layer_weights(result.model).values():
        assert int(weight.count_nonzero()) == weight.numel() - round(0.9 * weight.numel())


def test_only_kernels(digits) -> None:
    model = build("small-resnet", in_channels=1)
    result = compress(
        model, digits, [FrequencyDomainDynamicPruning(layers="kernels", sparsity=0.9, epochs=1, frequency=4)]
    )
    kept = result.report.methods[0].findings["kept"]
    assert all(name.endswith("weight_dct") for name in kept)
    assert nonzero_parameters(result.model.get_submodule(next(iter(kept)).rpartition(".")[0])) > 0
    with pytest.raises(ed.ConfigurationError, match="no layer to prune"):
        compress(build("lenet-300-100"), digits, [FrequencyDomainDynamicPruning(layers="kernels")])


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_meets_a_budget(trained, digits, scope) -> None:
    method = FrequencyDomainDynamicPruning(scope=scope, **QUICK)
    result = compress(trained, digits, [method], budget="params=0.5")
    assert 0.48 * nonzero_parameters(trained) < nonzero_parameters(result.model) <= 0.5 * nonzero_parameters(trained)


def test_multiplications_count_the_transform() -> None:
    conv = nn.Conv2d(4, 16, 3, padding=1)
    for domain in ("spatial", "frequency"):
        macs = frequency_macs(nn.Sequential(DCTConv2d.of(conv, domain)), torch.randn(1, 4, 8, 8))
        assert macs == {"dense": 16 * 4 * 9 * 64, "sparse": 16 * 4 * 9 * 64, "transform": 4 * 54 * 64}


def test_frequency_execution_is_saved_and_computes_the_same(trained, digits, tmp_path) -> None:
    fields = QUICK | {"epochs": 1, "sparsity": 0.9}
    results = [
        compress(trained, digits, [FrequencyDomainDynamicPruning(execution=domain, **fields)])
        for domain in ("spatial", "frequency")
    ]
    results[1].save(tmp_path / "out")
    loaded = ed.load(tmp_path / "out")
    assert loaded.conv2.domain == "frequency"
    x = next(iter(digits.evaluation.batches(16))).inputs
    with torch.inference_mode():
        assert torch.equal(loaded(x), results[1].model(x))
        spatial = nn.Sequential(results[1].model.conv1.to_spatial())
        torch.testing.assert_close(spatial(x), results[1].model.conv1(x), atol=1e-4, rtol=1e-4)


def test_refuses_what_does_not_go_together(trained, digits) -> None:
    with pytest.raises(ed.ConfigurationError, match=r"ramp=0\.9 is after freeze=0\.5"):
        compress(trained, digits, [FrequencyDomainDynamicPruning(ramp=0.9, freeze=0.5)])
    with pytest.raises(ed.ConfigurationError, match="skip: no layer is called 'conv9'"):
        compress(trained, digits, [FrequencyDomainDynamicPruning(skip=("conv9",))])
    with pytest.raises(ed.ConfigurationError, match="band_shape"):
        FrequencyDomainDynamicPruning(band_shape=(0.5, 0.5))
