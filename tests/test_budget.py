"""Budgets in the user's units."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientdnns.budget import Budget, Gauge, blocks, cut_at, fill, most, require, solve, widths
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


@given(st.integers(1, 40), st.integers(1, 9))
def test_widths_are_multiples_or_everything(size, round_to) -> None:
    found = widths(size, round_to)
    assert found == sorted(set(found))
    assert found[-1] == size
    assert all(width % round_to == 0 for width in found[:-1])
    least = found[0] + sum(block.units for block in blocks("g", list(range(size)), round_to))
    assert least == size


GROUPS = st.dictionaries(st.sampled_from("abcde"), st.tuples(st.integers(1, 30), st.floats(0.1, 9)), min_size=1)


def offer(groups, round_to=1):
    keys = {name: [(rank + 1) / size for rank in range(size)] for name, (size, _) in groups.items()}
    least = {name: widths(size, round_to)[0] for name, (size, _) in groups.items()}
    full = {name: size for name, (size, _) in groups.items()}
    return least, full, [block for name in groups for block in blocks(name, keys[name], round_to)]


@given(GROUPS, st.integers(1, 8), st.floats(0, 1))
def test_fill_stays_within_its_limit_and_nothing_more_fits(groups, round_to, share) -> None:
    least, full, offered = offer(groups, round_to)

    def cost(plan):
        return sum(plan[name] * price for name, (_, price) in groups.items())

    limit = cost(least) + share * (cost(full) - cost(least)) + 1e-9
    plan = fill(least, offered, lambda p: cost(p) <= limit)
    assert cost(plan) <= limit
    for name, (size, price) in groups.items():
        allowed = widths(size, round_to)
        assert plan[name] in allowed
        if plan[name] < size:
            more = allowed[allowed.index(plan[name]) + 1] - plan[name]
            assert cost(plan) + more * price > limit, "one more block of any group is too much"


@given(GROUPS, st.floats(0, 1), st.floats(0, 1))
def test_without_the_fine_fill_more_budget_keeps_more_of_everything(groups, one, other) -> None:
    least, full, offered = offer(groups)
    small, large = sorted((one, other))
    plans = [
        fill(
            least,
            offered,
            lambda p, s=s: sum(p.values()) <= sum(least.values()) + s * sum(full.values()),
            lambda p: True,
        )
        for s in (small, large)
    ]
    assert all(plans[0][name] <= plans[1][name] for name in groups)


@given(st.integers(1, 200), st.floats(0, 0.999))
def test_cut_at_a_ratio_leaves_what_floor_leaves(size, ratio) -> None:
    least, _, offered = offer({"g": (size, 1.0)})
    assert cut_at(least, offered, ratio)["g"] == size - min(int(size * ratio + 1e-9), size - 1)


@settings(deadline=None)
@given(GROUPS, st.floats(0.05, 1), st.floats(0.2, 5), st.floats(0, 100), st.floats(0.5, 2))
def test_solve_meets_the_measured_target_whatever_the_estimate_is_off_by(
    groups, share, factor, constant, power
) -> None:
    least, full, offered = offer(groups)

    def estimate(plan):
        return {"macs": sum(plan[name] * price for name, (_, price) in groups.items())}

    def measure(plan):
        return {"macs": constant + factor * estimate(plan)["macs"] ** power}

    target = measure(least)["macs"] + share * (measure(full)["macs"] - measure(least)["macs"])
    plan, got = solve(
        {"macs": target}, lambda fits, enough: fill(least, offered, fits, enough), estimate, measure, least, full
    )
    assert got == measure(plan)
    assert got["macs"] <= target * (1 + 1e-9)
    if got["macs"] < 0.98 * target:
        cheapest = min(
            measure({**plan, name: plan[name] + 1})["macs"] for name, (size, _) in groups.items() if plan[name] < size
        )
        assert cheapest > 0.99 * target or power != 1


def test_solve_corrects_a_curved_estimate() -> None:
    plan, got = solve(
        {"bytes": 5000.0},
        most(1, 1000),
        lambda plan: {"bytes": plan["kept"]},
        lambda plan: {"bytes": 100 + plan["kept"] ** 2 / 50},
        {"kept": 1},
        {"kept": 1000},
    )
    assert 0.98 * 5000 <= got["bytes"] <= 5000
    assert plan["kept"] == pytest.approx((4900 * 50) ** 0.5, rel=0.02)


def test_gauge_is_monotone_in_spite_of_noise() -> None:
    gauge = Gauge()
    for estimate, measured in ((1, 1), (4, 10), (2, 6), (3, 4)):
        gauge.record(estimate, measured)
    values = [gauge(x / 10) for x in range(5, 45)]
    assert values == sorted(values)
    assert gauge(2) == gauge(3) == 5


def test_unreachable_budget_names_what_is_reachable() -> None:
    with pytest.raises(BudgetError, match=r"macs=0\.1 cannot be met: 0\.505 is the least that is reachable"):
        require({"macs": 0.505, "params": 3}, {"macs": 0.1, "params": 4})
    with pytest.raises(BudgetError, match=r"macs=0\.1, params=2 cannot be met: macs 0\.505 and params 3 are the least"):
        require({"macs": 0.505, "params": 3}, {"macs": 0.1, "params": 2})


def test_a_latency_with_a_unit_is_absolute_even_below_one() -> None:
    assert Budget.parse("latency=0.5ms").absolute("latency", 3.0) == 0.5
    assert Budget.parse("latency=0.5").absolute("latency", 3.0) == 1.5


def test_runtime_is_part_of_the_budget() -> None:
    assert Budget.parse("latency=0.5,runtime=ort").runtime == "onnxruntime"
    assert Budget.parse("runtime=ort").limits() == {}
    with pytest.raises(ConfigurationError, match="no runtime is called 'tensorrt'"):
        Budget.parse("latency=0.5,runtime=tensorrt")
