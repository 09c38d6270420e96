"""Latency that was measured: several networks interleaved in one run, so that a noisy machine cancels out.

A runtime is a :class:`Runner`. The one here is eager PyTorch; `measurement.runtimes` has others (a compiled network, ONNX
Runtime). Each is one class with the same two members, handed to :func:`measure_latency` instead of networks.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from efficientdnns.errors import ConfigurationError
from efficientdnns.measurement.inference import (
    Forward,
    batch_size,
    call,
    device_of,
    evaluating,
    to_device,
    with_batch,
)
from efficientdnns.storage import keeping_memory

SHORTEST_SAMPLE = 1e-3
"""Seconds that one timed sample lasts at least; faster networks are called several times in a sample."""
FEWEST_RUNS = 5
"""Samples of each network that are taken even when the time is up, and below which no difference is claimed."""
NOISE = 0.03
"""Differences up to this share are never claimed."""

_runs = itertools.count(1)


class Latency(BaseModel):
    """Milliseconds of one call, over the samples of one run.

    ``samples`` and ``run`` (which call of :func:`measure_latency` it was) are kept for :func:`speedup` and are not
    written to reports.
    """

    model_config = ConfigDict(frozen=True)

    median: float
    p10: float
    p90: float
    runtime: str
    threads: int
    batch: int
    runs: int
    """Samples taken."""
    samples: tuple[float, ...] = Field(default=(), exclude=True, repr=False)
    run: int | None = Field(default=None, exclude=True, repr=False)

    @classmethod
    def of(cls, samples: Sequence[float], *, runtime: str, threads: int, batch: int, run: int | None = None) -> Latency:
        """Summarise ``samples`` (milliseconds)."""
        p10, median, p90 = (float(value) for value in np.percentile(samples, [10, 50, 90]))
        return cls(
            median=median,
            p10=p10,
            p90=p90,
            runtime=runtime,
            threads=threads,
            batch=batch,
            runs=len(samples),
            samples=tuple(samples),
            run=run,
        )

    def __str__(self) -> str:
        where = f"{self.runtime}, batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.median:.3g} ms ({self.p10:.3g}-{self.p90:.3g}; {where})"


@runtime_checkable
class Runner(Protocol):
    """One network in one runtime."""

    runtime: str
    """Its name in reports, for instance ``"pytorch-eager"``."""

    def opened(self, inputs: Any, threads: int) -> AbstractContextManager[Callable[[], object]]:
        """Prepare everything that is not to be timed (conversion of the inputs, compilation, a session with ``threads``
        threads) and yield the function that computes the outputs once and returns when they are ready."""
        ...


class Eager:
    """Eager PyTorch: evaluation mode, inference mode, the network's own device."""

    runtime = "pytorch-eager"

    def __init__(self, model: nn.Module, forward: Forward | None = None) -> None:
        self.model, self.forward = model, forward or call

    @contextmanager
    def opened(self, inputs: Any, threads: int) -> Iterator[Callable[[], object]]:
        """See :class:`Runner`; on an accelerator every call waits for the device."""
        device = device_of(self.model)
        inputs = to_device(inputs, device)

        def once() -> object:
            return self.forward(self.model, inputs)

        def once_and_wait() -> object:
            output = once()
            torch.accelerator.synchronize(device)
            return output

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with evaluating(self.model), torch.inference_mode():
                yield once if device.type == "cpu" else once_and_wait
        finally:
            torch.set_num_threads(before)


class Plain:
    """Any function of the inputs, timed as it is."""

    runtime = "callable"

    def __init__(self, function: Callable[[Any], object]) -> None:
        self.function = function

    @contextmanager
    def opened(self, inputs: Any, threads: int) -> Iterator[Callable[[], object]]:
        """See :class:`Runner`; PyTorch's thread count is set, in case the function uses it."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield lambda: self.function(inputs)
        finally:
            torch.set_num_threads(before)


def measure_latency(
    models: Sequence[nn.Module | Runner | Callable[[Any], object]],
    example_input: Any,
    *,
    repeats: int = 100,
    warmup: int = 5,
    threads: int | None = None,
    batch: int | None = None,
    seconds: float = 5.0,
    forward: Forward | None = None,
) -> list[Latency]:
    """Time ``models`` in turn, each once a round and in random order, and summarise the samples of each.

    A sample is the mean of as many calls as take :data:`SHORTEST_SAMPLE`, found beforehand for each network. The
    garbage collector rests meanwhile. Training flags, threads and the random state are restored.

    Args:
        models: networks (timed in eager PyTorch), runners of other runtimes, or plain functions of the input.
        example_input: a tensor, a tuple (arguments) or a mapping (keywords).
        repeats: samples of each network.
        warmup: untimed calls of each network first.
        threads: CPU threads, by default those PyTorch is set to.
        batch: samples per call; ``example_input`` is cut or repeated to it. By default as it is.
        seconds: stop after about this long, though not before :data:`FEWEST_RUNS` samples of each.
        forward: ``forward(model, inputs)`` for networks where calling the model is not enough.

    Raises:
        ConfigurationError: a number that makes no sense.
    """
    for name, value in (("repeats", repeats), ("threads", threads), ("batch", batch)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} is {value}, expected at least 1")
    threads = torch.get_num_threads() if threads is None else threads
    inputs = example_input if batch is None else with_batch(example_input, batch)
    runners = [_runner(model, forward) for model in models]
    with ExitStack() as stack:
        calls = [stack.enter_context(runner.opened(inputs, threads)) for runner in runners]
        stack.enter_context(_no_garbage_collection())
        stack.enter_context(keeping_memory())
        samples = _interleave(calls, repeats=repeats, warmup=warmup, seconds=seconds)
    run = next(_runs)
    size = batch or batch_size(inputs)
    return [
        Latency.of(taken, runtime=runner.runtime, threads=threads, batch=size, run=run)
        for runner, taken in zip(runners, samples, strict=True)
    ]


def _runner(model: Any, forward: Forward | None) -> Runner:
    if isinstance(model, nn.Module):
        return Eager(model, forward)
    return model if isinstance(model, Runner) else Plain(model)


def _interleave(
    calls: Sequence[Callable[[], object]], *, repeats: int, warmup: int, seconds: float
) -> list[list[float]]:
    """Milliseconds per call of each function, sampled in turn, in another order every round.

    In a fixed order, the operating system's time slices would hit the same function round after round, on a machine
    that does other work too.
    """
    for _ in range(warmup):
        for function in calls:
            function()
    loops = [_loops(function) for function in calls]
    samples: list[list[float]] = [[] for _ in calls]
    turns, shuffle = list(zip(calls, loops, samples, strict=True)), random.Random(0).shuffle
    end = perf_counter() + seconds
    for done in range(repeats):
        if done >= FEWEST_RUNS and perf_counter() > end:
            break
        shuffle(turns)
        for function, count, taken in turns:
            taken.append(1e3 * _time(function, count) / count)
    return samples


def _loops(function: Callable[[], object]) -> int:
    """Calls that together take :data:`SHORTEST_SAMPLE`; the best of three, since a slow one makes it too small."""
    count = 1
    while (taken := min(_time(function, count) for _ in range(3))) < SHORTEST_SAMPLE:
        count = max(count + 1, math.ceil(count * min(10.0, 1.1 * SHORTEST_SAMPLE / max(taken, 1e-9))))
    return count


def _time(function: Callable[[], object], count: int) -> float:
    start = perf_counter()
    for _ in range(count):
        function()
    return perf_counter() - start


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Speedup:
    """How many times faster ``after`` is than ``before``, with a 95 % interval; below 1 it is slower.

    ``str()`` gives ``"1.83x faster (1.76-1.91)"``, ``"1.20x slower (1.15-1.24)"`` or
    ``"no measurable difference (0.98x, within noise)"``.
    """

    ratio: float
    low: float
    high: float
    significant: bool

    def __str__(self) -> str:
        if not self.significant:
            return f"no measurable difference ({self.ratio:.2f}x, within noise)"
        if self.ratio > 1:
            return f"{self.ratio:.2f}x faster ({self.low:.2f}-{self.high:.2f})"
        return f"{1 / self.ratio:.2f}x slower ({1 / self.high:.2f}-{1 / self.low:.2f})"


def speedup(before: Latency, after: Latency) -> Speedup:
    """Return the median over the rounds of before / after, with a bootstrapped interval.

    Each round timed both networks one after the other, so a disturbance that hit both cancels out, and one that hit
    either as often as the other leaves the median of the ratios where it is; the quotient of the two medians would jump
    with every second sample disturbed. The difference is significant if the whole 95 % interval lies more than
    :data:`NOISE` (3 %) away from 1, on one side, over at least :data:`FEWEST_RUNS` rounds. The result is the same every
    time.

    Raises:
        ConfigurationError: the two were not measured together by one :func:`measure_latency`, in one runtime.
    """
    if before.run is None or before.run != after.run or len(before.samples) != len(after.samples):
        raise ConfigurationError(
            "these latencies were not measured together, so machine noise may differ; "
            "write measure_latency([before, after], example_input)"
        )
    if before.runtime != after.runtime:
        raise ConfigurationError(
            f"before ran in {before.runtime} and after in {after.runtime}; measure both in the same runtime"
        )
    ratios = np.array(before.samples) / np.array(after.samples)
    rounds = len(ratios)
    drawn = np.random.default_rng(0).integers(rounds, size=(2000, rounds))
    low, high = (float(value) for value in np.percentile(np.median(ratios[drawn], axis=-1), [2.5, 97.5]))
    beyond_noise = low > 1 + NOISE or high < 1 / (1 + NOISE)
    return Speedup(float(np.median(ratios)), low, high, bool(beyond_noise and rounds >= FEWEST_RUNS))
