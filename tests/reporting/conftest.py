"""Reports made up without training, and a browser where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from efficientdnns.measurement.by_layer import LayerSize
from efficientdnns.measurement.compare import Comparison
from efficientdnns.measurement.latency import Latency, Speedup
from efficientdnns.measurement.profile import Metric, Profile
from efficientdnns.result import MethodRecord, Report


def layers(share: float, count: int = 3) -> list[LayerSize]:
    """Layers of which ``share`` of the weights is left."""
    return [
        LayerSize(
            name=f"block.{i}",
            kind="Linear",
            params=1000 * (i + 1),
            nonzero_params=int(1000 * (i + 1) * share),
            macs=1000 * (i + 1),
            bytes=int(4000 * (i + 1) * share),
        )
        for i in range(count)
    ]


def profile(accuracy: float, share: float, milliseconds: float, count: int = 3) -> Profile:
    """A network of which ``share`` is left."""
    found = layers(share, count)
    where = {"runtime": "pytorch-eager", "threads": 1, "batch": 1, "runs": 50}
    return Profile(
        metric=Metric(name="accuracy", value=accuracy, split="test", n=500, unit="%"),
        params=sum(layer.params for layer in found),
        nonzero_params=sum(layer.nonzero_params for layer in found),
        macs=int(1e6 * share),
        bytes=sum(layer.bytes for layer in found),
        latency_ms=Latency(median=milliseconds, p10=0.9 * milliseconds, p90=1.2 * milliseconds, **where),
        peak_memory=10_000,
        by_layer=found,
    )


def _report(
    accuracy: float = 97.0, share: float = 0.5, seed: int = 0, *, method: str = "nisp", count: int = 3, **changes
) -> Report:
    """The report of a network that was pruned to ``share``."""
    before, after = profile(98.0, 1.0, 2.0, count), profile(accuracy, share, 1.0, count)
    gain = Speedup(ratio=2.0, low=1.9, high=2.1, significant=True)
    assert before.latency_ms is not None
    assert after.latency_ms is not None
    timed = Comparison(
        runtime="pytorch-eager",
        threads=1,
        batch=1,
        latencies=[before.latency_ms, after.latency_ms],
        speedups=[gain],
        mac_ratios=[1 / share],
    )
    fields = {"pruning_ratio": 1 - share}
    entry = {"run": method, "learning_rate": 0.1, "split": "calibration", "seconds": 2.0, "steps": 10}
    content = {
        "model": "lenet5",
        "task": "digits",
        "splits": {"train": 1000, "calibration": 100, "test": 500},
        "before": before,
        "after": after,
        "budget": [{"name": "macs", "asked": 6e5, "got": 5e5, "met": True}],
        "methods": [MethodRecord(id=method, fields=fields, seconds=4.0, findings={"kept_whole": ["fc9: an output"]})],
        "seed": seed,
        "environment": {"python": "3.11", "cpu": "a processor", "threads": 1},
        "history": [
            {**entry, "epoch": e, "loss": 1 / e, "accuracy": 90.0 + e, "step_seconds": 0.15} for e in (1, 2, 3)
        ],
        "speedup": vars(gain),
        "latencies": [timed],
        "recipe": {"model": "lenet5", "task": "digits", "seed": seed, "methods": [{method: fields}]},
        "reload_exact": True,
    }
    return Report(**{**content, **changes})


@pytest.fixture(scope="session")
def make_report() -> Callable[..., Report]:
    """`_report`: accuracy, share of the network that is left, seed, and any field of a report."""
    return _report


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a made-up report as a result's folder and return the folder."""

    def written(name: str, report: Report) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(json.loads(report.model_dump_json())))
        return folder

    return written
