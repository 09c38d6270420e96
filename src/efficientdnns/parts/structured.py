"""What every method that removes whole channels shares: which ones may go, how many, and what ratio meets a budget."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from efficientdnns.budget import smallest_ratio
from efficientdnns.errors import SurgeryError
from efficientdnns.measurement.macs import count_macs
from efficientdnns.measurement.size import nonzero_parameters
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group, remove

Selection = dict[str, Tensor]
"""Group name -> indices of the channels that go."""


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``name`` fits one of the shell-style patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def lowest(scores: Tensor, ratio: float) -> Tensor:
    """Indices of the floor(ratio * n) lowest scores, at most n - 1; ties go to the lower index.

    The tiny addend keeps floor(10 * 0.1) at 1 in floating point.
    """
    count = min(int(len(scores) * ratio + 1e-9), len(scores) - 1)
    return torch.sort(scores, stable=True).indices[:count].sort().values


def prunable(session: Session, skip: Sequence[str] = ()) -> tuple[ChannelGraph, list[Group]]:
    """Trace the session's network and return the groups that may be pruned.

    Raises:
        SurgeryError: nothing can be removed; the message says why.
    """
    graph = ChannelGraph.trace(session.model, session.example_input)
    groups = [g for g in graph.groups if g.size > 1 and not any(matches(p, skip) for p in graph.producers(g))]
    if not groups:
        reasons = "; ".join(f"{k.operation} in '{k.module}' {k.reason}" for k in graph.kept_whole[:2])
        raise SurgeryError(
            f"no channels of {type(session.model).__name__} can be removed" + (f" ({reasons})" if reasons else "")
        )
    return graph, groups


def ratio_for_budget(
    session: Session, graph: ChannelGraph, select: Callable[[float], Selection], default: float
) -> float:
    """The pruning ratio: ``default`` without a budget, else the smallest whose network meets every MAC and parameter limit.

    Candidates are really cut and counted, so nothing is estimated.
    """
    ratios = []
    for name, count in (("macs", _macs), ("params", lambda _, model: float(nonzero_parameters(model)))):
        target = session.budget.absolute(name, count(session, session.original))
        if target is None:
            continue

        def cost(ratio: float, count: Callable[[Session, nn.Module], float] = count) -> float:
            return count(session, cut(session, graph, select(ratio), verify=False))

        ratios.append(smallest_ratio(cost, target, name=name))
    return max(ratios, default=default)


def _macs(session: Session, model: nn.Module) -> float:
    return float(count_macs(model, session.task.example_input, session.task.outputs).total)


def cut(session: Session, graph: ChannelGraph, selection: Mapping[str, Tensor], verify: bool = True) -> nn.Module:
    """The session's network without the selected channels; groups with an empty selection are left alone."""
    chosen = {name: indices for name, indices in selection.items() if len(indices)}
    return remove(session.model, session.example_input, chosen, graph, verify) if chosen else session.model


def kept_report(graph: ChannelGraph, groups: Sequence[Group], selection: Mapping[str, Tensor]) -> dict[str, object]:
    """What a structured method reports: widths before and after, and what was kept whole and why."""
    return {
        "widths": {g.name: [g.size, g.size - len(selection.get(g.name, ()))] for g in groups},
        "kept_whole": [f"{k.module or 'forward'}: {k.operation} {k.reason}" for k in graph.kept_whole],
    }
