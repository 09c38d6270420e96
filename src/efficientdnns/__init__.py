"""EfficientDNNs: published methods that make neural networks smaller and faster, behind one interface.

>>> import efficientdnns as ed
>>> task = ed.Task.from_name("digits")
>>> model = ed.models.build("lenet5")
>>> history = ed.fit(model, task, epochs=3)  # doctest: +SKIP
>>> result = ed.compress(model, task, [ed.NISP(pruning_ratio=0.5)])  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from efficientdnns import models
from efficientdnns.budget import Budget
from efficientdnns.compress import compress
from efficientdnns.errors import (
    BudgetError,
    ConfigurationError,
    DataError,
    EfficientDNNsError,
    FileFormatError,
    ModelError,
    SurgeryError,
)
from efficientdnns.fit import Fit, fit
from efficientdnns.measurement.profile import Profile
from efficientdnns.measurement.profile import profile as measure
from efficientdnns.method import KINDS, Method, Paper, Together, TrainingMethod, methods, registered
from efficientdnns.recipe import Recipe
from efficientdnns.result import Result, load
from efficientdnns.run import run
from efficientdnns.session import Session
from efficientdnns.task import Metric, Task
from efficientdnns.training import Callback, TrainingSettings

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "BudgetError",
    "Callback",
    "ConfigurationError",
    "DataError",
    "EfficientDNNsError",
    "FileFormatError",
    "Fit",
    "Method",
    "Metric",
    "ModelError",
    "Paper",
    "Profile",
    "Recipe",
    "Result",
    "Session",
    "SurgeryError",
    "Task",
    "Together",
    "TrainingMethod",
    "TrainingSettings",
    "compress",
    "fit",
    "load",
    "measure",
    "methods",
    "models",
    "registered",
    "run",
]


def _import_methods() -> None:
    # Every module of a kind room is imported, so that a new method is one new file and nothing else.
    for room in KINDS:
        name = f"{__name__}.{room}"
        if importlib.util.find_spec(name) is None:
            continue
        package = importlib.import_module(name)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{name}.{module.name}")
    for method in registered().values():
        globals()[method.__name__] = method
        if method.__name__ not in __all__:
            __all__.append(method.__name__)


_import_methods()


def __getattr__(name: str) -> Any:
    from efficientdnns.errors import suggest

    raise AttributeError(f"module 'efficientdnns' has no attribute '{name}'{suggest(name, __all__)}")
