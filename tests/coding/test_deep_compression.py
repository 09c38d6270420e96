"""Deep Compression: each stage, and the file at the end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.coding import initial_centroids, load_weights, shared_weight_bits
from efficientdnns.coding.deep_compression import CentroidTraining, SharedWeight, adjusted_dropout, threshold_mask
from efficientdnns.parts.select import layer_weights
from efficientdnns.result import state_of


def test_dropout_shrinks_with_the_root_of_the_connections() -> None:
    assert adjusted_dropout(0.5, 25, 100) == 0.25
    assert adjusted_dropout(0.5, 100, 100) == 0.5


def test_threshold_is_quality_times_deviation() -> None:
    weight = torch.tensor([-3.0, -1, 0, 1, 3])
    assert threshold_mask(weight, 1.0).tolist() == [True, False, False, False, True]


def test_centroids_start_evenly_spaced() -> None:
    values = torch.randn(100)
    expected = torch.linspace(float(values.min()), float(values.max()), 8, dtype=torch.float64)
    torch.testing.assert_close(initial_centroids(values, 8), expected)


def test_size_formula_gives_the_papers_rows() -> None:
    conv1 = shared_weight_bits(330, 8, 5, 256) / (500 * 32)
    conv2 = shared_weight_bits(3000, 8, 5, 256) / (25000 * 32)
    assert conv1 == pytest.approx(0.785, abs=0.01)
    assert conv2 == pytest.approx(0.06, abs=0.002)


def test_gradient_of_a_centroid_is_that_of_autograd() -> None:
    weight = nn.Parameter(torch.randn(4, 5).double())
    weight.data[torch.rand(4, 5) < 0.4] = 0
    values = weight.data[weight.data != 0]
    assignments = torch.randint(0, 3, (len(values),))
    shared = SharedWeight(weight, torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64), assignments)
    table = torch.cat([torch.zeros(1).double(), shared.centroids])
    loss = (table[shared.index] ** 2 * torch.arange(20.0).reshape(4, 5)).sum()
    (expected,) = torch.autograd.grad(loss, shared.centroids)
    dense = shared.dense().requires_grad_()
    (gradient,) = torch.autograd.grad((dense**2 * torch.arange(20.0).reshape(4, 5)).sum(), dense)
    torch.testing.assert_close(shared.gradient(gradient), expected)


def test_sharing_survives_training(digits) -> None:
    model = ed.models.build("lenet5")
    weight = model.get_parameter("conv2.weight")
    weight.data[weight.data.abs() < 0.02] = 0
    zeros = weight == 0
    assignments = torch.randint(0, 6, (int((~zeros).sum()),))
    shared = SharedWeight(weight, torch.linspace(-0.1, 0.1, 6), assignments)
    index = shared.index.clone()
    session = ed.Session(model=model, task=digits, original=model)
    session.train([CentroidTraining({"conv2.weight": shared})], epochs=2, learning_rate=0.01, weight_decay=0.1)
    trained = session.model.get_parameter("conv2.weight")
    assert torch.equal(trained == 0, zeros)
    assert len(trained[~zeros].unique()) <= 6
    assert torch.equal(shared.index, index)
    assert not torch.equal(shared.centroids.data, torch.linspace(-0.1, 0.1, 6))


def test_the_file_is_small_and_decodes_to_the_same_network(trained, digits, tmp_path) -> None:
    method = ed.DeepCompression(
        sparsity={"conv*": 0.5, "fc*": 0.95}, prune_epochs=2, share_epochs=1, prune_iterations=2, learning_rate=0.02
    )
    result = ed.compress(trained, digits, [method], quiet=True, latency=False)
    result.save(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size == result.after.bytes
    assert result.before.bytes > 20 * size
    stages = result.report.methods[0].findings["ratio"]
    assert 1 < stages["pruned"] < stages["shared"] < stages["coded"]
    state = state_of(result.model)
    for name, value in load_weights(tmp_path / "model.safetensors").items():
        assert torch.equal(value, state[name])
    for name, weight in layer_weights(result.model).items():
        bits = 8 if name.startswith("conv") else 5
        assert len(weight[weight != 0].unique()) <= 2**bits
    kept = result.report.methods[0].findings["kept"]
    assert 0.01 < kept["fc1.weight"] <= 0.0501  # what fed neurons without outputs went as well
    assert result.after.metric.value > result.before.metric.value - 5


def test_unknown_layers_are_named(trained, digits) -> None:
    with pytest.raises(ed.ConfigurationError, match="no layer is called 'fc9'"):
        ed.compress(trained, digits, [ed.DeepCompression(sparsity={"fc9": 0.5})], quiet=True)


def test_biases_are_shared_and_the_smallest_codec_taken_where_asked(trained, digits, tmp_path) -> None:
    own = {"prune_epochs": 0, "prune_iterations": 1, "share_epochs": 1, "sparsity": 0.9, "bits": {"conv": 4, "fc": 3}}
    plain = ed.compress(trained, digits, ed.DeepCompression(**own), quiet=True, latency=False)
    small = ed.compress(
        trained, digits, ed.DeepCompression(bias_bits=2, coder="smallest", **own), quiet=True, latency=False
    )
    assert small.after.bytes < plain.after.bytes
    biases = {n: p for n, p in small.model.named_parameters() if n.endswith("bias")}
    assert {n: len(p[p != 0].unique()) for n, p in biases.items() if int(p.count_nonzero()) > 8}.keys() >= {"fc1.bias"}
    for name, bias in biases.items():
        values = bias[bias != 0]
        assert len(values.unique()) <= 4 or len(values) <= 8, name
    assert any(len(p.unique()) > 5 for n, p in plain.model.named_parameters() if n.endswith("bias"))
    small.save(tmp_path, exports=())
    images = next(iter(digits.evaluation.batches(16))).inputs
    with torch.inference_mode():
        assert torch.equal(ed.load(tmp_path)(images), small.model(images))


def test_bits_are_needed_for_the_kinds_of_layers_there_are(trained, digits) -> None:
    with pytest.raises(ed.ConfigurationError, match=r"bits lacks \['conv'\]"):
        ed.compress(trained, digits, ed.DeepCompression(bits={"fc": 3}), quiet=True)
    own = {"prune_epochs": 0, "prune_iterations": 1, "share_epochs": 0, "bits": {"fc": 3}}
    model = ed.models.build("lenet-300-100")
    assert ed.compress(model, digits, ed.DeepCompression(**own), quiet=True, latency=False).after.bytes < 40_000
