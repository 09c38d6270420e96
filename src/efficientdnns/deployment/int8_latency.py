"""Which layers 8-bit integers make faster here, and which they make slower."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from efficientdnns.deployment.extras import need
from efficientdnns.deployment.int8_onnx import integer_file, real_file
from efficientdnns.measurement.inference import Forward, with_batch
from efficientdnns.measurement.latency import NOISE
from efficientdnns.measurement.runtimes import feed, open_session
from efficientdnns.parts.integer_layers import IntegerLayer

WARMUP = 5
"""Calls of each network that do not count."""
RESOLUTION = 2e-3
"""Milliseconds; the profiler counts whole microseconds."""


class LayerLatency(NamedTuple):
    """Milliseconds of one layer within the network, in real numbers and in integers with what quantizes around it."""

    name: str
    real_ms: float
    int8_ms: float

    @property
    def ratio(self) -> float:
        """Integers / real numbers: below 1 integers are faster."""
        return self.int8_ms / self.real_ms


def layer_latencies(
    model: nn.Module,
    example_input: Any,
    *,
    threads: int | None = None,
    batch: int | None = None,
    repeats: int = 60,
    forward: Forward | None = None,
) -> list[LayerLatency]:
    """Time the layers of a network of integer layers in ONNX Runtime, beside the same network in real numbers.

    Both networks run in turn, and ONNX Runtime's profiler says how long each operation took. An integer layer has its
    own rounding to integers on its account, where nothing before it did that already; additions and pools are nobody's.

    Args:
        model: the result of ``int8-quantization``.
        threads: by default those PyTorch is set to.
        batch: samples a call, by default those of ``example_input``.
        repeats: calls of each network; the median counts.

    Returns:
        The integer layers in the order of the network; a layer that the profiler does not name (it was merged into
        another) is left out.
    """
    need("onnx", "onnx", "onnxscript", "onnxruntime")
    example_input = example_input if batch is None else with_batch(example_input, batch)
    names = [name for name, module in model.named_modules() if isinstance(module, IntegerLayer)]
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for kind, make in (("real", real_file), ("int8", integer_file)):
            path = Path(folder) / f"{kind}.onnx"
            path.write_bytes(make(model, example_input, forward=forward).SerializeToString())
            sessions.append(open_session(path, threads or torch.get_num_threads(), profile=path.with_suffix("")))
        for _ in range(WARMUP + repeats):
            for session in sessions:
                session.run(None, feed(session, example_input))
        real, integer = (_times(Path(session.end_profiling())) for session in sessions)
    return [LayerLatency(name, real[name], integer[name]) for name in names if real[name] and integer[name]]


def slower_layers(latencies: Sequence[LayerLatency], noise: float = NOISE) -> list[str]:
    """Names of the layers that integers make slower by more than the share ``noise`` and by more than the `RESOLUTION`
    of the profiler."""
    return [layer.name for layer in latencies if layer.ratio > 1 + noise and layer.int8_ms - layer.real_ms > RESOLUTION]


def _times(profile: Path) -> defaultdict[str, float]:
    """Milliseconds of each layer: the medians of its operations together."""
    operations: defaultdict[str, list[int]] = defaultdict(list)
    for event in json.loads(profile.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and "/" in event["name"]:
            operations[event["name"]].append(event["dur"])
    layers: defaultdict[str, float] = defaultdict(float)
    for name, microseconds in operations.items():
        layers[name.partition("/")[0]] += median(microseconds[WARMUP:] or microseconds) / 1e3
    return layers
