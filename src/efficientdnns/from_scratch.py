r"""Were the inherited weights worth anything? The from-scratch protocol: a compressed network against its untrained twin.

He et al., `Rethinking ImageNet Pre-training <https://arxiv.org/abs/1811.08883>`_, and Liu et al., `Rethinking the Value of
Network Pruning <https://arxiv.org/abs/1810.05270>`_: with the same data, settings and evaluation, over several seeds,

=============  ====================================================================================================
fine-tune      the compressed network with its weights, F epochs at a tenth of the learning rate
fine-tune-e    the compressed network with its weights, E epochs at the full rate
scratch-e      the same network with new initial weights, E epochs
scratch-b      the same for as many multiply-accumulates as the dense network's E epochs: :math:`\lfloor E\,C_M / C_P \rfloor`
=============  ====================================================================================================

where :math:`C_M` and :math:`C_P` are the MACs of the dense and the compressed network. Of a network pruned weight by weight
the mask is kept, and initial weights are those of the dense layer (not rescaled to the smaller fan-in). The verdict is that of
the paired differences of fine-tune and the better of the two scratch arms: 95 % t-interval, three seeds or more.

Deviations: training cost counts three forward passes a step. Every arm keeps its last epoch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from rich.table import Table
from torch import nn

from efficientdnns.errors import ConfigurationError, DataError, ModelError
from efficientdnns.fit import make_accelerator
from efficientdnns.parts.reinitialise import reinitialised
from efficientdnns.progress import Progress
from efficientdnns.session import Session
from efficientdnns.task import Task
from efficientdnns.training import TrainingSettings
from efficientdnns.training.sparsity import MaskedTraining

Verdict = Literal["inherited weights help", "the architecture is enough", "fewer than three seeds say nothing"]
FORWARDS = 3
"""Forward passes that a training step costs, in MACs."""


class Arm(BaseModel):
    """One way to train the compressed network."""

    name: str
    epochs: int
    metric: list[float]
    """By seed."""
    training_macs: float

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return sum(self.metric) / len(self.metric)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds (n - 1); 0 of one."""
        return float(torch.tensor(self.metric).std()) if len(self.metric) > 1 else 0.0


class FromScratch(BaseModel):
    """What the protocol found."""

    metric: str
    seeds: list[int]
    dense: float | None
    untrained: float
    """The compressed network as it is handed over."""
    arms: list[Arm]
    difference: float
    """Fine-tune minus the better scratch arm, mean over the seeds."""
    interval: float | None
    """Half of the 95 % interval of the difference; None with fewer than three seeds."""
    verdict: Verdict
    samples: int
    """Training samples; with few of them inherited weights are expected to win."""

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)


def scratch_epochs(epochs: int, macs_dense: float, macs_compressed: float, cap: float | None = None) -> int:
    """Epochs of the compressed network that cost as much as ``epochs`` of the dense one; at most ``cap`` times as many."""
    if macs_compressed > macs_dense:
        raise ConfigurationError(
            f"the compressed network has {macs_compressed:.0f} MACs, the dense one {macs_dense:.0f}; nothing was saved"
        )
    spent = math.floor(epochs * macs_dense / macs_compressed + 1e-9)
    return spent if cap is None else min(spent, math.floor(epochs * cap))


def verdict(first: Sequence[float], second: Sequence[float]) -> tuple[float, float | None, Verdict]:
    """Mean of the paired differences, half their 95 % t-interval (n >= 3), and what that says."""
    differences = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    mean = float(differences.mean())
    if len(differences) < 3:
        return mean, None, "fewer than three seeds say nothing"
    from scipy.stats import t

    half = float(t.ppf(0.975, len(differences) - 1) * differences.std() / math.sqrt(len(differences)))
    return mean, half, "inherited weights help" if mean > half else "the architecture is enough"


def from_scratch(
    compressed: nn.Module,
    task: Task,
    *,
    macs_dense: float,
    macs_compressed: float,
    epochs: int,
    fine_tune_epochs: int,
    seeds: Sequence[int] = (0, 1, 2),
    training: Mapping[str, Any] | None = None,
    cap: float | None = None,
    dense: float | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> FromScratch:
    """Run the protocol.

    Args:
        compressed: the network; left as it is.
        task: labelled data.
        macs_dense, macs_compressed: of one sample.
        epochs: E, those of the dense network's training.
        fine_tune_epochs: F.
        seeds: three or more for a verdict.
        training: settings of the dense network's training (`TrainingSettings`).
        cap: scratch-b takes at most so many times E.
        dense: metric of the dense network, for the table.
        device: as for `compress`.
        quiet: no progress.

    Raises:
        ModelError: the network has nothing to train (quantized weights, a tree).
        ConfigurationError: it costs more than the dense one.
    """
    settings = TrainingSettings(**dict(training or {}))
    if not any(p.requires_grad and p.is_floating_point() for p in compressed.parameters()):
        raise ModelError(
            f"a {type(compressed).__name__} without trainable weights has no twin; "
            "run the protocol on the result before it was quantized"
        )
    masks = {name: (p != 0).to(p.dtype) for name, p in compressed.named_parameters() if p.dim() > 1 and not p.all()}
    rate = settings.learning_rate
    plans = {
        "fine-tune": (fine_tune_epochs, rate / 10, False),
        "fine-tune-e": (epochs, rate, False),
        "scratch-e": (epochs, rate, True),
        "scratch-b": (scratch_epochs(epochs, macs_dense, macs_compressed, cap), rate, True),
    }
    if task.train is None or not task.has_labels:
        raise DataError(f"the from-scratch protocol needs labelled training data, but task '{task.name}' has none")
    accelerator, samples = make_accelerator(device, settings.mixed_precision), len(task.train)

    def trained(label: str, length: int, learning_rate: float, fresh: bool, seed: int) -> float:
        torch.manual_seed(seed)
        network = reinitialised(compressed, seed) if fresh else copy.deepcopy(compressed)
        own: dict[str, Any] = {"settings": settings, "accelerator": accelerator, "progress": Progress(quiet=quiet)}
        session = Session(model=network, task=task, original=network, seed=seed, label=f"{label}, seed {seed}", **own)
        # All arms of a seed see the same batches for as long as they last.
        session.train([MaskedTraining(masks)], epochs=length, learning_rate=learning_rate, seed=seed)
        return task.evaluate(session.model, "evaluation", device=session.device).value

    arms = {}
    for name, (length, learning_rate, fresh) in plans.items():
        found = [trained(name, length, learning_rate, fresh, seed) for seed in seeds]
        cost = FORWARDS * macs_compressed * samples * length
        arms[name] = Arm(name=name, epochs=length, metric=found, training_macs=cost)
    sign = 1 if task.metric.higher_is_better else -1
    scratch = max((arms["scratch-e"], arms["scratch-b"]), key=lambda arm: sign * arm.mean)
    pair = ([sign * value for value in arm.metric] for arm in (arms["fine-tune"], scratch))
    difference, interval, says = verdict(*pair)
    return FromScratch(
        metric=task.metric.name,
        seeds=list(seeds),
        dense=dense,
        untrained=task.evaluate(compressed, "evaluation", device=accelerator.device).value,
        arms=list(arms.values()),
        difference=difference,
        interval=interval,
        verdict=says,
        samples=samples,
    )


def of_result(
    directory: Path, *, epochs: int, fine_tune_epochs: int, seeds: Sequence[int], quiet: bool = False, **options: Any
) -> FromScratch:
    """The protocol on a saved result, with the task and training settings of its recipe; written as ``from-scratch.json``."""
    from efficientdnns.reporting.html import write_page
    from efficientdnns.result import Report, load
    from efficientdnns.run import make_task

    path = directory / "report.json"
    if not path.is_file():
        raise ConfigurationError(
            f"{directory} holds no result: there is no report.json; give the --out folder of a run"
        )
    report = Report.model_validate_json(path.read_text())
    recipe = report.recipe or {}
    if "task" not in recipe:
        raise ConfigurationError(
            f"{directory} does not say which data it was made with; make it anew with `efficientdnns run`"
        )
    if report.before.macs is None or report.after.macs is None:
        raise ConfigurationError(f"{directory}: multiply-accumulates were not counted, so there is no equal budget")
    described = recipe["task"] if isinstance(recipe["task"], dict) else {"name": recipe["task"]}
    task = make_task(described)
    found = from_scratch(
        load(directory),
        task,
        macs_dense=report.before.macs,
        macs_compressed=report.after.macs,
        epochs=epochs,
        fine_tune_epochs=fine_tune_epochs,
        seeds=seeds,
        training=recipe.get("training"),
        dense=report.before.metric.value if report.before.metric else None,
        quiet=quiet,
        **options,
    )
    write_page(directory / "from-scratch.json", found.model_dump_json(indent=2))
    return found


def from_scratch_table(name: str, found: FromScratch) -> Table:
    """The arms, one row each, and the verdict below."""
    table = Table(title=f"{name}: inherited weights against training from scratch", title_justify="left")
    for heading in ("arm", "epochs", found.metric, "+-", "training cost"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    if found.dense is not None:
        table.add_row("dense network", "", f"{found.dense:.2f}", "", "")
    table.add_row("as it is", "", f"{found.untrained:.2f}", "", "")
    for arm in found.arms:
        cost = f"{arm.training_macs / 1e12:.3g} T MACs"
        table.add_row(arm.name, str(arm.epochs), f"{arm.mean:.2f}", f"{arm.deviation:.2f}", cost)
    half = "" if found.interval is None else f" +- {found.interval:.2f}"
    table.caption = f"fine-tune minus the better scratch arm: {found.difference:+.2f}{half}; {found.verdict}"
    table.caption_justify = "left"
    return table
