"""Writing files so that a half-written one is never seen."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from efficientdnns.errors import FileFormatError


@contextmanager
def opening(path: Path, kind: str, runtime: str) -> Iterator[None]:
    """Say in one line why ``path`` (a ``kind``) cannot be opened with ``runtime``.

    Raises:
        FileFormatError: there is no file, or something was raised inside.
    """
    if not path.is_file():
        raise FileFormatError(f"{path} is no file; give {kind}")
    try:
        yield
    except Exception as error:
        raise FileFormatError(f"{runtime} cannot open {path}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder of its own; what was written there is moved beside ``path`` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield folder / path.name
        for file in sorted(folder.iterdir(), reverse=True):  # weights before the file that names them
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
