"""Factories in the user's own code: ``path/to/file.py:factory`` or ``package.module:factory``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from efficientdnns.errors import EfficientDNNsError, suggest


def load_factory(spec: str, error: type[EfficientDNNsError]) -> Callable[..., Any]:
    """The function or class that ``spec`` names.

    A file is imported by its place, once per version of the file, under a module name of its own; its folder can be
    imported from while it runs, and ``sys.path`` is as before afterwards. Raises ``error`` with one line if the file is
    missing, fails, or has no such name.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise error(f"'{spec}' names no factory; write path/to/file.py:factory")
    module = _import_file(Path(where), error) if where.endswith(".py") else _import_module(where, error)
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise error(f"{where} has no function or class '{name}'{suggest(name, known)}")
    return found


def call_factory(spec: str, options: Mapping[str, Any], error: type[EfficientDNNsError]) -> Any:
    """What the factory named by ``spec`` returns for ``options``; its own failures become ``error`` in one line."""
    factory = load_factory(spec, error)
    try:
        return factory(**options)
    except EfficientDNNsError:
        raise
    except Exception as reason:
        raise error(f"{spec} failed: {_describe(reason)}") from reason


def _import_file(path: Path, error: type[EfficientDNNsError]) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise error(f"{path} does not exist; expected a Python file with the factory in it")
    digest = hashlib.sha256(f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}".encode()).hexdigest()[:12]
    key = f"efficientdnns_user_{path.stem.replace('-', '_')}_{digest}"
    if key in sys.modules:
        return sys.modules[key]
    specification = importlib.util.spec_from_file_location(key, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    before = list(sys.path)
    # Dataclasses and loader processes look a module up by its name.
    sys.modules[key] = module
    sys.path.insert(0, str(path.parent))
    try:
        specification.loader.exec_module(module)
    except Exception as reason:
        del sys.modules[key]
        raise error(f"{path} cannot be imported: {_describe(reason)}") from reason
    finally:
        sys.path[:] = before
    return module


def _import_module(name: str, error: type[EfficientDNNsError]) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as reason:
        raise error(f"'{name}' cannot be imported: {_describe(reason)}") from reason


def _describe(reason: Exception) -> str:
    """Type and first line of the message, and the line where it happened."""
    lines = str(reason).strip().splitlines()
    text = f"{type(reason).__name__}: {lines[0]}" if lines else type(reason).__name__
    frames = traceback.extract_tb(reason.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text
