"""The cache folder: downloads, and images decoded once."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np


def cache_folder() -> Path:
    """``$EFFICIENTDNNS_CACHE``, else ``~/.cache/efficientdnns`` (it need not exist yet)."""
    return Path(os.environ.get("EFFICIENTDNNS_CACHE") or Path.home() / ".cache" / "efficientdnns").expanduser()


def cached_arrays(
    name: str, sources: list[Path], make: Callable[[list[Path]], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """``make(sources)``, kept as two ``.npy`` files until a source file changes (its path, size or time).

    Files appear under their names only once complete. Where the cache cannot be written, a warning says so and the
    arrays are made anew every time.
    """
    facts = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sources]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    paths = [cache_folder() / f"{name}-{digest}-{part}.npy" for part in ("inputs", "targets")]
    try:
        inputs, targets = (np.load(path, allow_pickle=False) for path in paths)
        return inputs, targets
    except (OSError, ValueError, EOFError):
        pass
    arrays = make(sources)
    try:
        for path, array in zip(paths, arrays):
            _write(path, array)
    except OSError as error:
        warnings.warn(
            f"{name} is not cached ({error}); point EFFICIENTDNNS_CACHE at a folder that can be written", stacklevel=2
        )
    return arrays


def _write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
