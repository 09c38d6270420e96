"""The formats of optional packages: int8 by torchao, OpenVINO, ExecuTorch; float, integer and coded networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.deployment import export
from efficientdnns.deployment.decomposed import decomposed
from efficientdnns.deployment.simulated import simulated
from efficientdnns.errors import ConfigurationError, ModelError


def weights(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.fixture(scope="module")
def integers(_trained, digits) -> nn.Module:
    method = ed.Int8Quantization(**ed.Int8Quantization.contract_fields)
    return ed.compress(_trained, digits, [method], quiet=True, latency=False).model


@pytest.fixture
def inputs(digits):
    return {
        "samples": next(iter(digits.evaluation.batches(7))).inputs,
        "calibration": [part.inputs for part in digits.calibration.batches(32)],
    }


def test_torchao_is_smaller_than_float(trained, digits, inputs, tmp_path) -> None:
    pytest.importorskip("torchao")
    real = export(trained, digits.example_input, tmp_path, "pt2")
    quantized = export(trained, digits.example_input, tmp_path, "torchao", **inputs)
    assert quantized.bytes < 0.3 * real.bytes
    assert 0 < quantized.max_difference < 0.1 * quantized.largest_output
    with pytest.raises(ConfigurationError, match="calibration data"):
        export(trained, digits.example_input, tmp_path, "torchao")


@pytest.mark.parametrize("format", ["onnx", "pt2", "torchao", "openvino"])
def test_an_integer_network_stays_small_in_every_format(format, trained, integers, digits, inputs, tmp_path) -> None:
    pytest.importorskip({"torchao": "torchao", "openvino": "openvino"}.get(format, "onnxruntime"))
    exported = export(integers, digits.example_input, tmp_path, format, **inputs)
    assert exported.bytes < 0.32 * weights(trained)
    assert exported.max_difference <= 0.05 * exported.largest_output
    assert exported.note == ("exact integer arithmetic" if format == "pt2" else "computes in int8")
    assert exported.max_difference == 0 or format != "pt2"


@pytest.mark.parametrize("options", [{"symmetric": False}, {"activation_bits": 4}, {"per_channel": False}])
def test_integer_layers_in_floating_point_are_the_same_but_for_ties(options, trained, digits) -> None:
    fields = {**ed.Int8Quantization.contract_fields, **options}
    network = ed.compress(trained, digits, [ed.Int8Quantization(**fields)], quiet=True, latency=False).model
    x = next(iter(digits.evaluation.batches(64))).inputs
    with torch.no_grad():
        expected, got = network(x), simulated(network)(x)
    # A tie that falls the other way moves a few outputs by a step of a grid.
    coarse = fields.get("activation_bits", 8) < 8
    assert (expected - got).abs().mean() < (2e-2 if coarse else 1e-3) * expected.abs().max()


def test_layers_without_integer_kernels_are_refused(trained, digits) -> None:
    pytest.importorskip("torchao")
    fields = {**ed.Int8Quantization.contract_fields, "symmetric": False}
    network = ed.compress(trained, digits, [ed.Int8Quantization(**fields)], quiet=True, latency=False).model
    with pytest.raises(ModelError, match="symmetric weights"):
        decomposed(network, signed=False)


def test_openvino_reads_the_float_network_exactly_and_leaves_codes_coded(trained, digits, tmp_path) -> None:
    pytest.importorskip("openvino")
    real = export(trained, digits.example_input, tmp_path, "openvino")
    assert real.max_difference < 1e-5
    assert real.dynamic_batch
    assert (tmp_path / "model.bin").is_file()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.sign() * parameter.abs().mean())
    coded = export(trained, digits.example_input, tmp_path, "openvino")
    assert coded.max_difference < 1e-5
    assert coded.bytes < 0.08 * real.bytes


@pytest.mark.long
def test_executorch(trained, integers, digits, inputs, tmp_path) -> None:
    pytest.importorskip("executorch")
    real = export(trained, digits.example_input, tmp_path, "executorch", **inputs)
    assert real.max_difference < 1e-5
    assert real.batch == 1
    small = export(integers, digits.example_input, tmp_path, "executorch", **inputs)
    assert small.bytes < 0.3 * real.bytes
