"""Numbers as a person reads them: four digits, a unit, and ``-`` where nothing was measured."""

from __future__ import annotations

import math
from typing import Any

MISSING = "-"


def amount(value: float | None, unit: str = "") -> str:
    """``"431,080"`` up to a million, ``"25.56 M"`` beyond; with the unit ``"B"`` always ``"16.66 kB"``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if unit != "B" and abs(value) < 1e6:
        return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.99995:
            return f"{value / size:#.4g} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def ratio(before: float | None, after: float | None) -> str:
    """``"3.23x"``: before divided by after."""
    return f"{times(before / after)}" if before is not None and after else MISSING


def times(value: float | None) -> str:
    """``"3.23x"``, ``"103.6x"``, ``"0.60x"``."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.2f}x" if value < 100 else f"{value:,.1f}x" if value < 1000 else f"{value:,.0f}x"


def percent(share: float | None) -> str:
    """``"97.0 %"`` of a share of one; never ``"100.0 %"`` or ``"0.0 %"`` where it is not quite so."""
    if share is None:
        return MISSING
    text = f"{100 * share:.1f}"
    if text == "100.0" and share < 1:
        text = "> 99.9"
    elif text == "0.0" and share > 0:
        text = "< 0.1"
    return f"{text} %"


def milliseconds(value: float | None) -> str:
    """``"0.548 ms"``."""
    return MISSING if value is None else f"{value:.4g} ms" if value >= 1 else f"{value:.3f} ms"


def seconds(value: float | None) -> str:
    """``"2.3 s"``, ``"40 min"``, ``"3.2 h"``, or in milliseconds where it is short."""
    if value is None:
        return MISSING
    if value < 0.1:
        return f"{1000 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def scored(value: float | None, unit: str = "", digits: int = 2) -> str:
    """A metric: ``"97.20 %"``."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.{digits}f}{' ' + unit if unit else ''}"


def change(value: float, unit: str = "") -> str:
    """A difference: ``"-1.00 points"`` of a metric in per cent, else in its unit."""
    return f"{value:+.2f}{' points' if unit == '%' else ' ' + unit if unit else ''}".replace("-", "−")


def plain(value: Any) -> str:
    """A field's value: numbers short, lists and mappings as they are written in a recipe."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or MISSING
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or MISSING
    return str(value)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that lie in [low, high], about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda step: abs(step - rough))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with multiples of them where that leaves at most six; else every second, third ... one."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [tick for power in powers for f in factors if low <= (tick := f * power) <= high]
        if len(found) <= 6:
            return found
    return found[:: -(-len(found) // 6)]
