"""Runtimes by name, what they compute, and the errors of those that are missing. No test looks at a real duration."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.errors import ConfigurationError, DataError, FileFormatError, ModelError
from efficientdnns.measurement import measure_latency, runtimes, speedup
from efficientdnns.measurement.latency import Eager, Runner
from efficientdnns.measurement.runtimes import (
    Compiled,
    OnnxRuntime,
    available,
    feed,
    open_session,
    runner,
    runtime_name,
)

HAS_ONNX = "onnxruntime" in available()
HAS_COMPILER = "torch-compile" in available()
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is not installed")
X = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    torch.manual_seed(0)
    return ed.models.build("lenet5").eval()


@pytest.fixture(scope="module")
def onnx_lenet(lenet) -> OnnxRuntime:
    """One export for all tests of this file."""
    return OnnxRuntime(lenet, X)


def test_names_and_short_names():
    assert [runtime_name(n) for n in ("eager", "compile", "onnx", "ort")] == [
        *("pytorch-eager", "torch-compile", "onnxruntime", "onnxruntime")
    ]
    assert isinstance(runner("eager", nn.Identity(), X), Eager)
    with pytest.raises(ConfigurationError, match="did you mean 'onnxruntime'"):
        runner("onnxruntme", nn.Identity(), X)
    with pytest.raises(ConfigurationError, match="no runtime is called 'tensorrt'"):
        available(["tensorrt"])


@needs_onnx
def test_onnxruntime_computes_the_same_at_any_batch_with_the_given_threads(lenet, onnx_lenet):
    assert isinstance(onnx_lenet, Runner)
    inputs = torch.randn(3, 1, 28, 28)
    with onnx_lenet.opened(inputs, threads=1) as once:
        (output,) = once()
    torch.testing.assert_close(torch.from_numpy(output), lenet(inputs), rtol=1e-4, atol=1e-5)
    options = open_session(onnx_lenet.path, 2).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


@needs_onnx
def test_eager_and_onnxruntime_are_measured(lenet, onnx_lenet):
    twin = copy.deepcopy(lenet)
    for pair in ([lenet, twin], [onnx_lenet, OnnxRuntime(onnx_lenet.path)]):
        before, after = measure_latency(pair, X, threads=1, batch=2, repeats=5, seconds=0.1)
        assert before.runtime == after.runtime == ("onnxruntime" if pair[0] is onnx_lenet else "pytorch-eager")
        assert (before.threads, before.batch, before.runs) == (1, 2, 5)
        assert 0 < before.p10 <= before.median <= before.p90
        assert speedup(before, after).low > 0


@needs_onnx
def test_a_network_is_exported_once_and_the_file_goes_with_the_runner(lenet, monkeypatch):
    from efficientdnns.deployment import onnx

    written = []

    def write(model, example_input, path, **options):
        written.append((model, options["dynamic_batch"]))
        path.write_bytes(b"")
        return path

    monkeypatch.setattr(onnx, "write_onnx", write)
    made = OnnxRuntime(lenet, X)
    path = made.path
    assert made.path == path
    assert path.is_file()
    assert written == [(lenet, True)]
    del made
    assert not path.exists()


@needs_onnx
def test_what_onnxruntime_cannot_open_or_run_is_one_line(onnx_lenet, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    for path in (tmp_path / "broken.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(FileFormatError, match=path.name) as caught, OnnxRuntime(path).opened(X, 1):
            pass
        assert "\n" not in str(caught.value)
    with (
        pytest.raises(ModelError, match=r"ONNX Runtime cannot run model\.onnx"),
        onnx_lenet.opened(torch.zeros(1, 3, 28, 28), 1),
    ):
        pass
    with pytest.raises(DataError, match="takes 1 inputs"):
        feed(open_session(onnx_lenet.path, 1), (X, X))


def test_a_missing_package_is_one_line(monkeypatch):
    from efficientdnns.deployment import extras

    monkeypatch.setattr(extras, "missing", lambda *packages: ["onnxruntime"])
    with pytest.raises(ConfigurationError, match="onnxruntime is not installed; write pip install"):
        runner("onnxruntime", nn.Identity(), X)
    assert "onnxruntime" not in available()


def test_a_missing_compiler_is_one_line(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ConfigurationError, match=r"torch-compile needs a C\+\+ compiler") as caught:
        runner("compile", nn.Identity(), X)
    assert "\n" not in str(caught.value)
    assert "torch-compile" not in available()


def test_compilation_is_not_timed_and_the_kept_kernels_are_dropped(monkeypatch):
    calls, dropped = [], []
    monkeypatch.setattr(runtimes, "_need_compiler", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: lambda x: calls.append(dynamic) or model(x))
    monkeypatch.setattr(torch.compiler, "reset", lambda: dropped.append(len(calls)))
    model = nn.Linear(3, 2).train()
    with Compiled(model).opened(torch.zeros(1, 3), threads=1) as once:
        assert calls == [False]  # compiled before anybody could have looked at the clock
        once()
        assert not dropped
    assert len(calls) == 2
    assert dropped == [2]
    assert model.training


def test_a_network_that_cannot_be_compiled_is_one_line(monkeypatch):
    from torch._dynamo.exc import InternalTorchDynamoError

    def fail(x):
        raise InternalTorchDynamoError("no way\nand pages of advice")

    monkeypatch.setattr(runtimes, "_need_compiler", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: fail)
    with (
        pytest.raises(ModelError, match=r"torch\.compile cannot compile Linear: no way$"),
        Compiled(nn.Linear(3, 2)).opened(torch.zeros(1, 3), 1),
    ):
        pass


@pytest.mark.skipif(not HAS_COMPILER or sys.platform == "win32", reason="there is no C++ compiler")
def test_torch_compile_really_compiles():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    inputs = torch.randn(2, 4)
    with Compiled(model).opened(inputs, threads=1) as once:
        assert torch._dynamo.utils.counters["frames"]["ok"] >= 1
        torch.testing.assert_close(once(), model(inputs))


@needs_onnx
def test_integer_layers_run_in_integers(digits, trained):
    step = ed.Int8Quantization(calibration_samples=32)
    model = ed.compress(trained, digits, [step], quiet=True, latency=False).model
    onnx = pytest.importorskip("onnx")
    runtime = OnnxRuntime(model, digits.example_input)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(runtime.path).graph.node}
    assert measure_latency([runtime], digits.example_input, repeats=2)[0].runtime == "onnxruntime"
