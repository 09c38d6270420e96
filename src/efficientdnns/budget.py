"""Budgets in the user's own units, and what was asked beside what was got."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from efficientdnns.errors import BudgetError, ConfigurationError, suggest
from efficientdnns.measurement.profile import Profile

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "ms": 1.0, "s": 1e3}


class Asked(NamedTuple):
    """One line of the budget: what was asked (absolute), what was got, and whether that meets it."""

    name: str
    asked: float
    got: float
    met: bool


class Budget(BaseModel):
    """Upper limits for the result. A value up to 1 is a share of the original, a larger one absolute.

    ``macs`` (multiply-accumulates of one sample), ``params`` (non-zero parameters), ``bytes`` (size of the written file),
    ``latency`` (median milliseconds). Strings may carry a unit: ``"20M"``, ``"100kB"``, ``"3ms"``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None

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
            raise ConfigurationError(
                f"budget {where} is {first['input']!r}, expected a share in (0, 1] or a size such as 20M, 100kB or 3ms"
            ) from None

    @field_validator("*", mode="before")
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
        return {name: value for name, value in self.model_dump().items() if value is not None}

    def absolute(self, name: str, before: float) -> float | None:
        """The limit ``name`` in absolute terms, given what the original has; None where no such limit was given."""
        value = getattr(self, name)
        return None if value is None else value * before if value <= 1 else value

    def compare(self, before: Profile, after: Profile) -> list[Asked]:
        """Asked beside got, for the report."""
        lines = []
        for name in self.limits():
            asked = self.absolute(name, _amount(before, name))
            got = _amount(after, name)
            assert asked is not None
            lines.append(Asked(name, asked, got, got <= asked * (1 + 1e-9)))
        return lines


def _amount(profile: Profile, name: str) -> float:
    if name == "latency":
        return profile.latency_ms.median if profile.latency_ms else float("nan")
    return float({"macs": profile.macs, "params": profile.nonzero_params, "bytes": profile.bytes}[name] or 0)


def smallest_ratio(
    cost: Callable[[float], float], target: float, *, highest: float = 0.99, name: str = "macs"
) -> float:
    """The smallest pruning ratio in [0, ``highest``] with ``cost(ratio) <= target``, by bisection on a falling cost.

    Raises:
        BudgetError: ``target`` is below ``cost(highest)``; the message names what is reachable.
    """
    if cost(0.0) <= target:
        return 0.0
    reachable = cost(highest)
    if reachable > target:
        raise BudgetError(f"budget {name}={target:g} cannot be met: {reachable:g} is the least that is reachable")
    low, high = 0.0, highest
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return high
