"""Integer networks as ONNX files: real integers, small, fused, and right."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.deployment.int8_onnx import may_saturate, write_int8_onnx
from efficientdnns.errors import ModelError
from efficientdnns.parts.integer_layers import IntegerLayer
from efficientdnns.quantization.int8_quantization import Int8Quantization
from efficientdnns.session import Session

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def quantized(model: nn.Module, task: ed.Task, **fields) -> nn.Module:
    session = Session(model=copy.deepcopy(model), task=task, original=model, label="int8-quantization")
    Int8Quantization(calibration_samples=128, **fields).apply(session)
    return session.model.eval()


def opened(path, optimized=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session, x: torch.Tensor) -> torch.Tensor:
    (name,) = (value.name for value in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def fused(path, tmp_path) -> Counter:
    opened(path, tmp_path / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


def raw_weights(model: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, IntegerLayer))


def channels(model: nn.Module) -> int:
    return sum(len(layer.weight) for layer in model.modules() if isinstance(layer, IntegerLayer))


def weights_in(file) -> dict[str, np.ndarray]:
    arrays = (onnx.numpy_helper.to_array(tensor) for tensor in file.graph.initializer)
    return {str(i): array for i, array in enumerate(arrays) if array.dtype == np.int8 and array.ndim > 1}


@pytest.fixture(scope="module")
def small(digits) -> nn.Module:
    torch.manual_seed(0)
    model = ed.models.build("small-resnet", blocks=2)
    ed.fit(model, digits, epochs=1, quiet=True, learning_rate=0.05, batch_size=32)
    return model


@pytest.fixture(scope="module")
def small_int8(small, digits) -> nn.Module:
    return quantized(small, digits)


@pytest.fixture(scope="module")
def small_file(small_int8, digits, tmp_path_factory):
    return write_int8_onnx(small_int8, digits.example_input, tmp_path_factory.mktemp("int8") / "model.onnx")


def inputs(digits, count: int) -> torch.Tensor:
    return torch.cat([batch.inputs for batch in digits.evaluation.batches(count)])[:count]


def test_weights_are_stored_as_they_are(small_int8, small_file) -> None:
    found = list(weights_in(onnx.load(small_file)).values())
    layers = [layer for layer in small_int8.modules() if isinstance(layer, IntegerLayer)]
    assert len(found) == len(layers)
    for layer in layers:
        assert any(np.array_equal(array, layer.weight.numpy()) for array in found)


def test_the_file_is_hardly_larger_than_the_weights(small_int8, small_file, trained, digits, tmp_path) -> None:
    lenet = quantized(trained, digits)
    for model, path in (
        (small_int8, small_file),
        (lenet, write_int8_onnx(lenet, digits.example_input, tmp_path / "a")),
    ):
        layers = sum(isinstance(layer, IntegerLayer) for layer in model.modules())
        # Documented: 12 bytes a channel, 450 a layer with its share of additions, 500 for the rest.
        assert path.stat().st_size <= raw_weights(model) + 12 * channels(model) + 450 * layers + 500
    assert path.stat().st_size <= 1.15 * raw_weights(lenet)


def test_every_operation_is_an_integer_kernel(small_file, tmp_path) -> None:
    operations = fused(small_file, tmp_path)
    assert operations["QLinearConv"] == 9
    assert operations["QLinearAdd"] == 4
    assert operations["QLinearGlobalAveragePool"] == 1
    assert operations["QGemm"] == 1
    assert operations["QuantizeLinear"] == 1, "the input alone"
    assert not {"Conv", "Add", "Relu", "Gemm", "DequantizeLinear", "ReduceMean"} & operations.keys()


def test_outputs_are_those_of_the_integer_layers_but_for_rounding(small, small_int8, small_file, digits) -> None:
    x = inputs(digits, 200)
    with torch.no_grad():
        real, reference = small.eval()(x), small_int8(x)
    deployed = run(opened(small_file), x)
    assert deployed.shape == reference.shape
    # The residual stream is rounded once an addition: no more error than quantization itself makes.
    assert (deployed - reference).pow(2).mean() < (reference - real).pow(2).mean()
    assert (deployed.argmax(1) == reference.argmax(1)).float().mean() >= 0.98


def test_without_additions_only_ties_differ(trained, digits, tmp_path) -> None:
    model = quantized(trained, digits)
    x = inputs(digits, 200)
    session = opened(write_int8_onnx(model, digits.example_input, tmp_path / "lenet.onnx"))
    with torch.no_grad():
        reference = model(x)
    difference = (run(session, x) - reference).abs()
    # A tie that falls the other way moves an output by about a step; most outputs are the same to the last bit but few.
    assert (difference < 1e-5).float().mean() > 0.5
    assert difference.max() < 0.02 * reference.abs().max()


def test_the_batch_is_open_and_the_names_are_kept(small_file, digits) -> None:
    session = opened(small_file)
    assert [value.name for value in session.get_inputs()] == ["input"]
    assert [value.name for value in session.get_outputs()] == ["output"]
    x = inputs(digits, 7)
    one = torch.cat([run(session, sample[None]) for sample in x])
    assert torch.allclose(run(session, x), one, atol=1e-5)


def test_a_layer_that_stays_real_leaves_its_neighbours_integers(small, digits, tmp_path) -> None:
    model = quantized(small, digits, skip=("conv1",))
    path = write_int8_onnx(model, digits.example_input, tmp_path / "mixed.onnx")
    operations = fused(path, tmp_path)
    assert operations["QLinearConv"] == 8
    assert operations["Conv"] == 1
    assert operations["QLinearAdd"] == 4
    x = inputs(digits, 100)
    with torch.no_grad():
        reference = model(x)
    assert (run(opened(path), x).argmax(1) == reference.argmax(1)).float().mean() >= 0.97


def test_ranges_of_each_batch(trained, digits, tmp_path) -> None:
    model = quantized(trained, digits, mode="dynamic")
    path = write_int8_onnx(model, digits.example_input, tmp_path / "dynamic.onnx")
    assert len(weights_in(onnx.load(path))) == sum(isinstance(layer, IntegerLayer) for layer in model.modules())
    x = inputs(digits, 50)
    with torch.no_grad():
        reference = model(x)
    assert (run(opened(path), x) - reference).abs().max() < 0.02 * reference.abs().max()


class Tokens(nn.Module):
    """A linear layer over positions, a product and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.gate, self.last = (
            nn.Linear(8, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(12, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        y = self.second(x) * torch.sigmoid(self.gate(x))
        return self.last(torch.cat([x, y], -1))


def test_linear_layers_over_positions(tmp_path) -> None:
    x = torch.randn(64, 5, 8)
    task = ed.Task.from_tensors(
        train=(x, torch.zeros(64, 5, 3)), evaluation=(x, torch.zeros(64, 5, 3)), kind="regression"
    )
    model = Tokens()
    integer = quantized(model, task)
    path = write_int8_onnx(integer, x[:1], tmp_path / "tokens.onnx")
    with torch.no_grad():
        real, reference = model(x), integer(x)
    deployed = run(opened(path), x)
    assert (deployed - real).abs().max() < 3 * (reference - real).abs().max() + 1e-3
    assert any("MatMulInteger" in name or "QLinearMatMul" in name for name in fused(path, tmp_path))


def test_what_has_no_kernel_is_refused(trained, digits, tmp_path) -> None:
    for fields, word in (({"activation_bits": 4}, "activation_bits: 8"), ({"symmetric": False}, "symmetric: true")):
        with pytest.raises(ModelError, match=word):
            write_int8_onnx(quantized(trained, digits, **fields), digits.example_input, tmp_path / "no.onnx")
    with pytest.raises(ModelError, match="no integer layer"):
        write_int8_onnx(trained, digits.example_input, tmp_path / "no.onnx")
    assert not (tmp_path / "no.onnx").exists()


def test_seven_bits_cannot_saturate_sixteen(trained, digits) -> None:
    assert any(may_saturate(layer) for layer in quantized(trained, digits).modules() if isinstance(layer, IntegerLayer))
    seven = quantized(trained, digits, weight_bits=7)
    assert not any(may_saturate(layer) for layer in seven.modules() if isinstance(layer, IntegerLayer))
