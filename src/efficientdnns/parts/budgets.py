"""What every method with a free ratio shares: the limits it has to meet, what a network costs, and the search.

A method gives what it can keep (a proposal of `efficientdnns.budget.solve`), a cheap estimate of its costs and a way to
build the candidate; candidates are really built and counted, written or timed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from efficientdnns.budget import Costs, Plan, Propose, require, solve
from efficientdnns.coding import weights_size
from efficientdnns.errors import BudgetError, ConfigurationError, suggest
from efficientdnns.measurement.macs import count_macs
from efficientdnns.measurement.size import nonzero_parameters

if TYPE_CHECKING:
    from efficientdnns.method import Method
    from efficientdnns.session import Session

MARGINS = {"bytes": 0.995, "latency": 0.99}
"""Shares of a limit that are aimed at: later training changes how floats are coded, and timing is noisy."""
CONFIRMATIONS = 3
"""Timings whose median is believed: of the network that is handed over, and of all that are near the limit."""
CLOSE = 0.05
"""Timed networks within this share of what is aimed at are timed again, for one timing is not that exact."""
TIMED_PLANS = 24
"""Plans that are timed beyond the first dozen where that ends more than 2 % below the limit."""


def limits_of(session: Session, method: Method) -> list[str]:
    """The limits of the run that this method has to meet: those that it can and that no later method will."""
    names = [name for name in session.budget.limits() if name in method.solves]
    return [name for name in names if session.solvers.get(name, method) is method]


def targets_of(session: Session, method: Method) -> dict[str, float]:
    """The limits that this method has to meet, in absolute terms."""
    names = limits_of(session, method)
    before = costs(session, session.original, names, {})
    targets = {name: session.budget.absolute(name, before[name]) for name in names}
    return {name: value for name, value in targets.items() if value is not None}


@torch.no_grad()
def costs(
    session: Session, model: nn.Module, names: Sequence[str], codecs: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """What a network really costs: it is run, its file is written, it is timed.

    Args:
        session: gives task, runtime and, unless ``codecs`` says otherwise, how tensors are coded.
        model: the network; left as it is.
        names: of macs, params, bytes, latency.
        codecs: state-dict name -> codec.
    """
    found: dict[str, float] = {}
    if "macs" in names:
        found["macs"] = count_macs(model, session.task.example_input, session.task.outputs).total
    if "params" in names:
        found["params"] = nonzero_parameters(model)
    if "bytes" in names:
        state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        chosen = session.codecs if codecs is None else codecs
        found["bytes"] = weights_size(state, {name: codec for name, codec in chosen.items() if name in state})
    if "latency" in names:
        found["latency"] = session.latency(model)
    return found


def meet(
    session: Session,
    method: Method,
    *,
    propose: Propose,
    estimate: Callable[[Plan], Costs],
    build: Callable[[Plan], nn.Module],
    least: Plan,
    full: Plan,
    measure: Callable[[nn.Module, Sequence[str]], Costs] | None = None,
    margins: Mapping[str, float] = MARGINS,
) -> Plan:
    """The best plan whose network meets every limit that ``method`` has to meet.

    The plan is kept beside the checkpoints, for a timed decision cannot be repeated exactly when a run is resumed.

    Latency is met as measured: at the end the median of three fresh timings is at most the limit, and 2 % below it at most
    unless the next step of any group is too much. Whoever times the result again gets another figure: on an idle machine
    by 1 or 2 %, on a busy one by 5 % and more, in either direction.

    Args:
        session: the run.
        method: whose limits.
        propose: searches the plans (`efficientdnns.budget.fill`, `efficientdnns.budget.most`).
        estimate: cheap costs of a plan for every limit of ``method.solves``.
        build: the network of a plan.
        least: the smallest plan.
        full: the plan that keeps everything.
        measure: costs of a network, by default `costs`.
        margins: shares of the limits that are aimed at.

    Raises:
        BudgetError: not even ``least`` meets them.
    """
    path = None if session.directory is None else session.directory / _file_name(session)
    if path is not None and path.is_file():
        return {str(name): int(kept) for name, kept in json.loads(path.read_text()).items()}
    targets = targets_of(session, method)
    aims = {name: target * margins.get(name, 1.0) for name, target in targets.items()}

    memory: dict[tuple[tuple[str, int], ...], dict[str, float]] = {}

    def measured(plan: Plan) -> Costs:
        key = tuple(sorted(plan.items()))
        if key not in memory:
            network = build(plan)
            got = dict(costs(session, network, list(targets)) if measure is None else measure(network, list(targets)))
            if "latency" in got and abs(got["latency"] / aims["latency"] - 1) < CLOSE:
                got["latency"] = session.latency(network, times=CONFIRMATIONS)
            memory[key] = got
        return memory[key]

    timed = TIMED_PLANS if "latency" in targets else 0
    for _ in range(1 + CONFIRMATIONS):
        try:
            plan, got = solve(aims, propose, estimate, measured, least, full, refinements=timed)
        except BudgetError:  # the margin may be what is out of reach
            plan, got = least, measured(least)
            require(got, targets)
        if "latency" not in targets or plan == least:
            break
        again = session.latency(build(plan), times=CONFIRMATIONS)
        memory[tuple(sorted(plan.items()))]["latency"] = again  # of several timed plans the lucky one was chosen
        if again <= targets["latency"]:
            break
    session.report(budget={name: {"asked": target, "planned": got[name]} for name, target in targets.items()})
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan))
    return plan


def _file_name(session: Session) -> str:
    return f"plan-{session.runs:03d}-{re.sub('[^a-z0-9]+', '-', session.label)}.json"


def require_reachable(
    session: Session,
    method: Method,
    build: Callable[[], nn.Module],
    measure: Callable[[nn.Module, Sequence[str]], Costs] | None = None,
) -> None:
    """Raise BudgetError if not even the smallest network, which ``build`` makes, meets the limits of ``method``.

    A latency limit has to be missed by a tenth, since it is timed.
    """
    targets = targets_of(session, method)
    if targets:
        network = build()
        least = costs(session, network, list(targets)) if measure is None else measure(network, list(targets))
        require(least, {name: target * (1.1 if name == "latency" else 1.0) for name, target in targets.items()})


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``name`` fits one of the shell-style patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(patterns: Sequence[str], names: Sequence[str], field: str) -> None:
    """Raise ConfigurationError where a shell-style pattern fits none of ``names``; ``field`` says where it was written."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(f"{field}: no layer is called '{pattern}'{suggest(pattern, names)}")
