"""Typed exceptions. Each message is one line: what is wrong, what was expected, what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EfficientDNNsError(Exception):
    """Base class of every error that a user can cause or cure; the command line prints it as one line and exits with 2."""


class ConfigurationError(EfficientDNNsError, ValueError):
    """A recipe, method, field, option or budget that cannot be meant."""


class DataError(EfficientDNNsError, ValueError):
    """Data that is missing, malformed or does not fit the model or the method."""


class ModelError(EfficientDNNsError, ValueError):
    """A model that cannot be found, built, traced or filled with the given weights."""


class SurgeryError(EfficientDNNsError, ValueError):
    """A structural change that cannot be made; the model is untouched."""


class BudgetError(EfficientDNNsError, ValueError):
    """A budget that cannot be met; the message names the closest reachable value."""


class FileFormatError(EfficientDNNsError, ValueError):
    """A file that is not what it claims to be, or was written by a newer version."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x' or 'y'?)"`` for the names nearest to ``name``, or the list of all where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f" (did you mean {' or '.join(repr(n) for n in near)}?)"
    return f" (known: {', '.join(known)})"
