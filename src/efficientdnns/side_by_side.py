"""Networks measured side by side: what `efficientdnns measure` does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from efficientdnns.errors import ConfigurationError
from efficientdnns.fit import make_accelerator
from efficientdnns.measurement.compare import Comparison, compare_latency
from efficientdnns.measurement.layers import LAYERED, LayerTimes, layer_times
from efficientdnns.measurement.macs import count_macs
from efficientdnns.measurement.profile import Profile, profile_many
from efficientdnns.measurement.runtimes import runtime_name
from efficientdnns.measurement.tables import latency_table, layer_table
from efficientdnns.models import check_fits, rebuild
from efficientdnns.run import make_model
from efficientdnns.task import Task


@dataclass
class SideBySide:
    """What was measured; ``names`` are those of the networks in ``comparisons``."""

    profiles: dict[str, Profile]
    names: list[str]
    comparisons: list[Comparison] = field(default_factory=list)
    layers: list[tuple[str, LayerTimes]] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        """As plain data: the profile of a single network, else ``models``; then ``latencies`` and ``layers``."""
        single = next(iter(self.profiles.values())) if len(self.profiles) == 1 else None
        models = [{"model": name, **profile.model_dump()} for name, profile in self.profiles.items()]
        data: dict[str, Any] = single.model_dump() if single else {"models": models}
        if self.comparisons:
            data["latencies"] = [{"models": self.names, **entry.model_dump()} for entry in self.comparisons]
        if self.layers:
            keys = {"runtime", "threads", "batch"}
            data["layers"] = [
                {"model": name, **times.model_dump(include=keys), "layers": list(times.rows())}
                for name, times in self.layers
            ]
        return data

    def tables(self) -> Iterator[Table]:
        """As tables."""
        yield profile_table(self.profiles)
        if self.comparisons:
            yield latency_table(self.names, self.comparisons)
        for name, times in self.layers:
            yield layer_table(name, times)


def side_by_side(
    models: Sequence[str],
    task: Task,
    *,
    weights: str | None = None,
    device: str | None = None,
    runtimes: Sequence[str] = (),
    threads: Sequence[int] = (),
    batches: Sequence[int] = (),
    layers: bool = False,
) -> SideBySide:
    """Measure networks on ``task``: profiles, latencies interleaved in one run, and the time of every layer.

    Args:
        models: names, files or folders of saved results. The first is what the others are compared with. A single
            saved result is compared with the network it was made from, where the library can build that again (its
            weights, and so its metric, are not known).
        weights: a file of weights for the first of them.
        runtimes, threads, batches: what latencies are measured in; see `measurement.compare.compare_latency`. Without any of
            them a single network's latency stands in its profile.
        layers: also time every layer, with the first number of threads and batch size.

    Raises:
        ConfigurationError, ModelError: a network that cannot be built, does not fit the task or the runtime.
    """
    place = make_accelerator(device).device
    networks: dict[str, nn.Module] = {}
    for position, spec in enumerate(models):
        extra = {"weights": weights} if weights and position == 0 else {}
        network = make_model({"name": spec, **extra}, task)
        check_fits(network, task)
        networks[spec if spec not in networks else f"{spec} #{position + 1}"] = network.to(place).eval()
    runtimes = [runtime_name(name) for name in runtimes]
    told = [name for name in runtimes or LAYERED if name in LAYERED] if layers else []
    if layers and not told:
        raise ConfigurationError(
            f"{runtimes[0]} does not tell layers apart; with --layers write {' or '.join(LAYERED)}"
        )
    comparing = bool(runtimes or len(threads) > 1 or batches or len(models) > 1)
    timed = dict(networks)
    if comparing and len(models) == 1 and (original := _original(models[0])) is not None:
        timed = {"before": original.to(place).eval(), "after": networks[models[0]]}
    profiles, _ = profile_many(
        list(networks.values()), task, latency=not comparing, threads=threads[0] if threads else None
    )
    found = SideBySide(dict(zip(networks, profiles)), list(timed))
    example = task.example_input
    if comparing:
        macs = [count_macs(network, example, task.outputs).total for network in timed.values()]
        found.comparisons = compare_latency(
            list(timed.values()),
            example,
            runtimes=runtimes or ("pytorch-eager",),
            threads=threads,
            batches=batches,
            macs=macs,
            forward=task.outputs,
        )
    first: dict[str, Any] = {"threads": threads[0] if threads else None, "batch": batches[0] if batches else None}
    for runtime in told if runtimes else told[:1]:
        for name, network in timed.items():
            times = layer_times(network, example, runtime=runtime, forward=task.outputs, **first)
            found.layers.append((name, times))
    return found


def profile_table(profiles: dict[str, Profile]) -> Table:
    """One column a network."""
    names = list(profiles) if len(profiles) > 1 else ["value"]
    table = Table("", *names)
    columns = list(profiles.values())
    metric = columns[0].metric
    table.add_row(
        f"{metric.name} ({metric.split}, n = {metric.n:,})", *(f"{column.metric.value:.2f}" for column in columns)
    )
    for name in ("params", "nonzero_params", "macs", "bytes", "peak_memory"):
        values = [getattr(column, name) for column in columns]
        table.add_row(name.replace("_", " "), *("-" if value is None else f"{value:,}" for value in values))
    if (x := columns[0].latency_ms) is not None:
        label = f"latency (ms, {x.runtime}, batch {x.batch})"
        table.add_row(label, f"{x.median:.3f} (p10 {x.p10:.3f}, p90 {x.p90:.3f})")
    return table


def listed(text: str | None) -> list[str]:
    """The parts of ``"eager,onnxruntime"``."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def numbers(text: str | None, name: str) -> list[int]:
    """Read ``"1,2"``.

    Raises:
        ConfigurationError: something else than whole numbers from 1.
    """
    parts = listed(text)
    for part in parts:
        if not part.isdigit() or int(part) < 1:
            raise ConfigurationError(f"{name} is {part}, expected at least 1; write e.g. --{name} 1,2")
    return [int(part) for part in parts]


def _original(folder: str) -> nn.Module | None:
    """The network that a saved result was made from, with fresh weights; None where it cannot be known."""
    path = Path(folder) / "structure.json"
    factory = json.loads(path.read_text())["factory"] if path.is_file() else None
    return rebuild(factory) if factory else None
