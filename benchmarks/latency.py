"""How much of the theoretical gain of structured pruning is real: MACs beside measured latency, in each runtime.

    python benchmarks/latency.py [--models resnet18,vit_b_16] [--keep 0.5,0.25] [--runtimes eager,onnxruntime]
        [--round-to 8] [--rounds 50] [--seconds 20] [--threads 1] [--no-int8] [--layers] [--markdown]

Networks of random weights are narrowed by one ratio everywhere (lowest L1 norms first, really removed, widths that are
multiples of --round-to) until at most the asked share of the MACs is left. The dense network and all narrowed ones take
turns, round after round, in one runtime; "real" is the measured speed-up divided by the ratio of the MACs. int8 is ONNX
Runtime's static quantization of the same files (random calibration data, which does not matter to time), beside the
float dense network in ONNX Runtime in the same run.

"in blocks" is the ratio of the MACs that ONNX Runtime's convolutions really compute: their channels are padded to whole
blocks of 16 (AVX-512) or 8.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from table import show
from torch import Tensor, nn

import efficientdnns as ed
from efficientdnns.budget import solve
from efficientdnns.measurement import count_macs, measure_latency
from efficientdnns.measurement.compare import Comparison
from efficientdnns.measurement.latency import Runner, Speedup
from efficientdnns.measurement.layers import LAYERED, layer_times
from efficientdnns.measurement.runtimes import OnnxRuntime, runner, runtime_name
from efficientdnns.measurement.tables import layer_table, short_speedup
from efficientdnns.parts.structured import WidthCosts, Widths, holders, weakest
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, remove

MODELS = {
    "resnet18": ("torchvision:resnet18", 224),
    "resnet50": ("torchvision:resnet50", 224),
    "mobilenet_v3_small": ("torchvision:mobilenet_v3_small", 224),
    "vit_b_16": ("torchvision:vit_b_16", 224),
    "cifar-resnet56": ("cifar-resnet56", 32),
}


def narrowed(model: nn.Module, example: Tensor, shares: Sequence[float], round_to: int) -> dict[float, nn.Module]:
    """The network at every share of its MACs that can be reached: one ratio for all groups, by L1 norm, in whole
    multiples of ``round_to``."""
    graph = ChannelGraph.trace(model, example)
    weights = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    scores = {group.name: group.reduce(weights) for group in graph.groups if group.size > 1}
    if not scores:
        reasons = "; ".join(f"{kept.operation} in '{kept.module}' {kept.reason}" for kept in graph.kept_whole[:2])
        raise ed.SurgeryError(f"no channels can be removed ({reasons})")
    groups = {name: graph.group(name) for name in scores}
    task = ed.Task(None, kind="regression", example_input=example)
    sizes = {name: group.size for name, group in groups.items()}
    session = Session(model=model, task=task, original=model)
    state = model.state_dict()
    held = {name: [entry for entry in holders(group) if entry[0] in state] for name, group in groups.items()}
    estimate = WidthCosts(session, model, sizes, held)
    offer = Widths.of(scores, round_to=round_to)

    def at(plan: dict[str, int]) -> nn.Module:
        gone = {name: weakest(scores[name], sizes[name] - width) for name, width in plan.items() if width < sizes[name]}
        return remove(model, example, gone, graph, verify=False) if gone else model

    def measure(plan: dict[str, int]) -> dict[str, float]:
        return {"macs": float(count_macs(at(plan), example).total)}

    total = float(count_macs(model, example).total)
    found: dict[float, nn.Module] = {}
    for share in shares:
        try:
            plan, _ = solve({"macs": share * total}, offer.propose, estimate, measure, offer.least, offer.full)
        except ed.BudgetError as error:
            Console(stderr=True).print(f"{100 * share:g} %: {error}", highlight=False)
            continue
        found[share] = at(plan)
    return found


def blocked_macs(model: nn.Module, example: Tensor) -> int:
    """MACs with the channels of every convolution padded to whole blocks, as ONNX Runtime's blocked layout computes them
    (the inputs of a convolution that has fewer than a block are left as they are)."""
    block = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    total = 0.0
    for name, macs in count_macs(model, example).by_module.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            outputs, inputs = module.out_channels, module.in_channels // module.groups
            padded = -(-inputs // block) * block if inputs >= block else inputs
            macs = macs * (-(-outputs // block) * block) * padded / (outputs * inputs)
        total += macs
    return round(total)


def quantized(source: OnnxRuntime, example: Tensor, folder: Path) -> Path:
    """The same ONNX file with int8 weights and activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            generator = torch.Generator().manual_seed(0)
            self.batches = iter([{name: torch.randn(example.shape, generator=generator).numpy()} for _ in range(4)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    prepared, path = folder / f"{source.path.stem}-prepared.onnx", folder / f"int8-{len(list(folder.iterdir()))}.onnx"
    quant_pre_process(str(source.path), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(path),
        Reader("input"),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )
    return path


def measured(
    name: str, spec: str, size: int, options: argparse.Namespace, console: Console
) -> list[tuple[str, float, float, dict[str, tuple[Speedup, float]]]]:
    """Rows of one network: (share, MAC ratio, the same in blocks, runtime -> (speed-up, share that is real))."""
    torch.manual_seed(0)
    model = ed.models.build(spec).eval()
    example = torch.randn(1, 3, size, size)
    by_share = {1.0: model, **narrowed(model, example, [float(x) for x in options.keep.split(",")], options.round_to)}
    networks = list(by_share.values())
    macs = [count_macs(network, example).total for network in networks]
    blocked = [blocked_macs(network, example) for network in networks]
    rows: list[tuple[str, float, float, dict[str, tuple[Speedup, float]]]] = [
        (f"{100 * share:g} %", macs[0] / macs[i], blocked[0] / blocked[i], {}) for i, share in enumerate(by_share)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for runtime in options.runtimes:
            runners: list[Runner] = [runner(runtime, network, example) for network in networks]
            if runtime == "onnxruntime" and options.int8:
                for entry in list(runners):
                    assert isinstance(entry, OnnxRuntime)
                    runners.append(OnnxRuntime(quantized(entry, example, Path(folder))))
            latencies = measure_latency(
                runners,
                example,
                threads=options.threads,
                batch=options.batch,
                repeats=options.rounds,
                seconds=options.seconds,
            )
            found = Comparison.of(latencies, [*macs, *macs][: len(runners)])
            for position, (gain, real) in enumerate(zip(found.speedups, found.realised), start=1):
                label = runtime if position < len(networks) else f"{runtime} int8"
                rows[position % len(networks)][3][label] = (gain, real)
            console.print(f"{name}: {runtime}: " + ", ".join(f"{x.median:.4g} ms" for x in latencies), highlight=False)
            if options.layers and runtime in LAYERED:
                for share, network in by_share.items():
                    times = layer_times(network, example, runtime=runtime, threads=options.threads)
                    console.print(layer_table(f"{name}, {100 * share:g} % of the MACs", times))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--keep", default="0.5,0.25", help="shares of the MACs")
    parser.add_argument("--runtimes", default="pytorch-eager,onnxruntime")
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0, help="limit for each network and runtime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--no-int8", dest="int8", action="store_false")
    parser.add_argument("--layers", action="store_true", help="also where the time goes, by layer")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.runtimes = [runtime_name(name) for name in options.runtimes.split(",")]
    console = Console(stderr=True)
    labels = [label for name in options.runtimes for label in (name, f"{name} int8")]
    labels = [label for label in labels if "int8" not in label or (options.int8 and label.startswith("onnx"))]
    headings = [
        "network",
        "MACs kept",
        "MAC ratio",
        "in blocks",
        *(cell for label in labels for cell in (label, "real")),
    ]
    lines: list[list[str]] = []
    for name in options.models.split(","):
        spec, size = MODELS.get(name, (name, 224))
        try:
            rows = measured(name, spec, size, options, console)
        except ed.EfficientDNNsError as error:
            console.print(f"{name}: {error}", highlight=False)
            lines.append([name, "not measured: see above"])
            continue
        for share, ratio, blocks, found in rows:
            cells = [(short_speedup(f[0]), f"{100 * f[1]:.0f} %") if (f := found.get(x)) else ("", "") for x in labels]
            if found:
                lines.append(
                    [name, share, f"{ratio:.2f}x", f"{blocks:.2f}x", *(cell for pair in cells for cell in pair)]
                )
    caption = f"batch {options.batch}, {options.threads} thread(s), round_to={options.round_to}"
    show(headings, lines, options.markdown, caption)


if __name__ == "__main__":
    main()
