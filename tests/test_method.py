"""Descriptions of methods: validation, registry, cards."""

from __future__ import annotations

from typing import ClassVar

import pytest
from pydantic import PositiveInt

from efficientdnns import method as registry
from efficientdnns.errors import ConfigurationError
from efficientdnns.method import Method, Paper, Ratio


class Example(Method):
    """An example."""

    paper: ClassVar[Paper | None] = None

    rate: Ratio = 0.3
    """Share."""
    steps: PositiveInt = 2
    """Steps."""


def test_errors_are_one_line_and_name_the_field() -> None:
    with pytest.raises(ConfigurationError, match=r"Example: rate is 1\.5, expected less than 1; the default is 0\.3"):
        Example(rate=1.5)
    with pytest.raises(ConfigurationError, match=r"no field 'rat' \(did you mean 'rate'\?\)"):
        Example(rat=0.5)
    with pytest.raises(ConfigurationError, match="steps is 'many'"):
        Example(steps="many")


def test_is_frozen_and_compares_by_value() -> None:
    assert Example(rate=0.5) == Example(rate=0.5)
    with pytest.raises(Exception, match="frozen"):
        Example().rate = 0.1


def test_fields_show_ranges_and_defaults() -> None:
    first, second = registry.fields(Example)
    assert first == {"name": "rate", "type": "number", "range": ">= 0 and < 1", "default": 0.3, "description": "Share."}
    assert second["range"] == "> 0"


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'knowledge-distillation'"):
        registry.get("knowledge-destillation")
    with pytest.raises(ConfigurationError, match="no kind of method is called 'prunning'"):
        registry.methods("prunning")
