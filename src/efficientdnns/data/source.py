"""What every reader of data gives: the splits of a task and what they mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from efficientdnns.data.split import Split
from efficientdnns.errors import ConfigurationError, suggest


@dataclass(frozen=True)
class Source:
    """Splits and facts, named as the arguments of `efficientdnns.task.Task`; ``None`` leaves the task's default."""

    name: str
    train: Split
    evaluation: Split
    calibration: Split | None = None
    kind: str = "classification"
    num_classes: int | None = None


def check_options(what: object, options: Iterable[str], *functions: Callable[..., Any]) -> None:
    """Raise `ConfigurationError` for an option that none of the functions takes by keyword."""
    known = sorted(
        {
            parameter.name
            for function in functions
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is not parameter.empty
        }
    )
    for option in options:
        if option not in known:
            hint = suggest(option, known) if known else " (it has none)"
            raise ConfigurationError(f"{what} has no option '{option}'{hint}")
