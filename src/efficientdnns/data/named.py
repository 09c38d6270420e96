"""Named data sets: found under ``EFFICIENTDNNS_DATA`` or in the cache, else downloaded through torchvision.

| name | samples | shape | layout under ``EFFICIENTDNNS_DATA`` |
|---|---|---|---|
| ``digits`` | 1,297 + 500 | 1 x 28 x 28 (``size=8``: as they are) | none: scikit-learn holds them |
| ``mnist``, ``fashion-mnist`` | 60,000 + 10,000 | 1 x 28 x 28 | ``mnist/``: the four idx files, gzipped or not |
| ``cifar10`` | 50,000 + 10,000 | 3 x 32 x 32 | ``cifar10/*.parquet`` or ``cifar-10-batches-bin/*.bin`` |
| ``tinyshakespeare`` | 1.1 million characters | windows of 128 | ``tinyshakespeare/input.txt`` |
"""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from efficientdnns.data.augment import compose, random_crop, random_flip
from efficientdnns.data.cache import cache_folder, cached_arrays
from efficientdnns.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageFiles, normalise, read_parquet
from efficientdnns.data.source import Source, check_options
from efficientdnns.data.split import Split, TensorSplit
from efficientdnns.data.text import character_source
from efficientdnns.errors import ConfigurationError, DataError, suggest

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)]


def named_source(
    name: str,
    *,
    limit: int | None = None,
    evaluation_limit: int | None = None,
    reconstruct: bool = False,
    **options: Any,
) -> Source:
    """The named data set.

    ``limit`` keeps the first samples of the training data (before a calibration split is cut out of it) and
    ``evaluation_limit`` those of the evaluation data, for smoke runs. ``reconstruct`` makes it a regression of the
    flattened inputs, scaled to [0, 1], in place of the labels: a task for autoencoders. Other options: ``size``
    (``digits``: 8 to 32 pixels), ``shift`` (``mnist``, ``fashion-mnist``: training images move by up to so many pixels),
    ``augment`` (``cifar10``: false leaves out crops and flips) and ``length`` (``tinyshakespeare``: window).
    Raises `DataError` for an unknown name or missing data, `ConfigurationError` for an unknown option.
    """
    if name not in _READERS:
        raise DataError(f"no data set is named '{name}'{suggest(name, _READERS)}")
    reader = _READERS[name]
    check_options(f"data set '{name}'", options, reader, named_source)
    source = reader(**options)
    source = _reconstruction(source) if reconstruct else source
    return replace(source, train=_first(source.train, limit), evaluation=_first(source.evaluation, evaluation_limit))


def names() -> list[str]:
    """The named data sets."""
    return list(_READERS)


def data_folders(name: str) -> list[Path]:
    """Where a named data set is looked for, in this order."""
    given = os.environ.get("EFFICIENTDNNS_DATA")
    return ([Path(given).expanduser() / name] if given else []) + [cache_folder() / name]


def _digits(size: int = 28) -> Source:
    """Scikit-learn's 1,797 digits, scaled to [0, 1]; 1,297 to train and 500 to evaluate, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if not 8 <= size <= 224:
        raise ConfigurationError(f"size is {size}, expected 8 to 224 pixels for digits")
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    if size != 8:
        images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    targets = torch.tensor(data.target)
    rows = train_test_split(np.arange(len(targets)), test_size=500, stratify=data.target, random_state=0)
    train, test = (torch.from_numpy(np.sort(part)) for part in rows)
    return Source(
        "digits",
        train=TensorSplit(images[train], targets[train], name="train"),
        evaluation=TensorSplit(images[test], targets[test], name="test"),
        num_classes=10,
    )


def _mnist(shift: int = 0) -> Source:
    return _idx_source("mnist", "MNIST", 0.1307, 0.3081, shift)


def _fashion_mnist(shift: int = 0) -> Source:
    return _idx_source("fashion-mnist", "FashionMNIST", 0.2860, 0.3530, shift)


def _cifar10(augment: bool = True) -> Source:
    """CIFAR-10 as bytes, normalised with ImageNet's mean and std; training crops (4 pixels of padding) and flips."""
    folders = data_folders("cifar10")
    folders += [folder.parent / "cifar-10-batches-bin" for folder in folders]
    found = next((folder for folder in folders if _cifar10_files(folder)), None) or _download_cifar10(folders)
    files = _cifar10_files(found)
    read = _read_cifar10_parquet if files["train"][0].suffix == ".parquet" else _read_cifar10_binary
    parts = {part: cached_arrays(f"cifar10-{part}", files[part], read) for part in files}
    prepare = normalise(IMAGENET_MEAN, IMAGENET_STD)
    change = compose(random_crop(4), random_flip()) if augment else None
    return Source(
        "cifar10",
        train=TensorSplit(*parts["train"], name="train", prepare=prepare, augment=change),
        evaluation=TensorSplit(*parts["test"], name="test", prepare=prepare),
        num_classes=10,
    )


def _tinyshakespeare(length: int = 128) -> Source:
    folders = data_folders("tinyshakespeare")
    for folder in folders:
        if (folder / "input.txt").is_file():
            text = (folder / "input.txt").read_text(encoding="utf-8")
            return character_source(text, "tinyshakespeare", length=length)
    raise _absent("tinyshakespeare", "tinyshakespeare/input.txt", "it is not downloaded by itself")


_READERS: dict[str, Callable[..., Source]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "tinyshakespeare": _tinyshakespeare,
}


def _idx_source(name: str, torchvision_name: str, mean: float, std: float, shift: int) -> Source:
    if not 0 <= shift <= 8:
        raise ConfigurationError(f"shift is {shift}, expected 0 to 8 pixels for {name}")
    folders = data_folders(name)
    folders += [folder.parent / torchvision_name / "raw" for folder in folders]
    folders += [Path(prefix) / "share" / "datasets" / name for prefix in (sys.prefix, "/usr/local", "/usr")]
    found = next((folder for folder in folders if _idx_files(folder)), None)
    if found is None:
        try:
            from torchvision import datasets

            getattr(datasets, torchvision_name)(str(cache_folder()), download=True)
        except (ImportError, OSError, RuntimeError) as error:
            raise _absent(name, f"{name}/ with {', '.join(IDX_FILES)} (.gz)", _reason(error)) from None
        found = cache_folder() / torchvision_name / "raw"

    def split(part: str, images: np.ndarray, labels: np.ndarray) -> TensorSplit:
        pixels = torch.from_numpy(images).unsqueeze(1).float().div_(255).sub_(mean).div_(std)
        change = random_crop(shift, -mean / std) if part == "train" and shift else None
        return TensorSplit(pixels, labels, name=part, augment=change)

    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in _idx_files(found))
    train, test = split("train", train_images, train_labels), split("test", test_images, test_labels)
    return Source(name, train, test, num_classes=10)


def _idx_files(folder: Path) -> list[Path]:
    """The four files, in the order of ``IDX_FILES``, or nothing."""
    found = [next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None) for name in IDX_FILES]
    return [path for path in found if path is not None] if all(found) else []


def read_idx(path: Path) -> np.ndarray:
    """An idx file (optionally gzipped) of unsigned bytes: magic 0 0 8 rank, the sizes (big-endian), the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({_reason(error)})") from None
    rank = content[3] if len(content) > 3 else 0
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * rank], ">i4").tolist()) if content[:3] == b"\0\0\x08" else ()
    if not shape or len(content) != 4 + 4 * rank + int(np.prod(shape)):
        raise DataError(f"{path} is not a complete idx file of unsigned bytes; get it again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


def _cifar10_files(folder: Path) -> dict[str, list[Path]]:
    parquet = {part: sorted(folder.glob(f"{part}-*.parquet")) for part in ("train", "test")}
    if all(parquet.values()):
        return parquet
    binary = {"train": [folder / name for name in CIFAR10_BATCHES], "test": [folder / "test_batch.bin"]}
    return binary if all(path.is_file() for files in binary.values() for path in files) else {}


def _read_cifar10_parquet(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    images, labels, names = read_parquet(files)
    return ImageFiles(images, labels, names or [], channels=3).arrays()


def _read_cifar10_binary(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte and 3,072 pixels (channel, row, column)."""
    content = [np.fromfile(path, np.uint8) for path in files]
    if wrong := [path for path, values in zip(files, content) if len(values) % 3073]:
        raise DataError(f"{wrong[0]} is not a CIFAR-10 binary file (records of 3,073 bytes); get it again")
    records = np.concatenate(content).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), records[:, 0].astype(np.int64)


def _download_cifar10(folders: list[Path]) -> Path:
    # The archive of binary files, because torchvision's own reader of the other one unpickles it.
    layout = "cifar10/train-*.parquet and test-*.parquet (columns image and label), or cifar-10-batches-bin/*.bin"
    if any((folder.parent / "cifar-10-batches-py").is_dir() for folder in folders):
        layout += "; cifar-10-batches-py holds pickles and is not read"
    try:
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(CIFAR10_URL, str(cache_folder()), md5=CIFAR10_MD5)
    except (ImportError, OSError, RuntimeError) as error:
        raise _absent("cifar10", layout, _reason(error)) from None
    return cache_folder() / "cifar-10-batches-bin"


def _reconstruction(source: Source) -> Source:
    """The same inputs, scaled to [0, 1] by the training data's range, as targets of themselves."""
    train, test = source.train, source.evaluation
    both = (train, test)
    if not all(isinstance(s, TensorSplit) and s.prepare is None and s.inputs.is_floating_point() for s in both):
        raise ConfigurationError(f"reconstruct is for images of numbers, such as mnist; leave it out for {source.name}")
    assert isinstance(train, TensorSplit)
    assert isinstance(test, TensorSplit)
    low, high = float(train.inputs.min()), float(train.inputs.max())

    def scaled(split: TensorSplit) -> TensorSplit:
        pixels = ((split.inputs - low) / (high - low)).clamp(0.0, 1.0)
        return TensorSplit(pixels, pixels.flatten(1), name=split.name)

    return replace(source, train=scaled(train), evaluation=scaled(test), kind="regression", num_classes=None)


def _first(split: Split, limit: int | None) -> Split:
    if limit is None or limit >= len(split):
        return split
    if limit < 1:
        raise ConfigurationError(f"limit is {limit}, expected at least 1 sample")
    return split.subset(torch.arange(limit))


def _absent(name: str, layout: str, reason: str) -> DataError:
    given = os.environ.get("EFFICIENTDNNS_DATA")
    state = f"is '{given}'" if given else "is not set"
    return DataError(
        f"data set '{name}' is not here and cannot be downloaded ({reason}); "
        f"EFFICIENTDNNS_DATA {state}, expected there: {layout}"
    )


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
