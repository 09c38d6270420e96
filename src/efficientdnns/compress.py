"""The one verb: measure, run each method, measure again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efficientdnns.budget import Budget
from efficientdnns.errors import ConfigurationError
from efficientdnns.fit import Fit, make_accelerator
from efficientdnns.measurement.compare import Comparison, compare_latency
from efficientdnns.measurement.environment import environment
from efficientdnns.measurement.latency import Eager, Latency, speedup
from efficientdnns.measurement.profile import Profile, profile_many
from efficientdnns.measurement.runtimes import runtime_name
from efficientdnns.method import Method, Together, TrainingMethod
from efficientdnns.models import check_fits
from efficientdnns.parts.budgets import CONFIRMATIONS
from efficientdnns.progress import Progress
from efficientdnns.recipe import Recipe
from efficientdnns.result import MethodRecord, Report, Result, describe_structure
from efficientdnns.session import Session
from efficientdnns.storage import lean, share, trim
from efficientdnns.task import Task
from efficientdnns.training import TrainingSettings


def compress(
    model: nn.Module,
    task: Task,
    methods: Method | Sequence[Method | Sequence[TrainingMethod]],
    *,
    budget: Budget | str | None = None,
    training: TrainingSettings | dict[str, Any] | None = None,
    seed: int = 0,
    device: str | None = None,
    threads: int | None = None,
    quiet: bool = False,
    checkpoints: str | Path | None = None,
    identity: str = "",
    latency: bool = True,
    runtimes: Sequence[str] = ("pytorch-eager",),
) -> Result:
    """Run ``methods`` on a copy of ``model`` and return the compressed network with the proof.

    Args:
        model: the trained network; it is left untouched. (Leading `Fit` steps train a copy first.) Its memory is shared
            with the work until a method writes, and with ``Result.original`` for good.
        task: data, loss and metric. Methods see the train and calibration splits; the evaluation split is measured
            before and after, and by nothing else.
        methods: one method, or several in order; an inner list shares one training run.
        budget: upper limits such as ``Budget(macs=0.5)`` or ``"macs=0.5,bytes=100kB"``; methods that have a free ratio
            solve for it.
        training: defaults of every training run where a method fixes nothing.
        seed: the same seed gives the same result on the same machine.
        device: ``"cpu"``, ``"cuda"``, ``"mps"`` or None for what there is.
        threads: CPU threads.
        quiet: no progress.
        checkpoints: folder for checkpoints; the same call with the same folder goes on where a killed one stopped, and
            ends with the same result. Remove it when the result is saved.
        identity: what the checkpoints belong to; kept beside them.
        latency: measure latency (interleaved, before and after in one run).
        runtimes: in which runtimes besides eager PyTorch: ``"onnxruntime"``, ``"torch-compile"``. Each costs the export
            or compilation of both networks and about a second; where one cannot run them, the report says why.

    Raises:
        ConfigurationError, DataError, ModelError, BudgetError: before any work starts, with one line.
    """
    steps = _flatten(methods)
    runtimes = [runtime_name(name) for name in runtimes]
    settings = training if isinstance(training, TrainingSettings) else TrainingSettings(**(training or {}))
    budget = Budget.parse(budget) if isinstance(budget, str) else budget or Budget()
    if threads is not None:
        if threads < 1:
            raise ConfigurationError(f"threads is {threads}, expected at least 1")
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    original = share(model).eval()
    accelerator = make_accelerator(device, settings.mixed_precision)
    session = Session(
        model=share(model),
        task=task,
        original=original,
        budget=budget,
        settings=settings,
        seed=seed,
        accelerator=accelerator,
        progress=Progress(quiet=quiet or not accelerator.is_main_process),
        directory=Path(checkpoints) if checkpoints else None,
    )
    with lean(model):
        check(session, steps)
        if session.directory is not None and accelerator.is_main_process:
            session.directory.mkdir(parents=True, exist_ok=True)
            (session.directory / "recipe.json").write_text(identity)
        session.model.to(session.device)
        records = _run(session, steps)
    result = _measured(session, records, latency=latency, threads=threads, runtimes=runtimes)
    model_name, task_name = {"name": result.report.model}, {"name": task.name}
    result.report.recipe = Recipe(model_name, task_name, steps, settings, budget, seed).as_data()
    return result


def _run(session: Session, steps: Sequence[Method]) -> list[MethodRecord]:
    """Apply the steps in turn; what the leading `Fit` steps make is the original."""
    untrained = session.original
    records: list[MethodRecord] = []
    for position, step in enumerate(steps):
        if not isinstance(step, Fit) and all(isinstance(earlier, Fit) for earlier in steps[:position]):
            session.original = share(session.model).eval().requires_grad_(False)
        session.label = step.name if not isinstance(step, Together) else " + ".join(m.name for m in step.methods)
        if any(record.id == session.label for record in records):
            session.label += f" #{position + 1}"
        started = time.perf_counter()
        if step.in_place:
            session.unshare()
        step.apply(session)
        trim(garbage_of=session.model)
        seconds = time.perf_counter() - started
        findings = session.findings.get(session.label, {})
        records.append(MethodRecord(id=session.label, fields=step.fields_as_data(), seconds=seconds, findings=findings))
    if all(isinstance(step, Fit) for step in steps):
        session.original = untrained
    session.unshare()  # what no method replaced would be the user's own tensors
    return records


def _measured(
    session: Session, records: list[MethodRecord], *, latency: bool, threads: int | None, runtimes: Sequence[str]
) -> Result:
    """Measure before and after side by side and put the result together."""
    task = session.task
    session.model = session.model.to("cpu").eval()
    for parameter in session.model.parameters():
        parameter.grad = None
        parameter.data += 0.0  # a mask leaves -0.0 behind, which is a value of its own to a bit-exact file
    pair = [session.original.to("cpu"), session.model]
    profiles, latencies = profile_many(pair, task, codecs=[None, session.codecs], latency=latency, threads=threads)
    gain = speedup(*latencies) if latencies else None
    lines = session.budget.compare(profiles[0], profiles[1], latency=_timed_again(session))
    factory = getattr(session.model, "factory", None)
    report = Report(
        model=factory["spec"] if factory else type(session.model).__name__,
        task=task.name,
        splits={s.name: len(s) for s in (task.train, task.calibration, task.evaluation) if s is not None},
        before=profiles[0],
        after=profiles[1],
        budget=[line._asdict() for line in lines],
        methods=records,
        seed=session.seed,
        environment=environment(),
        history=session.history,
        speedup=None
        if gain is None
        else {"ratio": gain.ratio, "low": gain.low, "high": gain.high, "significant": gain.significant},
        latencies=_in_runtimes(pair, task, profiles, latencies, runtimes, threads) if latencies else [],
    )
    return Result(
        session.model,
        report,
        example_input=task.example_input,
        forward=task.outputs,
        codecs=session.codecs,
        original=session.original,
        budget=lines,
        speedup=gain,
        task=task,
    )


def _in_runtimes(
    pair: Sequence[nn.Module],
    task: Task,
    profiles: Sequence[Profile],
    measured: Sequence[Latency],
    runtimes: Sequence[str],
    threads: int | None,
) -> list[Comparison]:
    """Before and after in every runtime, beside the ratio of MACs; eager PyTorch's was measured with the profiles."""
    macs = [profile.macs for profile in profiles]
    others = compare_latency(
        pair,
        task.example_input,
        runtimes=[name for name in runtimes if name != Eager.runtime],
        threads=() if threads is None else (threads,),
        macs=macs,
        forward=task.outputs,
        seconds=1.0,
        lenient=True,
    )
    return [Comparison.of(measured, macs), *others]


def _timed_again(session: Session) -> tuple[float, float] | None:
    """Milliseconds before and after in the runtime of a latency budget, timed as the search for it did."""
    if session.budget.latency is None:
        return None
    after = session.latency(session.model, times=CONFIRMATIONS)
    assert session.original_latency is not None
    return session.original_latency, after


def check(session: Session, steps: Sequence[Method]) -> None:
    """Everything that can be known to be wrong before work starts, raised as one line."""
    members = [m for step in steps for m in (step.methods if isinstance(step, Together) else (step,))]
    solvable = {name for member in members for name in member.solves}
    for name in session.budget.limits():
        if name not in solvable:
            able = ", ".join(sorted(member.name for member in members)) or "no method"
            raise ConfigurationError(
                f"budget '{name}' cannot be solved for by {able}; choose a method with that budget or drop it"
            )
    session.solvers = {name: member for member in members for name in member.solves}
    check_fits(session.model, session.task)
    describe_structure(session.model, session.original)
    for step in steps:
        step.check(session)
    first = next((step for step in steps if not isinstance(step, Fit)), None)
    if first is not None:
        first.check_network(session)


def _flatten(methods: Method | Sequence[Method | Sequence[TrainingMethod]]) -> list[Method]:
    items: Sequence[Any] = [methods] if isinstance(methods, Method) else methods
    steps: list[Method] = []
    for item in items:
        if isinstance(item, list | tuple):
            item = Together(methods=tuple(item))
        if not isinstance(item, Method):
            raise ConfigurationError(f"methods holds {item!r}, expected methods such as NISP(pruning_ratio=0.5)")
        steps.append(item)
    return steps
