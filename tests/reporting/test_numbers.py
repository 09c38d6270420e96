"""Numbers as people read them."""

from __future__ import annotations

import pytest

from efficientdnns.reporting import numbers


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (431_080, "", "431,080"),
        (2_293_000, "", "2.293 M"),
        (25_557_032, "", "25.56 M"),
        (4.089e9, "", "4.089 G"),
        (999_999, "", "999,999"),
        (16_658, "B", "16.66 kB"),
        (999_990, "B", "1.000 MB"),
        (12, "B", "12 B"),
        (0, "", "0"),
        (None, "", "-"),
        (float("nan"), "", "-"),
    ],
)
def test_amounts(value, unit, text) -> None:
    assert numbers.amount(value, unit) == text


def test_ratios_have_an_x_and_no_ratio_is_made_of_nothing() -> None:
    assert numbers.ratio(10, 4) == "2.50x"
    assert numbers.ratio(1_724_920, 16_522) == "104.4x"
    assert numbers.ratio(4, 0) == numbers.ratio(None, 3) == numbers.ratio(3, None) == "-"


def test_a_share_is_whole_only_where_it_is() -> None:
    assert numbers.percent(1.0) == "100.0 %"
    assert numbers.percent(0.99999) == "> 99.9 %"
    assert numbers.percent(0.00001) == "< 0.1 %"
    assert numbers.percent(0.0) == "0.0 %"


def test_seconds_and_changes() -> None:
    assert [numbers.seconds(v) for v in (0.0331, 2.25, 600, 36_000)] == ["33.1 ms", "2.25 s", "10 min", "10 h"]
    assert numbers.change(-0.6, "%") == "−0.60 points"
    assert numbers.change(1.5, "perplexity") == "+1.50 perplexity"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (81.2, 98.9), (0.001, 0.0012), (-5, 1e9), (3, 3)])
def test_ticks_are_few_and_inside(low, high) -> None:
    found = numbers.ticks(low, high)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


@pytest.mark.parametrize(("low", "high"), [(1, 2), (2.8e5, 1.8e6), (1e-3, 1e9), (9, 11)])
def test_logarithmic_ticks_are_few_and_inside(low, high) -> None:
    found = numbers.log_ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low <= tick <= high for tick in found)
