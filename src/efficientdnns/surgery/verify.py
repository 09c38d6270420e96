"""Trying a removal: does the smaller network run, and does it compute what it should?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from efficientdnns.surgery.graph import ChannelGraph
from efficientdnns.surgery.remove import clone, sliced, zero_contributions
from efficientdnns.surgery.trace import Inputs, as_arguments, evaluating, first_line

Plan = Mapping[str, Tensor]


def mismatch(
    model: nn.Module, smaller: nn.Module, plan: Plan, graph: ChannelGraph, example_inputs: Inputs, exact: bool = True
) -> str | None:
    """Why ``smaller`` is not ``model`` without the channels of ``plan``, or None where it is.

    Outputs are compared in float64 to 1e-9 of their size, or to 1e-3 in the network's own dtype where its code cannot
    run in float64.
    """
    reference = zero_contributions(model, plan, graph) if exact else model
    return differing(reference, smaller, example_inputs, exact)


def differing(
    reference: nn.Module, other: nn.Module, example_inputs: Inputs, exact: bool = True, allowed: float = 1e-9
) -> str | None:
    """How the outputs of two networks differ (in shape only, unless ``exact``), or None up to ``allowed``."""
    arguments = as_arguments(example_inputs)
    try:
        expected, got = _run(reference, arguments), _run(other, arguments)
    except Exception as error:
        return f"the new network does not run ({first_line(error)})"
    if [tuple(t.shape) for t in expected] != [tuple(t.shape) for t in got]:
        return f"its outputs change shape from {_shapes(expected)} to {_shapes(got)}"
    if not exact:
        return None
    runs = _run_in_float64(reference, other, arguments)
    tolerance = max(allowed, 1e-9 if runs else 1e-3)
    expected, got, again = runs or (expected, got, _run(reference, arguments))
    distance, noise = _distance(expected, got), _distance(expected, again)
    if distance > tolerance and noise <= tolerance:  # a network with randomness in eval mode cannot be compared
        return f"its outputs differ by {distance:.1e} from those of the full network without them"
    return None


def rounding(model: nn.Module) -> float:
    """What new constants cost that are stored in the network's own dtype: 1e-9 in float64, 1e-4 in float32, 0.1
    below."""
    coarsest = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    return 1e-9 if coarsest < 1e-12 else 1e-4 if coarsest < 1e-6 else 0.1


def _run(model: nn.Module, arguments: Sequence[Any]) -> list[Tensor]:
    with evaluating(model):
        return [x.clone() for x in tree_leaves(model(*arguments)) if isinstance(x, Tensor)]


Runs = tuple[list[Tensor], list[Tensor], list[Tensor]]


def _run_in_float64(reference: nn.Module, other: nn.Module, arguments: Sequence[Any]) -> Runs | None:
    """Outputs of reference, other and reference again; None where float64 fails (constants in the code, the device)."""
    try:
        doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
        wide = clone(reference).double()  # one wide copy at a time
        expected, again = _run(wide, doubled), _run(wide, doubled)
        del wide
        return expected, _run(clone(other).double(), doubled), again
    except (RuntimeError, TypeError):
        return None


def _distance(expected: list[Tensor], got: list[Tensor]) -> float:
    """Largest difference relative to the size of the outputs (at least 1); infinite where only one of them is
    finite."""
    worst = 0.0
    for first, second in zip(expected, got, strict=True):
        if first.numel() == 0:
            continue
        first, second = first.double(), second.double()
        same = torch.isclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)
        gap = torch.where(same, torch.zeros_like(first), (first - second).abs())
        size = max(1.0, float(first[first.isfinite()].abs().max())) if bool(first.isfinite().any()) else 1.0
        worst = max(worst, float(gap.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) / size)
    return worst


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def failing_groups(model: nn.Module, example_inputs: Inputs, graph: ChannelGraph) -> dict[str, str]:
    """Try to remove one unit of every group at once; where that fails, find the groups that make it fail and why."""
    generator = torch.Generator().manual_seed(0)
    plan = {
        group.name: torch.randint(group.size, (1,), generator=generator) for group in graph.groups if group.size > 1
    }
    return failing_among(model, example_inputs, graph, plan)


def failing_among(model: nn.Module, example_inputs: Inputs, graph: ChannelGraph, plan: Plan) -> dict[str, str]:
    """The groups of a plan whose removal fails, with the reason; found by halving."""

    def trial(names: list[str]) -> str | None:
        part = {name: plan[name] for name in names}
        return mismatch(model, sliced(model, part, graph), part, graph, example_inputs) if part else None

    def search(names: list[str], reason: str) -> dict[str, str]:
        if len(names) == 1:
            return {names[0]: reason}
        found: dict[str, str] = {}
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            why = trial(half)
            if why is not None:
                found |= search(half, why)
        rest = [name for name in names if name not in found]
        why = trial(rest)
        while why is not None and rest:  # only together do they fail: the later ones stay whole
            found[rest[-1]] = why
            rest = rest[:-1]
            why = trial(rest)
        return found

    reason = trial(list(plan))
    return search(list(plan), reason) if reason is not None else {}
