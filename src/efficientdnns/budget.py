"""Budgets in the user's own units, the search that meets them, and what was asked beside what was got.

A *plan* says how much of every group is kept (channels of a layer, ranks, weights). A method orders what can be kept as
`Block`s, the most important first; `fill` gives blocks back to the smallest plan while all limits hold, and `solve`
repeats that until what was really measured is within the limits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, field_validator

from efficientdnns.errors import BudgetError, ConfigurationError, suggest
from efficientdnns.measurement.profile import Profile
from efficientdnns.measurement.runtimes import runtime_name

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "ms": 1.0, "s": 1e3}
LIMITS = ("macs", "params", "bytes", "latency")
NEAR = 0.02
"""A result this close below one of its limits (as a share of it) uses its budget up."""

Plan = dict[str, int]
"""Group name -> how much of it is kept."""
Costs = Mapping[str, float]
"""Limit name -> what a network costs: MACs, non-zero parameters, bytes of the file, milliseconds."""


class Asked(NamedTuple):
    """One line of the budget: what was asked (absolute), what was got, and whether that meets it."""

    name: str
    asked: float
    got: float
    met: bool


class Budget(BaseModel):
    """Upper limits for the result. A bare number up to 1 is a share of the original, anything else absolute.

    ``macs`` (multiply-accumulates of one sample), ``params`` (non-zero parameters), ``bytes`` (size of the written file),
    ``latency`` (median milliseconds, measured in ``runtime``). Strings may carry a unit: ``"20M"``, ``"100kB"``, ``"3ms"``.

    A result is at most the limit and within 2 % of it, or of what one more channel (rank, weight) would cost where that is
    more; latency may stand still over many channels and then jump, since kernels work on blocks of them. It is the median of
    three timings in turn with the original; a repetition differs by 1 or 2 % on an idle machine, by 5 % and more on a busy one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    runtime: str = "pytorch-eager"
    """Where latency is measured: ``pytorch-eager``, ``torch-compile`` or ``onnxruntime``."""
    _with_unit: frozenset[str] = PrivateAttr(frozenset())

    def __init__(self, **limits: Any) -> None:
        try:
            super().__init__(**limits)
        except ValidationError as error:
            first = error.errors()[0]
            where = str(first["loc"][0])
            if first["type"] == "extra_forbidden":
                raise ConfigurationError(
                    f"no budget is called '{where}'{suggest(where, type(self).model_fields)}"
                ) from None
            if where == "runtime":
                raise ConfigurationError(first["msg"].removeprefix("Value error, ")) from None
            raise ConfigurationError(
                f"budget {where} is {first['input']!r}, expected a share in (0, 1] or a size such as 20M, 100kB or 3ms"
            ) from None
        # 0.5ms is half a millisecond, not half the latency.
        self._with_unit = frozenset(
            n for n in LIMITS if isinstance(limits.get(n), str) and limits[n].strip()[-1].isalpha()
        )

    @field_validator(*LIMITS, mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, str):
            match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", value)
            if not match or match[2].lower() not in UNITS:
                raise ValueError("not a size")
            value = float(match[1]) * UNITS[match[2].lower()]
        if isinstance(value, int | float) and not value > 0:
            raise ValueError("not positive")
        return value

    @field_validator("runtime")
    @classmethod
    def _runtime(cls, value: str) -> str:
        return runtime_name(value)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"macs=0.5,bytes=100kB"``."""
        limits: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = part.partition("=")
            if not equals:
                raise ConfigurationError(f"budget '{part}' is not NAME=VALUE; write e.g. macs=0.5")
            limits[name.strip()] = value.strip()
        return cls(**limits)

    def limits(self) -> dict[str, float]:
        """The limits that were given."""
        return {name: value for name in LIMITS if (value := getattr(self, name)) is not None}

    def as_data(self) -> dict[str, Any]:
        """As a recipe states it; the same budget can be made of it."""
        units = {"latency": "ms", "bytes": "B"}
        limits = {n: f"{v!r}{units.get(n, '')}" if n in self._with_unit else v for n, v in self.limits().items()}
        return limits if self.runtime == "pytorch-eager" else {**limits, "runtime": self.runtime}

    def absolute(self, name: str, before: float) -> float | None:
        """The limit ``name`` in absolute terms, given what the original has; None where no such limit was given."""
        value = getattr(self, name)
        return value * before if value is not None and value <= 1 and name not in self._with_unit else value

    def compare(self, before: Profile, after: Profile, latency: tuple[float, float] | None = None) -> list[Asked]:
        """Asked beside got, for the report; ``latency`` of both in milliseconds where the profiles' is another runtime's."""
        lines = []
        for name in self.limits():
            first, second = _amount(before, name), _amount(after, name)
            if name == "latency" and latency is not None:
                first, second = latency
            asked = self.absolute(name, first)
            assert asked is not None
            lines.append(Asked(name, asked, second, second <= asked * (1 + 1e-9)))
        return lines


def _amount(profile: Profile, name: str) -> float:
    if name == "latency":
        return profile.latency_ms.median if profile.latency_ms else float("nan")
    return float({"macs": profile.macs, "params": profile.nonzero_params, "bytes": profile.bytes}[name] or 0)


class Block(NamedTuple):
    """What is given back at once: ``units`` of a group. Blocks of higher ``key`` are given back earlier."""

    key: float
    group: str
    units: int


def widths(size: int, round_to: int = 1) -> list[int]:
    """Widths that a group of ``size`` units may have, ascending: the multiples of ``round_to`` below it, and all of it."""
    return [*range(round_to, size, round_to), size]


def blocks(group: str, keys: Sequence[float], round_to: int = 1) -> list[Block]:
    """The steps from a group's least width, ``widths(len(keys), round_to)[0]``, up to the whole group.

    Args:
        group: its name.
        keys: of every unit, ascending; the units of highest key are kept longest.
        round_to: every width but the whole is a multiple of it.
    """
    size = len(keys)
    return [Block(float(keys[size - low - 1]), group, high - low) for low, high in _steps(size, round_to)]


def _steps(size: int, round_to: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(widths(size, round_to)))


def fill(
    least: Plan, offered: Sequence[Block], fits: Callable[[Plan], bool], enough: Callable[[Plan], bool] | None = None
) -> Plan:
    """The plan that giving back ``offered`` makes of ``least``: highest key first, as long as ``fits`` holds.

    A block that does not fit closes its group, and the others go on (fine fill) until ``enough`` holds or nothing is
    left. Blocks of one group are given back in the order in which they stand. ``fits`` must fall with growing plans; it is
    tried some log2(len(offered)) times for every group that is closed.
    """
    plan, rest = dict(least), sorted(offered, key=lambda block: -block.key)
    while rest:
        if fits(_grown(plan, rest)):
            return _grown(plan, rest)
        fit, over = 0, len(rest)
        while over - fit > 1:
            middle = (fit + over) // 2
            fit, over = (middle, over) if fits(_grown(plan, rest[:middle])) else (fit, middle)
        plan = _grown(plan, rest[:fit])
        if enough is not None and enough(plan):
            return plan
        rest = [block for block in rest[fit:] if block.group != rest[fit].group]
    return plan


def _grown(plan: Plan, given: Sequence[Block]) -> Plan:
    plan = dict(plan)
    for block in given:
        plan[block.group] += block.units
    return plan


def cut_at(least: Plan, offered: Sequence[Block], ratio: float) -> Plan:
    """The plan without what has a key up to ``ratio``: with relative ranks as keys, floor(n ratio) units of each group.

    The tiny addend keeps floor(10 * 0.1) at 1 in floating point.
    """
    return _grown(least, [block for block in offered if block.key > ratio + 1e-9])


class Gauge:
    """Turns an estimate into what would be measured: linear between the points measured so far, and never falling.

    Where noise made a smaller network measure as the slower one, both count as their mean (isotonic regression).
    """

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def record(self, estimate: float, measured: float) -> None:
        """Learn that ``estimate`` came out as ``measured``."""
        self.points.append((estimate, measured))

    def __call__(self, estimate: float) -> float:
        pools: list[tuple[float, int]] = []  # (mean, number of points)
        points = sorted(self.points)
        for _, measured in points:
            mean, count = measured, 1
            while pools and pools[-1][0] > mean:
                before, number = pools.pop()
                mean, count = (before * number + mean * count) / (number + count), number + count
            pools.append((mean, count))
        levels = [mean for mean, count in pools for _ in range(count)]
        return float(np.interp(estimate, [x for x, _ in points], levels))


Propose = Callable[[Callable[[Plan], bool], Callable[[Plan], bool]], Plan]
"""Given what fits and what is enough, the best plan: for instance `fill` with its first two arguments set."""


def solve(
    targets: Costs,
    propose: Propose,
    estimate: Callable[[Plan], Costs],
    measure: Callable[[Plan], Costs],
    least: Plan,
    full: Plan,
    rounds: int = 12,
    refinements: int = 0,
) -> tuple[Plan, Costs]:
    """The best plan whose measured costs are within all ``targets``, and these costs.

    Plans are searched by their estimates; what `measure` says of a proposal corrects the estimates (`Gauge`) for the next
    one. An estimate that is exact, or off by a constant or a factor, is right after the first round; a poor one still
    brackets the target. What costs in steps that no estimate knows, as latency does (kernels work on blocks of channels),
    may stay far below its target then: ``refinements`` searches once more by measuring alone.

    Args:
        targets: absolute limits.
        propose: searches the plans.
        estimate: costs of a plan, cheap and rising with it, for each target; any unit.
        measure: real costs of a plan.
        least: the smallest plan.
        full: the plan that keeps everything.
        rounds: most proposals measured.
        refinements: how many more, where those end more than 1 % below every target. A plan within one that fits is
            taken to fit, and one around one that does not not to.

    Raises:
        BudgetError: not even ``least`` is within the targets; the message says what is reachable.
    """
    gauges = {name: Gauge() for name in targets}
    known: list[tuple[Plan, Costs]] = []

    def tried(plan: Plan) -> Costs:
        costs, guess = measure(plan), estimate(plan)
        for name, gauge in gauges.items():
            gauge.record(guess[name], costs[name])
        known.append((plan, costs))
        return costs

    def expected(plan: Plan) -> dict[str, float]:
        guess = estimate(plan)
        return {name: gauge(guess[name]) for name, gauge in gauges.items()}

    costs = tried(full)
    if within(costs, targets):
        return full, costs
    best, best_costs = least, tried(least)
    require(best_costs, targets)
    for _ in range(rounds):
        plan = propose(
            lambda plan: within(expected(plan), targets), lambda plan: used_up(expected(plan), targets, NEAR / 2)
        )
        if any(plan == other for other, _ in known):
            break
        costs = tried(plan)
        if within(costs, targets) and _share(costs, targets) >= _share(best_costs, targets):
            best, best_costs = plan, costs
            if used_up(costs, targets, NEAR / 2):
                break
    if refinements and not used_up(best_costs, targets, NEAR / 2):
        plan, costs = _refined(targets, propose, tried, known, refinements)
        # What costs nothing more may just as well stay.
        if within(costs, targets) and (_inside(best, plan) or _share(costs, targets) >= _share(best_costs, targets)):
            best, best_costs = plan, costs
    return best, best_costs


def _refined(
    targets: Costs,
    propose: Propose,
    tried: Callable[[Plan], Costs],
    known: Sequence[tuple[Plan, Costs]],
    refinements: int,
) -> tuple[Plan, Costs]:
    """Search by measuring alone, as long as ``refinements`` lasts; ``known`` grows by what is ``tried``."""
    most_known = len(known) + refinements

    def fits(plan: Plan) -> bool:
        if any(_inside(plan, other) and within(costs, targets) for other, costs in known):
            return True
        if any(_inside(other, plan) and not within(costs, targets) for other, costs in known):
            return False
        return len(known) < most_known and within(tried(plan), targets)

    plan = propose(fits, lambda plan: any(plan == p and used_up(costs, targets, NEAR / 2) for p, costs in known))
    return plan, next((costs for other, costs in known if other == plan), None) or tried(plan)


def _inside(plan: Plan, other: Plan) -> bool:
    """Whether ``plan`` keeps no more of anything than ``other``."""
    return all(kept <= other[name] for name, kept in plan.items())


def within(costs: Costs, targets: Costs) -> bool:
    """Whether no cost is above its target."""
    return all(costs[name] <= target * (1 + 1e-9) for name, target in targets.items())


def used_up(costs: Costs, targets: Costs, near: float = NEAR) -> bool:
    """Whether some cost is within ``near`` of its target."""
    return _share(costs, targets) >= 1 - near


def _share(costs: Costs, targets: Costs) -> float:
    return max(costs[name] / target for name, target in targets.items())


def require(least: Costs, targets: Costs) -> None:
    """Raise BudgetError if the costs of the smallest network are above some target, saying what is reachable."""
    over = [name for name, target in targets.items() if least[name] > target * (1 + 1e-9)]
    if over:
        asked = ", ".join(f"{name}={targets[name]:.6g}" for name in over)
        reachable = f"{least[over[0]]:.6g} is" if len(over) == 1 else " and ".join(f"{n} {least[n]:.6g}" for n in over)
        raise BudgetError(
            f"budget {asked} cannot be met: {reachable}{'' if len(over) == 1 else ' are'} the least that is reachable"
        )


def most(low: int, high: int, name: str = "kept") -> Propose:
    """Propose ``{name: k}`` with the largest k in [low, high] that fits, for methods with one number to choose."""

    def propose(fits: Callable[[Plan], bool], enough: Callable[[Plan], bool]) -> Plan:
        fit, over = low, high + 1
        while over - fit > 1:
            middle = (fit + over) // 2
            fit, over = (middle, over) if fits({name: middle}) else (fit, middle)
        return {name: fit}

    return propose
