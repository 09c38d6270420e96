"""The profile of a network: everything a report says about it, and the ratio of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict
from torch import nn

from efficientdnns.data.metric import MetricValue
from efficientdnns.measurement.by_layer import LayerSize, layer_sizes
from efficientdnns.measurement.inference import with_batch
from efficientdnns.measurement.latency import Latency, Speedup, measure_latency, speedup
from efficientdnns.measurement.macs import count_macs
from efficientdnns.measurement.memory import peak_memory
from efficientdnns.measurement.size import CountsParameters, nonzero_parameters, parameter_count

Split = Literal["train", "calibration", "evaluation"]


class Measurable(Protocol):
    """What :func:`profile` needs of a task."""

    @property
    def example_input(self) -> Any:
        """Inputs of one sample."""
        ...

    def evaluate(self, model: Any, split: Any = ...) -> MetricValue:
        """Score ``model`` on a split."""
        ...

    def outputs(self, model: Any, inputs: Any) -> Any:
        """Call ``model`` with ``inputs``."""
        ...


class Metric(BaseModel):
    """The task's metric on one split, over ``n`` samples."""

    model_config = ConfigDict(frozen=True)

    name: str
    value: float
    split: str
    n: int
    higher_is_better: bool = True
    unit: str = ""

    def __str__(self) -> str:
        return str(MetricValue(**self.model_dump()))


class Profile(BaseModel):
    """Everything measured about one network; the ``before`` and ``after`` of ``report.json``.

    What cannot be measured is None: MACs, for instance, of a result that is not a network.
    """

    model_config = ConfigDict(frozen=True)

    metric: Metric
    params: int | None = None
    """Weights (`size.py` says what counts)."""
    nonzero_params: int | None = None
    macs: int | None = None
    """Multiply-accumulates of one sample."""
    bytes: int | None = None
    """Size of the weights file: it was written and decoded to the same weights."""
    latency_ms: Latency | None = None
    peak_memory: int | None = None
    """Bytes of live tensors at the peak of a forward pass of one sample."""
    by_layer: list[LayerSize] = []
    """Where they lie, in the order of the network's modules."""

    def ratio(self, after: Profile) -> ProfileRatio:
        """Compare this profile, the one before, with the one ``after``."""

        def times(name: str) -> float | None:
            old, new = getattr(self, name), getattr(after, name)
            return old / new if old is not None and new else None

        together = self.latency_ms and after.latency_ms and self.latency_ms.run == after.latency_ms.run is not None
        return ProfileRatio(
            metric=after.metric.value - self.metric.value,
            params=times("params"),
            nonzero_params=times("nonzero_params"),
            macs=times("macs"),
            bytes=times("bytes"),
            peak_memory=times("peak_memory"),
            latency=speedup(self.latency_ms, after.latency_ms) if together else None,  # type: ignore[arg-type]
        )


class ProfileRatio(BaseModel):
    """Before divided by after: 2.0 is half as much. None where either side was not measured, or after is zero.

    ``metric`` is the difference after - before, in the metric's unit. ``latency`` is None unless both networks were
    measured in one run.
    """

    model_config = ConfigDict(frozen=True)

    metric: float
    params: float | None
    nonzero_params: float | None
    macs: float | None
    bytes: float | None
    peak_memory: float | None
    latency: Speedup | None


def profile(
    model: Any,
    task: Measurable,
    *,
    split: Split = "evaluation",
    latency: bool = True,
    codecs: Mapping[str, Any] | None = None,
    threads: int | None = None,
    batch: int | None = None,
) -> Profile:
    """Measure one network on ``task``. To compare two, measure them together with :func:`profile_many`."""
    profiles, _ = profile_many(
        [model], task, split=split, latency=latency, codecs=[codecs], threads=threads, batch=batch
    )
    return profiles[0]


def profile_many(
    models: Sequence[Any],
    task: Measurable,
    *,
    split: Split = "evaluation",
    latency: bool = True,
    codecs: Sequence[Mapping[str, Any] | None] | None = None,
    threads: int | None = None,
    batch: int | None = None,
) -> tuple[list[Profile], list[Latency]]:
    """Measure several networks on ``task``, their latency interleaved in one run.

    Args:
        models: networks. Anything else that ``task`` can evaluate gets its metric, and its parameters if it has
            ``count_parameters()``; its other figures are None.
        task: gives ``evaluate``, ``example_input`` and ``outputs``.
        split: split of the metric.
        latency: measure latency.
        codecs: for each model, how tensors of its file are coded (state-dict name -> codec).
        threads: CPU threads of the latency run.
        batch: batch size of the latency run, by default that of ``task.example_input``.

    Returns:
        The profiles in order, and the latencies of the networks among them (empty without ``latency``).
    """
    codecs = codecs or [None] * len(models)
    networks = [model for model in models if isinstance(model, nn.Module)]
    latencies: list[Latency] = []
    if latency and networks:
        latencies = measure_latency(networks, task.example_input, threads=threads, batch=batch, forward=task.outputs)
    timed = iter(latencies)
    profiles = []
    for model, codec in zip(models, codecs, strict=True):
        metric = Metric(**task.evaluate(model, split)._asdict())
        if isinstance(model, nn.Module):
            measured = Profile(metric=metric, latency_ms=next(timed, None), **_statics(model, task, codec))
        elif isinstance(model, CountsParameters):
            total, nonzero = model.count_parameters()
            measured = Profile(metric=metric, params=total, nonzero_params=nonzero)
        else:
            measured = Profile(metric=metric)
        profiles.append(measured)
    return profiles, latencies


def _statics(model: nn.Module, task: Measurable, codecs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The figures that are the same on every machine."""
    from efficientdnns.coding import weights_layout

    sample = with_batch(task.example_input, 1)
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    macs = count_macs(model, sample, task.outputs)
    size, tensors = weights_layout(state, dict(codecs or {}))
    return {
        "params": parameter_count(model),
        "nonzero_params": nonzero_parameters(model),
        "macs": macs.total,
        "bytes": size,
        "peak_memory": peak_memory(model, sample, task.outputs),
        "by_layer": layer_sizes(model, macs.by_module, tensors),
    }
