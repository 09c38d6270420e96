"""Three ways to a network in 8-bit integers for ONNX Runtime, and the float network: bytes, accuracy, latency.

    python benchmarks/int8.py [--model cifar-resnet20] [--weights FILE] [--task cifar10] [--samples 2000]
        [--calibration 512] [--threads 1] [--batch 1] [--rounds 200] [--seconds 30] [--layers]

- ours: int8-quantization, written by `efficientdnns.deployment.int8_onnx`
- onnxruntime: ONNX Runtime's static quantizer (QDQ, uint8 activations, int8 weights per channel), after its own
  preprocessing, which folds batch norms
- torchao: PT2E with the x86 quantizer, through torch.onnx.export(dynamo=True)

All are calibrated on the same images, and their files take turns in one run of ONNX Runtime; ratios are medians over the
float file's. Accuracy is that of the files on the first test images.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from efficientdnns.deployment.graph import trace
from efficientdnns.deployment.int8_latency import layer_latencies
from efficientdnns.deployment.int8_onnx import write_int8_onnx
from efficientdnns.deployment.onnx import open_onnx, write_graph, write_onnx
from efficientdnns.errors import EfficientDNNsError
from efficientdnns.measurement import measure_latency
from efficientdnns.measurement.runtimes import OnnxRuntime
from efficientdnns.parts.integer_layers import IntegerLayer
from efficientdnns.quantization.int8_quantization import Int8Quantization
from efficientdnns.run import make_model, make_task
from efficientdnns.session import Session
from efficientdnns.task import Task


def ours(model: nn.Module, task: Task, samples: int, folder: Path) -> tuple[Path, nn.Module]:
    """Our method and our file."""
    session = Session(model=model, task=task, original=model, label="int8-quantization")
    session = session.branch()
    Int8Quantization(calibration_samples=samples).apply(session)
    return write_int8_onnx(session.model, task.example_input, folder / "ours.onnx"), session.model


def onnxruntimes(source: Path, batches: list[Any], folder: Path) -> Path:
    """ONNX Runtime's static quantizer on the float file."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch.numpy()}

    prepared, path = folder / "prepared.onnx", folder / "onnxruntime.onnx"
    quant_pre_process(source, prepared)
    quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return path


def torchaos(model: nn.Module, example: Any, batches: list[Any], folder: Path) -> Path:
    """torchao's PT2E, exported by PyTorch."""
    from dataclasses import replace

    from torch.export import Dim, export
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    graph = trace(model, example)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(graph.program.module(check_guards=False), quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
        converted = convert_pt2e(prepared)
        program = export(converted, (batches[0][:2],), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    path = folder / "torchao.onnx"
    write_graph(replace(graph, program=program), path)
    return path


def accuracy(path: Path, task: Task, samples: int) -> float:
    """The metric of a file on the first test samples."""
    network = open_onnx(path, torch.get_num_threads())
    return float(task.with_(forward=lambda file, inputs: file(inputs)).evaluate(network, limit=samples).value)


def main() -> None:
    """Build the files, measure them and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="cifar-resnet20")
    parser.add_argument("--weights", default="cifar-resnet20.safetensors")
    parser.add_argument("--task", default="cifar10")
    for name, value in (("samples", 2000), ("calibration", 512), ("threads", 1), ("batch", 1), ("rounds", 200)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--layers", action="store_true", help="also the time of every layer, in real numbers and ours")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = make_task({"name": arguments.task})
    model = make_model({"name": arguments.model, "weights": arguments.weights or None}, task).eval()
    batches = list(Session(model=model, task=task, original=model).calibration(arguments.calibration))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"float": folder / "float.onnx"}
        write_onnx(model, task.example_input, files["float"])
        files["ours"], integer = ours(model, task, arguments.calibration, folder)
        files["onnxruntime"] = onnxruntimes(files["float"], batches, folder)
        try:
            files["torchao"] = torchaos(model, task.example_input, batches, folder)
        except (ImportError, EfficientDNNsError) as error:
            print(f"torchao: {error}")
        runners = [OnnxRuntime(path) for path in files.values()]
        latencies = measure_latency(
            runners,
            task.example_input,
            repeats=arguments.rounds,
            threads=arguments.threads,
            batch=arguments.batch,
            seconds=arguments.seconds,
        )
        raw = sum(layer.weight.numel() for layer in integer.modules() if isinstance(layer, IntegerLayer))
        title = (
            f"{arguments.model}, ONNX Runtime, batch {arguments.batch}, {arguments.threads} thread(s), {raw:,} weights"
        )
        table = Table(*("file", "bytes", "/ weights", "ms (p10-p90)", "ratio", "p10 ratio", "accuracy"), title=title)
        for (route, path), latency in zip(files.items(), latencies):
            size, first = path.stat().st_size, latencies[0]
            table.add_row(
                route,
                f"{size:,}",
                f"{size / raw:.3f}",
                f"{latency.median:.3f} ({latency.p10:.3f}-{latency.p90:.3f})",
                f"{latency.median / first.median:.3f}",
                f"{latency.p10 / first.p10:.3f}",
                f"{accuracy(path, task, arguments.samples):.2f}",
            )
        reference = task.evaluate(integer, limit=arguments.samples).value
        table.add_row("ours (integer layers in PyTorch)", *[""] * 5, f"{reference:.2f}")
        Console(width=120).print(table)
    if arguments.layers:
        layers = Table("layer", "real ms", "int8 ms", "ratio")
        for layer in layer_latencies(integer, task.example_input, threads=arguments.threads, batch=arguments.batch):
            layers.add_row(layer.name, f"{layer.real_ms:.4f}", f"{layer.int8_ms:.4f}", f"{layer.ratio:.2f}")
        Console(width=120).print(layers)


if __name__ == "__main__":
    main()
