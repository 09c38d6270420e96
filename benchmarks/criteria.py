"""One-shot criteria beside torch-pruning's: seconds to find the groups of channels and to score all of them.

    python benchmarks/criteria.py [--model resnet50] [--size 224] [--rounds 3] [--threads 1] [--markdown]

Both libraries take turns on the same network of random weights, round after round, and the median of each is given with
the ratio of the two (below 1: ours is faster). Tracing and scoring are timed apart, because one trace serves every criterion
and every round of pruning. torch-pruning's tracing is `DependencyGraph.build_dependency` and the listing of all groups;
ours is `ChannelGraph.trace`, without and with the check that a removal from every group leaves a network that computes the
same, which torch-pruning does not have. Gradients for the Taylor criterion are there beforehand.

Needs ``pip install torch-pruning torchvision``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.criteria import ChannelCriterion, channel_scores
from efficientdnns.surgery import ChannelGraph

CRITERIA: tuple[ChannelCriterion, ...] = ("l1", "group-norm", "taylor")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def theirs(criterion: str) -> Any:
    """torch-pruning's importance with the same criterion."""
    import torch_pruning as tp

    if criterion == "taylor":
        return tp.importance.GroupTaylorImportance(group_reduction="first", normalizer=None, multivariable=False)
    first = {"p": 1, "group_reduction": "first"} if criterion == "l1" else {"p": 2, "group_reduction": "sum"}
    return tp.importance.GroupMagnitudeImportance(**first, normalizer=None, bias=False)


def trace_theirs(model: nn.Module, example: torch.Tensor) -> list[Any]:
    """All groups of a network, but for the classifier's outputs."""
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, example)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    return list(graph.get_all_groups(ignored_layers=last))


def measure(model: nn.Module, example: torch.Tensor, rounds: int) -> dict[str, tuple[float, float | None]]:
    """Median seconds of ours and theirs by what was done; both in turn."""
    loss = model(example).square().sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    ours: dict[str, list[float]] = {}
    other: dict[str, list[float]] = {}

    def note(table: dict[str, list[float]], what: str, seconds: float) -> None:
        table.setdefault(what, []).append(seconds)

    for _ in range(rounds):
        seconds, graph = timed(lambda: ChannelGraph.trace(model, example, verify=False))
        note(ours, "tracing", seconds)
        seconds, groups = timed(lambda: trace_theirs(model, example))
        note(other, "tracing", seconds)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()  # tracing resets them
        for criterion in CRITERIA:
            seconds, _ = timed(lambda: channel_scores(model, graph.groups, criterion, gradients))  # noqa: B023
            note(ours, criterion, seconds)
            importance = theirs(criterion)
            seconds, _ = timed(lambda: [importance(group) for group in groups])  # noqa: B023
            note(other, criterion, seconds)
    note(ours, "tracing and checking", timed(lambda: ChannelGraph.trace(model, example))[0])
    return {
        what: (statistics.median(values), statistics.median(other[what]) if what in other else None)
        for what, values in ours.items()
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a torchvision classification network")
    parser.add_argument("--size", type=int, default=224, help="width and height of the input")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="print the rows as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = ed.models.build(f"torchvision:{options.model}").eval()
    rows = measure(model, torch.randn(1, 3, options.size, options.size), options.rounds)
    columns = ("", "EfficientDNNs (s)", "torch-pruning (s)", "ratio")
    table = Table(
        *columns, title=f"{options.model}, {options.size} x {options.size}, median of {options.rounds} rounds"
    )
    for what, (own, other) in rows.items():
        cells = (
            what,
            f"{own:.4f}",
            "-" if other is None else f"{other:.4f}",
            "-" if other is None else f"{own / other:.2f}",
        )
        table.add_row(*cells)
        if options.markdown:
            print("| " + " | ".join(cells) + " |")
    if not options.markdown:
        Console().print(table)


if __name__ == "__main__":
    main()
