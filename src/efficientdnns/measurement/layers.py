"""Where the time of a network goes, layer by layer, in eager PyTorch and in ONNX Runtime."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from efficientdnns.errors import ConfigurationError
from efficientdnns.measurement.inference import Forward, batch_size, device_of, with_batch
from efficientdnns.measurement.latency import Eager
from efficientdnns.measurement.macs import count_macs
from efficientdnns.measurement.runtimes import feed, open_session, runtime_name

COMPUTING = re.compile(r"Conv|Gemm|MatMul|Attention|LSTM|GRU|RNN")
"""Operations of ONNX Runtime that hold multiply-accumulates."""
OVERHEAD = "(runtime)"
"""Time that belongs to no layer: of ONNX Runtime between operations, and of changes of the memory layout."""


class LayerTime(BaseModel):
    """One layer: what runs in the module itself, not in a child of it."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Path of the module; ``""`` is the network itself, ``"(runtime)"`` no layer."""
    kind: str
    """Class of the module."""
    macs: int
    """Multiply-accumulates of one sample."""
    ms: float
    """Milliseconds of one call of the network: the mean of the middle half of the calls, since profilers count whole
    microseconds."""
    operations: tuple[str, ...] = ()
    """In ONNX Runtime, what ran, with fused operations under the name of the first: ``("Conv",)``."""


class LayerTimes(BaseModel):
    """The layers of one network in one runtime, in order of execution."""

    model_config = ConfigDict(frozen=True)

    runtime: str
    threads: int
    batch: int
    layers: list[LayerTime]

    @property
    def ms(self) -> float:
        """Milliseconds of all layers together."""
        return sum(layer.ms for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers together, for one sample."""
        return sum(layer.macs for layer in self.layers)

    def rows(self) -> Iterator[dict[str, Any]]:
        """For each layer: ``layer``, ``kind``, ``macs``, ``macs_share``, ``ms``, ``time_share`` and ``macs_per_ms``."""
        for layer in self.layers:
            yield {
                "layer": layer.name,
                "kind": layer.kind,
                "macs": layer.macs,
                "macs_share": layer.macs / max(self.macs, 1),
                "ms": layer.ms,
                "time_share": layer.ms / self.ms if self.ms else 0.0,
                "macs_per_ms": layer.macs * self.batch / layer.ms if layer.ms else 0.0,
                "operations": list(layer.operations),
            }


def layer_times(
    model: nn.Module,
    example_input: Any,
    *,
    runtime: str = "pytorch-eager",
    threads: int | None = None,
    batch: int | None = None,
    forward: Forward | None = None,
    repeats: int = 30,
    warmup: int = 3,
) -> LayerTimes:
    """Time every layer of ``model``.

    In eager PyTorch hooks read the clock, which adds some microseconds to each module. In ONNX Runtime its profiler
    does; what it fuses (batch normalisation, activations, residual additions) stands under the convolution or product
    it was fused into.

    Args:
        model: the network; it is not changed.
        example_input: a tensor, a tuple (arguments) or a mapping (keywords).
        runtime: ``"pytorch-eager"`` or ``"onnxruntime"``.
        threads: CPU threads, by default those PyTorch is set to.
        batch: samples per call, by default those of ``example_input``.
        forward: ``forward(model, inputs)`` where calling the model is not enough.
        repeats, warmup: timed and untimed calls.

    Raises:
        ConfigurationError: a runtime that does not tell layers apart. ModelError: the network cannot be exported.
    """
    runtime = runtime_name(runtime)
    if runtime not in _TIMERS:
        raise ConfigurationError(f"{runtime} does not tell layers apart; per layer write {' or '.join(_TIMERS)}")
    threads = torch.get_num_threads() if threads is None else threads
    inputs = example_input if batch is None else with_batch(example_input, batch)
    macs = count_macs(model, with_batch(example_input, 1), forward).by_module
    samples, operations = _TIMERS[runtime](model, inputs, threads, forward, repeats, warmup)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    # Layers that only another runtime sees, or that compute through a parent, keep their MACs in the table.
    names = [*samples, *(name for name in macs if name not in samples)]
    layers = [
        LayerTime(
            name=name,
            kind=kinds.get(name, "-"),
            macs=macs.get(name, 0),
            ms=1e3 * _middle(samples.get(name, ())),
            operations=tuple(operations.get(name, ())),
        )
        for name in names
    ]
    return LayerTimes(runtime=runtime, threads=threads, batch=batch or batch_size(inputs), layers=layers)


def _middle(samples: Sequence[float]) -> float:
    """The mean of the middle half; 0 of nothing."""
    quarter = len(samples) // 4
    middle = sorted(samples)[quarter : len(samples) - quarter]
    return sum(middle) / max(len(middle), 1)


Timed = tuple[Mapping[str, Sequence[float]], Mapping[str, Iterable[str]]]
"""Seconds of every call by module, and the operations that ran by module."""


def _eager(model: nn.Module, inputs: Any, threads: int, forward: Forward | None, repeats: int, warmup: int) -> Timed:
    clock = _Clock(model)
    calls: list[dict[str, float]] = []
    with Eager(model, forward).opened(inputs, threads) as once:
        for _ in range(warmup):
            once()
        with clock.running():
            for _ in range(repeats):
                clock.seconds = defaultdict(float)
                once()
                calls.append(clock.seconds)
    names = dict.fromkeys(name for seconds in calls for name in seconds)
    return {name: [seconds.get(name, 0.0) for seconds in calls] for name in names}, {}


class _Clock:
    """Seconds spent in each module itself, its children left out."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        device = device_of(model)
        self.wait: Callable[[], None] = (
            (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
        )
        self.seconds: dict[str, float] = defaultdict(float)
        self.path: list[tuple[str, float]] = []
        self.inside = [0.0]
        """Seconds spent in the children of each module being called."""

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self.wait()
        self.seconds.setdefault(name := self.names.get(id(module), self.path[-1][0] if self.path else ""), 0.0)
        self.inside.append(0.0)
        self.path.append((name, perf_counter()))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.wait()
        name, start = self.path.pop()
        took = perf_counter() - start
        self.seconds[name] += took - self.inside.pop()
        self.inside[-1] += took

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch every module; global hooks, since hooks on modules switch off PyTorch's fused transformer layers."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _onnxruntime(
    model: nn.Module, inputs: Any, threads: int, forward: Forward | None, repeats: int, warmup: int
) -> Timed:
    with tempfile.TemporaryDirectory(prefix="efficientdnns-") as name:
        folder = Path(name)
        prefix = _export(model, inputs, folder / "model.onnx", forward)
        session = open_session(folder / "model.onnx", threads, folder / "profile", folder / "optimized.onnx")
        arrays = feed(session, inputs)
        for _ in range(warmup + repeats):
            session.run(None, arrays)
        events = json.loads(Path(session.end_profiling()).read_text())
        where = _Places(folder / "model.onnx", folder / "optimized.onnx", dict(model.named_modules()), prefix)
    runs = [event["dur"] for event in events if event["name"] == "model_run"][warmup:]
    kernels: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = event["name"].removesuffix("_kernel_time")
            kernels[node].append(event["dur"] * 1e-6)
            kinds[node] = event["args"]["op_name"]
    samples: dict[str, list[float]] = {}
    operations: dict[str, dict[str, None]] = defaultdict(dict)
    for node, taken in kernels.items():
        # A node's name need not be its own; its events come in turn, equally often in every call.
        each = len(taken) // (warmup + repeats)
        sums = [sum(taken[call * each : (call + 1) * each]) for call in range(warmup, warmup + repeats)]
        layer = where.module(node, kinds[node])
        before = samples.get(layer, [0.0] * len(sums))
        samples[layer] = [a + b for a, b in zip(before, sums)]
        operations[layer][kinds[node]] = None
    between = [max(0.0, 1e-6 * run - sum(taken)) for run, taken in zip(runs, zip(*samples.values()))]
    samples[OVERHEAD] = [a + b for a, b in zip(samples.pop(OVERHEAD, [0.0] * len(between)), between)]
    return samples, operations


def _export(model: nn.Module, inputs: Any, path: Path, forward: Forward | None) -> str:
    """Write an ONNX file that still says which module each operation came from; return what precedes the modules' names
    there, the network being a child of what is exported."""
    from efficientdnns.deployment.graph import quiet, trace

    graph = trace(model, inputs, dynamic_batch=False, forward=forward)
    with quiet():
        program = torch.onnx.export(graph.program, dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    first = next(iter(model.state_dict()), "")
    return min((name for name in graph.program.state_dict if name.endswith(first)), key=len, default="").removesuffix(
        first
    )


class _Places:
    """The module that an operation of ONNX Runtime's optimized graph came from.

    What a node of the exported graph computes with tells its module: the parameter ``conv1.weight`` belongs to
    ``conv1``; where it has no parameter, the module that called it counts. An optimized node is found by its own name,
    by the names of its outputs (which outlive fusion), or by the output it is named after (``relu_1_nchwc``).
    """

    def __init__(self, exported: Path, optimized: Path, modules: Mapping[str, nn.Module], prefix: str) -> None:
        import onnx

        graph = onnx.load(str(exported), load_external_data=False).graph
        self.modules, self.prefix = modules, prefix
        self.weights = {tensor.name for tensor in graph.initializer}
        self.nodes = {node.name: node for node in graph.node}
        self.producers = {output: node for node in graph.node for output in node.output}
        self.outputs = {
            node.name: list(node.output) for node in onnx.load(str(optimized), load_external_data=False).graph.node
        }

    def module(self, name: str, kind: str) -> str:
        """Path of the module of an optimized node of this name and operation."""
        value = re.sub(r"_(nchwc|token_\d+|quant|dequant)$", "", name)
        node = self.nodes.get(name) or next(
            (self.producers[v] for v in (*self.outputs.get(name, ()), value) if v in self.producers), None
        )
        if node is None or "Reorder" in kind:
            return OVERHEAD
        return self._owner(self._computing(node) if COMPUTING.search(kind) else node)

    def _computing(self, node: Any) -> Any:
        """The nearest operation with multiply-accumulates at or before ``node``, into which it was fused."""
        queue, first = [node], node
        for node in queue:
            if COMPUTING.search(node.op_type):
                return node
            if len(queue) < 64:
                queue += [self.producers[value] for value in node.input if value in self.producers]
        return first

    def _owner(self, node: Any) -> str:
        for value in node.input:
            if value in self.weights and (path := self._known(value.rpartition(".")[0])) is not None:
                return path
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        for scope in reversed(re.findall(r"'([^']*)'", scopes)):
            if (path := self._known(scope)) is not None:
                return path
        return ""

    def _known(self, path: str) -> str | None:
        """The module's path in the network, where it is one."""
        if path == self.prefix.rstrip("."):
            return ""
        short = path.removeprefix(self.prefix)
        return short if path.startswith(self.prefix) and short in self.modules else None


_TIMERS: dict[str, Callable[..., Timed]] = {"pytorch-eager": _eager, "onnxruntime": _onnxruntime}
LAYERED = tuple(_TIMERS)
"""The runtimes that tell layers apart."""
