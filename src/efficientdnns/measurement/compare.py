"""The same networks in several runtimes, thread counts and batch sizes, each time interleaved in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from efficientdnns.errors import EfficientDNNsError
from efficientdnns.measurement.inference import Forward, batch_size
from efficientdnns.measurement.latency import Latency, Speedup, measure_latency, speedup
from efficientdnns.measurement.runtimes import runner, runtime_name


class Comparison(BaseModel):
    """Several networks in one runtime, with one number of threads and one batch size.

    ``str()`` gives ``"onnxruntime, batch 1, 1 thread: theoretical 2.00x, measured 1.60x faster (1.55-1.66)"``.
    """

    model_config = ConfigDict(frozen=True)

    runtime: str
    threads: int
    batch: int
    latencies: list[Latency] = []
    """One for each network; the first is what the others are compared with."""
    speedups: list[Speedup] = []
    """The first network's latency divided by that of each of the others, with its interval."""
    mac_ratios: list[float] = []
    """The first network's MACs divided by those of each of the others: the speed-up that there would be if only
    arithmetic took time. Empty where MACs are not known."""
    problem: str = ""
    """Why nothing was measured."""

    @classmethod
    def of(cls, latencies: Sequence[Latency], macs: Sequence[int | None] = ()) -> Comparison:
        """Compare latencies that were measured together; ``macs`` are those of the same networks."""
        first = latencies[0]
        counts = [count for count in macs if count]
        known = len(counts) == len(latencies)
        return cls(
            runtime=first.runtime,
            threads=first.threads,
            batch=first.batch,
            latencies=list(latencies),
            speedups=[speedup(first, other) for other in latencies[1:]],
            mac_ratios=[counts[0] / count for count in counts[1:]] if known else [],
        )

    @property
    def realised(self) -> list[float]:
        """Measured speed-up divided by the MAC ratio: the share of the theoretical gain that is real."""
        return [gain.ratio / ratio for gain, ratio in zip(self.speedups, self.mac_ratios)]

    def __str__(self) -> str:
        where = f"{self.runtime}, batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        if self.problem:
            return f"{where}: not measured ({self.problem})"
        if not self.speedups:
            return str(self.latencies[0])
        theory = [f"theoretical {ratio:.2f}x, " for ratio in self.mac_ratios] or [""] * len(self.speedups)
        return f"{where}: " + "; ".join(f"{text}measured {gain}" for text, gain in zip(theory, self.speedups))


def compare_latency(
    models: Sequence[nn.Module],
    example_input: Any,
    *,
    runtimes: Sequence[str] = ("pytorch-eager",),
    threads: Sequence[int] = (),
    batches: Sequence[int] = (),
    macs: Sequence[int | None] = (),
    forward: Forward | None = None,
    repeats: int = 100,
    seconds: float = 5.0,
    lenient: bool = False,
) -> list[Comparison]:
    """Time ``models`` in every runtime, with every number of threads and every batch size.

    Args:
        models: networks. The first is what the others are compared with.
        example_input: a tensor, a tuple (arguments) or a mapping (keywords).
        runtimes: names that :func:`~efficientdnns.measurement.runtimes.runner` knows.
        threads: CPU threads; by default those PyTorch is set to.
        batches: batch sizes; by default that of ``example_input``.
        macs: multiply-accumulates of each model, to set the speed-ups against.
        forward: ``forward(model, inputs)`` where calling a model is not enough.
        repeats, seconds: see :func:`~efficientdnns.measurement.latency.measure_latency`, for each combination.
        lenient: where a network cannot run in a runtime, say so in ``problem`` instead of raising.

    Raises:
        ConfigurationError, ModelError: an unknown or missing runtime, or a network that cannot run in it.
    """
    found: list[Comparison] = []
    for name in [runtime_name(name) for name in runtimes]:
        try:
            runners = [runner(name, model, example_input, forward) for model in models]
            for count in threads or [torch.get_num_threads()]:
                for batch in batches or [batch_size(example_input)]:
                    latencies = measure_latency(
                        runners, example_input, threads=count, batch=batch, repeats=repeats, seconds=seconds
                    )
                    found.append(Comparison.of(latencies, macs))
        except EfficientDNNsError as error:
            if not lenient:
                raise
            count, batch = [*threads, torch.get_num_threads()][0], [*batches, batch_size(example_input)][0]
            found.append(Comparison(runtime=name, threads=count, batch=batch, problem=str(error)))
    return found
