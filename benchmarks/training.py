"""What our training loop costs beside a hand-written one, and what each method adds to it: ratios measured in one run.

    python benchmarks/training.py [--model lenet5] [--task mnist] [--steps 100] [--rounds 5] [--kind pruning] [--text]
    python benchmarks/training.py --model cifar-resnet20 --task cifar10 --steps 20

Every arm trains the network on the same tensors (with ``--text`` a character LSTM on tinyshakespeare); the arms take turns,
round after round, and the table shows the median over rounds of each arm's time divided by the time of its reference in
the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import efficientdnns as ed
from efficientdnns.method import TrainingMethod
from efficientdnns.session import Session
from efficientdnns.training import TrainingSettings

BATCH = 64
FIELDS: dict[str, dict[str, float]] = {
    "admm-pruning-iclrw": {"sparsity": 0.9},
    "admm-pruning": {"sparsity": 0.9},
    "activation-boundaries": {"init_epochs": 1},
    "deep-gradient-compression": {"warmup_epochs": 0},
    "olmp": {"search_every": 10**6, "evaluations": 10},
}
"""What a method is told beside its defaults. OLMP's searches, the first phase of activation boundaries and the warm-up of
gradient compression (which sends up to a quarter of all entries) are left out: their share is a matter of length."""


def by_hand(task: ed.Task, name: str) -> Callable[[], float]:
    """A plain PyTorch loop over tensors."""

    def run() -> float:
        torch.manual_seed(0)
        model = ed.models.build(name).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        inputs, targets = task.train.inputs, task.train.targets
        started = time.perf_counter()
        order = torch.randperm(len(inputs))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            index = order[first : first + BATCH]
            images = inputs[index] if task.train.prepare is None else task.train.prepare(inputs[index])
            loss = torch.nn.functional.cross_entropy(model(images), targets[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return time.perf_counter() - started

    return run


def ours(task: ed.Task, method: TrainingMethod, name: str = "lenet5") -> Callable[[], float]:
    """One epoch through the trainer with the method's callback; set-up and finish are not counted."""

    def run() -> float:
        torch.manual_seed(0)
        model = ed.models.build(name)
        settings = TrainingSettings(batch_size=BATCH, learning_rate=0.01, optimizer="sgd")
        session = Session(model=model, task=task, original=ed.models.build(name).eval(), settings=settings)
        method.prepare(session)
        callbacks = [method.callback(session)]
        session.train(
            callbacks, epochs=1, validate=False, **{**method.settings(), "batch_size": BATCH, "optimizer": "sgd"}
        )
        return session.history[-1]["seconds"]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="lenet5")
    parser.add_argument("--task", default="mnist")
    parser.add_argument("--kind", choices=ed.method.KINDS, help="only methods of this kind")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--text", action="store_true", help="time the LSTM")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = "char-lstm" if options.text else options.model
    name = "tinyshakespeare" if options.text else options.task
    task = ed.Task.from_name(name, limit=int(options.steps * BATCH / 0.9) + 1, evaluation_limit=100)
    arms: dict[str, Callable[[], float]] = {"fit": ours(task, ed.Fit(epochs=1), network)}
    if options.text:
        for bits in (None, 2):
            coding = ed.AlternatingMultibitQuantization(activation_bits=bits, epochs=1, learning_rate=0.1)
            arms[f"{coding.name}, {'states too' if bits else 'weights'}"] = ours(task, coding, network)
    else:
        arms["by hand"] = by_hand(task, network)
        for method in ed.methods(options.kind):
            if issubclass(method, TrainingMethod) and method.apply is TrainingMethod.apply:
                arms[method.name] = ours(task, method(**{"epochs": 1, **FIELDS.get(method.name, {})}), network)
        if options.kind in (None, "quantization"):
            arms["int8-quantization (qat)"] = ours(task, ed.Int8Quantization(mode="qat", epochs=1), network)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, run in arms.items():
            seconds[name].append(run())
    table = Table(
        "arm",
        "reference",
        "median ratio",
        "spread",
        title=f"{network}, {options.steps} steps of {BATCH}, {options.rounds} rounds",
    )
    for name in arms:
        reference = "by hand" if name == "fit" else "fit"
        if name == "by hand" or reference not in arms:
            continue
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds[reference]))
        table.add_row(name, reference, f"{statistics.median(ratios):.3f}", f"{ratios[0]:.3f}-{ratios[-1]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
