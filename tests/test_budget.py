"""Budgets in the user's units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientdnns.budget import Budget, smallest_ratio
from efficientdnns.errors import BudgetError, ConfigurationError


def test_units_and_shares() -> None:
    budget = Budget.parse("macs=0.5, bytes=100kB,latency=3ms,params=20M")
    assert budget.limits() == {"macs": 0.5, "bytes": 1e5, "latency": 3.0, "params": 2e7}
    assert budget.absolute("macs", 400) == 200
    assert budget.absolute("bytes", 400) == 1e5
    assert Budget().absolute("macs", 400) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("macs", "not NAME=VALUE"),
        ("mac=0.5", "no budget is called 'mac'"),
        ("macs=-1", "budget macs is"),
        ("macs=half", "budget macs is 'half'"),
        ("bytes=3parsecs", "budget bytes is '3parsecs'"),
    ],
)
def test_errors_are_one_line(text, message) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        Budget.parse(text)
    assert "\n" not in str(error.value)


@given(st.floats(0.05, 1))
def test_smallest_ratio_meets_the_target(target) -> None:
    ratio = smallest_ratio(lambda r: (1 - r) ** 2, target)
    assert (1 - ratio) ** 2 <= target
    assert (1 - ratio) ** 2 >= target - 1e-3


def test_unreachable_budget_names_what_is_reachable() -> None:
    with pytest.raises(BudgetError, match=r"macs=0\.1 cannot be met: 0\.505 is the least"):
        smallest_ratio(lambda r: 1 - 0.5 * r, 0.1)
