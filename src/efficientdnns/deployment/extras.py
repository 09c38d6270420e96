"""Packages that a format needs beyond the core."""

from __future__ import annotations

import importlib.util

from efficientdnns.errors import ConfigurationError


def missing(*packages: str) -> list[str]:
    """Those of ``packages`` that are not installed."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def need(extra: str, *packages: str) -> None:
    """Raise `ConfigurationError` with the line to type where one of ``packages`` is not installed."""
    if absent := missing(*packages):
        raise ConfigurationError(
            f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed; "
            f"write pip install 'efficientdnns[{extra}]'"
        )
