"""The result of a run: numbers, network and files, and how to load it again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from efficientdnns.budget import Asked
from efficientdnns.coding import load_weights, save_weights
from efficientdnns.data.nested import first
from efficientdnns.deployment.accuracy import metric_of_file
from efficientdnns.deployment.export import DEFAULT, FORMATS, SIZES, Exported, discard, export_all
from efficientdnns.deployment.inputs import describe
from efficientdnns.errors import FileFormatError, ModelError
from efficientdnns.measurement.compare import Comparison
from efficientdnns.measurement.latency import Speedup
from efficientdnns.measurement.profile import Profile
from efficientdnns.reporting.report import report_page
from efficientdnns.storage import build_hollow, fill, hollow, lean
from efficientdnns.surgery.structure import apply_difference, difference

if TYPE_CHECKING:
    from efficientdnns.task import Task

SCHEMA_VERSION = 1


class MethodRecord(BaseModel):
    """One method as it was run."""

    id: str
    fields: dict[str, Any]
    seconds: float
    findings: dict[str, Any] = {}


class Report(BaseModel):
    """The schema of ``report.json`` (version 1)."""

    model_config = ConfigDict(extra="ignore")

    schema_version: int = SCHEMA_VERSION
    model: str
    task: str
    splits: dict[str, int]
    before: Profile
    after: Profile
    budget: list[dict[str, Any]] = []
    methods: list[MethodRecord]
    seed: int
    environment: dict[str, Any]
    history: list[dict[str, Any]]
    speedup: dict[str, Any] | None = None
    latencies: list[Comparison] = []
    """Latency before and after in every runtime that was asked for, beside the ratio of MACs."""
    recipe: dict[str, Any] | None = None
    """What was asked for, as a recipe states it (`Recipe.as_data`)."""
    reload_exact: bool | None = None
    inputs: Any = None
    """What the network's inputs look like (`efficientdnns.deployment.inputs.describe`)."""
    exports: list[Exported] = []


class Result:
    """What `compress` returns.

    ``model`` is the compressed network, ``before`` and ``after`` are profiles (metric on the evaluation split, parameters,
    MACs, bytes of the written file, latency, peak memory), ``history`` has one entry per training epoch, ``report`` is
    all of it as data. ``print(result)`` shows the table.
    """

    def __init__(
        self,
        model: nn.Module,
        report: Report,
        *,
        example_input: Any,
        forward: Callable[[nn.Module, Any], Any],
        codecs: dict[str, Any] | None = None,
        original: nn.Module | None = None,
        budget: list[Asked] | None = None,
        speedup: Speedup | None = None,
        task: Task | None = None,
    ) -> None:
        self.original = original
        self.model, self.report, self.codecs = model, report, codecs or {}
        self.example_input, self.forward = example_input, forward
        self.budget, self.speedup = budget or [], speedup
        self.task = task

    @property
    def before(self) -> Profile:
        """The network before the first method."""
        return self.report.before

    @property
    def after(self) -> Profile:
        """The network that is handed over."""
        return self.report.after

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per training epoch."""
        return self.report.history

    @property
    def exports(self) -> list[Exported]:
        """The files for other runtimes that `save` wrote, and why those that are missing are."""
        return self.report.exports

    def table(self) -> Table:
        """Before, after and ratio of everything measured."""
        before, after = self.before, self.after
        table = Table(title=" → ".join(m.id for m in self.report.methods) or "nothing done", title_justify="left")
        for heading in ("", "before", "after", "ratio"):
            table.add_column(heading, justify="left" if not heading else "right")
        metric = before.metric
        change = after.metric.value - metric.value
        table.add_row(
            f"{metric.name} ({metric.split}, n = {metric.n:,})",
            f"{metric.value:.2f}",
            f"{after.metric.value:.2f}",
            f"{change:+.2f}",
        )
        rows: list[tuple[str, float | None, float | None]] = [
            ("parameters", before.params, after.params),
            ("non-zero parameters", before.nonzero_params, after.nonzero_params),
            ("MACs", before.macs, after.macs),
            ("bytes of the file", before.bytes, after.bytes),
            ("peak memory (bytes)", before.peak_memory, after.peak_memory),
        ]
        for name, old, new in rows:
            if old is not None and new is not None:
                table.add_row(name, f"{old:,}", f"{new:,}", f"{old / new:.2f}x" if new else "-")
        if before.latency_ms and after.latency_ms:
            a, b = before.latency_ms, after.latency_ms
            verdict = str(self.speedup) if self.speedup else "-"
            table.add_row(f"latency (ms, {a.runtime}, batch {a.batch})", f"{a.median:.3f}", f"{b.median:.3f}", verdict)
        for entry in self.report.latencies[1:]:
            where = f"latency (ms, {entry.runtime}, batch {entry.batch})"
            medians = [f"{latency.median:.3f}" for latency in entry.latencies] or ["-", "-"]
            table.add_row(where, *medians, entry.problem or str(entry.speedups[0]))
        for exported in self.exports:
            if exported.bytes is not None:
                agrees = f"outputs within {exported.max_difference:.0e}"
                table.add_row(f"bytes of {exported.file}", "", f"{exported.bytes:,}", agrees)
            if (found := exported.metric) is not None:
                name = f"{found['name']} of {exported.file} (n = {found['n']:,})"
                gap = f"{exported.gap:+.2f}"
                table.add_row(name, f"in PyTorch {found['network']:.2f}", f"{found['value']:.2f}", gap)
        for line in self.budget:
            verdict = "met" if line.met else "NOT MET"
            table.add_row(f"budget: {line.name}", f"asked {line.asked:,.4g}", f"got {line.got:,.4g}", verdict)
        return table

    def notes(self) -> list[str]:
        """What a person should know beside the table: what was kept whole, and why."""
        missing = [
            f"no {FORMATS[exported.format].file}: {exported.error}" for exported in self.exports if exported.error
        ]
        kept = [(m.id, reason) for m in self.report.methods for reason in m.findings.get("kept_whole", [])]
        return [f"kept whole by {method}: {reason}" for method, reason in kept] + missing

    def __str__(self) -> str:
        console = Console(width=110, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
        console.print(self.table())
        return "\n".join([console.export_text().rstrip(), *self.notes()])

    def __rich__(self) -> Table:
        return self.table()

    def save(self, directory: str | Path, exports: Sequence[str] = DEFAULT) -> Path:
        """Write ``model.safetensors``, ``structure.json``, ``report.json`` and ``report.html``, each atomically; the network
        is loaded again.

        ``model.pt2`` and ``model.onnx`` come with them, for runtimes that do not have this library: opened again,
        compared on the task's inputs, the metric evaluated on the ONNX file too. One that cannot be made does not fail
        the rest: the report says why. ``exports`` names the formats (of `efficientdnns.deployment.FORMATS`).

        Raises:
            ModelError: a module that cannot be described; or the reloaded network does not give exactly the same outputs.
            ConfigurationError: an unknown format.
        """
        directory = Path(directory)
        structure = describe_structure(self.model, self.original)
        directory.mkdir(parents=True, exist_ok=True)
        with lean(self.model):
            size = save_weights(directory / "model.safetensors", state_of(self.model), self.codecs)
            _write(directory / "structure.json", json.dumps(structure, indent=1))
            if size != self.after.bytes:
                self.report.after = self.after.model_copy(update={"bytes": size})
            # Every tensor of the file was decoded and compared when it was written; equal ones need not be held twice.
            again, factory = _skeleton(directory, None if structure["factory"] else self.original)
            _filled(again, state_of(self.model), directory, factory)
            self.report.reload_exact = self._reloads_exactly(again)
        if not self.report.reload_exact:
            raise ModelError(
                f"the network saved in {directory} does not give the same outputs again; nothing was reported"
            )
        self.report.inputs = None if self.example_input is None else describe(self.example_input)
        self.report.exports = self._export(directory, exports)
        _write(directory / "report.json", self.report.model_dump_json(indent=1))
        _write(directory / "report.html", report_page(self.report))
        return directory

    def samples(self, count: int) -> Any:
        """The first ``count`` inputs of the evaluation split (fewer where its batches are smaller); None without a task."""
        split = None if self.task is None else self.task.evaluation or self.task.calibration
        return None if split is None else first(next(iter(split.batches(count))).inputs, count)

    def _export(self, directory: Path, formats: Sequence[str]) -> list[Exported]:
        for format in set(FORMATS) - set(formats):
            discard(directory, format)  # of an earlier result
        if self.example_input is None:
            reason = "the task has no example input; give example_input= when making it"
            return [Exported(format=format, error=reason) for format in formats]
        calibration = [] if self.task is None or self.task.calibration is None else self.task.calibration.batches(32)
        found = export_all(
            self.model,
            self.example_input,
            directory,
            formats,
            forward=self.forward,
            samples=self.samples(sum(SIZES)),
            calibration=(batch.inputs for batch in calibration),
        )
        exports = []
        for exported, network in found:
            evaluated = exported.format == "onnx" and exported.sizes is None
            if network is not None and evaluated and self.task is not None and self.task.has_labels:
                metric = metric_of_file(self.task, network, self.model, self.after.metric, self.after.macs)
                exported = exported.model_copy(update={"metric": metric})
            exports.append(exported)
        return exports

    @torch.inference_mode()
    def _reloads_exactly(self, again: nn.Module) -> bool:
        if self.example_input is None:
            return True
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        again = again.to(device).eval()
        return _same(self.forward(self.model.eval(), self.example_input), self.forward(again, self.example_input))


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Rebuild the network of a saved result, with exactly the outputs it had; ready for use or further training.

    ``model`` is a fresh instance of the original architecture (its weights do not matter). It is needed only when the
    result was made from a network that this library cannot build itself.

    Raises:
        FileFormatError: the folder holds no result. ModelError: the architecture is unknown or does not fit.
    """
    directory = Path(directory)
    network, factory = _skeleton(directory, model)
    network = _filled(network, load_weights(directory / "model.safetensors"), directory, factory)
    return network if model is None else network.to(next((t.device for t in model.parameters()), torch.device("cpu")))


def _skeleton(directory: Path, model: nn.Module | None) -> tuple[nn.Module, dict[str, Any] | None]:
    """The network of a saved result, its tensors without values where that is possible, and its factory."""
    from efficientdnns.models import rebuild

    path = directory / "structure.json"
    if not path.is_file():
        raise FileFormatError(
            f"{directory} holds no saved result (no structure.json in it); give the folder written by save"
        )
    try:
        structure = json.loads(path.read_text())
        version, factory, modules = structure["schema_version"], structure["factory"], structure["modules"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise FileFormatError(f"{path} is not a structure file of this library") from None
    if version > SCHEMA_VERSION:
        raise FileFormatError(
            f"{path} has schema version {version}, this library reads up to {SCHEMA_VERSION}; update it"
        )
    if "" not in modules and model is None and factory is None:
        raise ModelError(
            f"{directory} was made from a model built by the caller; write load('{directory}', model=YourModel(...))"
        )

    def reference() -> nn.Module:
        if "" in modules:
            return nn.Identity()
        return hollow(model) if model is not None else rebuild(factory)

    return build_hollow(lambda: apply_difference(reference(), structure)), factory


def _filled(network: nn.Module, state: dict[str, Tensor], directory: Path, factory: dict[str, Any] | None) -> nn.Module:
    """``network`` with the tensors of ``state``, not copies of them."""
    missing, unexpected = fill(network, state)
    if missing or unexpected:
        raise ModelError(
            f"{directory} does not fit this architecture: missing {missing[:3] or 'nothing'}, "
            f"unexpected {unexpected[:3] or 'nothing'}; give the model it was made from"
        )
    if factory is not None:
        network.factory = factory  # type: ignore[assignment]
    return network.eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that make the network, on the CPU."""
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def describe_structure(model: nn.Module, original: nn.Module | None = None) -> dict[str, Any]:
    """How to rebuild the architecture: the factory, and what differs from what it builds.

    A network that the library cannot build itself is described against ``original``, which `load` then asks for.
    """
    from efficientdnns.models import rebuild

    factory: dict[str, Any] | None = getattr(model, "factory", None)
    reference = build_hollow(lambda: rebuild(factory)) if factory is not None else original
    delta = difference(model, reference if reference is not None else nn.Identity())
    return {"schema_version": SCHEMA_VERSION, "factory": factory, **delta}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    return bool(a == b)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
