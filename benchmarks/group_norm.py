"""depgraph beside torch-pruning's GroupNormPruner: one network, one budget, one training allowance, three seeds.

    python benchmarks/group_norm.py [--limit 8000] [--dense-epochs 12] [--seeds 3] [--markdown]

CIFAR ResNet-20 with projections (option B; torch-pruning cannot cut the padding of option A) on CIFAR-10, trained here, then
cut to half of its multiply-accumulates by either and trained on, with the same loop, data and settings: sparse learning for
half of the epochs, or one cut at the beginning. torch-pruning is used as in its authors' CIFAR script, in small steps until
the budget is met; ``pip install torch-pruning==1.6.1 --no-deps``. Accuracy is that of the last epoch on all test images.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, ClassVar

import torch
import torch_pruning
from pydantic import NonNegativeFloat
from rich.console import Console
from table import show
from torch import Tensor, nn

import efficientdnns as ed
from efficientdnns.measurement import count_macs
from efficientdnns.session import Session
from efficientdnns.training import Callback, Trainer

RATE, REG, EPOCHS = 0.05, 1e-3, 4
TITLES = ["method", "pruner", "accuracy", "MACs", "parameters", "seconds"]


class TorchPruning(ed.TrainingMethod):
    """torch-pruning's GroupNormPruner as a method of ours, so that everything around it is the same."""

    name: ClassVar[str] = "torch-pruning-group-norm"
    kind: ClassVar[str] = "pruning"

    reg: NonNegativeFloat = REG

    def callback(self, session: Session) -> Callback:
        return GroupNorm(self, session)


class GroupNorm(Callback):
    """Its regularizer after every backward pass, its cuts at the end."""

    structural = True

    def __init__(self, method: TorchPruning, session: Session) -> None:
        self.method, self.session = method, session

    def setup(self, trainer: Trainer) -> None:
        self.pruner = torch_pruning.pruner.GroupNormPruner(
            trainer.model,
            self.session.example_input,
            importance=torch_pruning.importance.GroupMagnitudeImportance(),
            reg=self.method.reg,
            iterative_steps=200,
            pruning_ratio=1.0,
            ignored_layers=[m for m in trainer.model.modules() if isinstance(m, nn.Linear)],
        )

    def after_backward(self, trainer: Trainer) -> None:
        self.pruner.regularize(trainer.model)

    def finish(self, trainer: Trainer) -> None:
        example: Tensor = self.session.example_input
        model = trainer.model.eval()
        target = 0.5 * count_macs(model, example).total
        while count_macs(model, example).total > target:
            self.pruner.step()


def arms() -> dict[str, tuple[str, list[ed.Method], str | None]]:
    """What is compared: the row's name, whose pruner it is, the steps and the budget that they solve for."""
    half: dict[str, Any] = {"epochs": EPOCHS // 2, "learning_rate": 0.01, "weight_decay": 0.0}
    rest = {"retrain_learning_rate": RATE, "iterative_steps": 5}
    return {
        "group norm, one cut": ("ours", [ed.DepGraph(epochs=0, retrain_epochs=EPOCHS, **rest)], "macs=0.5"),
        "group norm, one cut ": ("torch-pruning", [TorchPruning(epochs=0), ed.Fit(epochs=EPOCHS)], None),
        "group-sparse learning": (
            "ours",
            [ed.DepGraph(reg=REG, retrain_epochs=EPOCHS // 2, **half, **rest)],
            "macs=0.5",
        ),
        "group-sparse learning ": ("torch-pruning", [TorchPruning(**half), ed.Fit(epochs=EPOCHS // 2)], None),
        "random, one cut": (
            "ours",
            [ed.PruneChannels(criterion="random", retrain_epochs=EPOCHS, retrain_learning_rate=RATE)],
            "macs=0.5",
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=8000, help="training images")
    parser.add_argument("--dense-epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = ed.Task.from_name("cifar10", limit=options.limit)
    torch.manual_seed(0)
    dense: nn.Module = ed.models.build("cifar-resnet20", shortcut="B")
    settings = {"optimizer": "nesterov", "learning_rate": RATE, "batch_size": 128, "clip_norm": 5.0}
    ed.fit(dense, task, options.dense_epochs, quiet=True, **{**settings, "learning_rate": 0.1})
    console = Console(stderr=True)
    rows = [["dense", "-", f"{task.evaluate(dense).value:.2f}", "1", "1", "-"]]
    for name, (whose, steps, budget) in arms().items():
        results = []
        for seed in range(options.seeds):
            extra: dict[str, Any] = {"budget": budget} if budget else {}
            result = ed.compress(dense, task, steps, training=settings, seed=seed, quiet=True, latency=False, **extra)
            results.append(result)
            console.print(f"{name.strip()}, {whose}, seed {seed}: {result.after.metric}")
        values = [result.after.metric.value for result in results]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        ratios = [
            statistics.mean(getattr(r.after, a) / getattr(r.before, a) for r in results) for a in ("macs", "params")
        ]
        seconds = statistics.mean(sum(record.seconds for record in result.report.methods) for result in results)
        accuracy = f"{statistics.mean(values):.2f}{spread}"
        rows.append([name.strip(), whose, accuracy, *(f"{ratio:.3f}" for ratio in ratios), f"{seconds:.0f}"])
    show(TITLES, rows, options.markdown)


if __name__ == "__main__":
    main()
