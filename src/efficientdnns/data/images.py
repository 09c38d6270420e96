"""The user's own images: a folder of class directories, or parquet files with an image column and a label column."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from efficientdnns.data.source import Source
from efficientdnns.data.split import Augment, DatasetSplit, Prepare, Split, TensorSplit, generator
from efficientdnns.errors import DataError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".pgm", ".ppm"}
EVALUATION_NAMES = ("test", "val", "valid", "validation")
"""Names of the evaluation part, the first present wins; where a second is present too, that one is the calibration."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IN_MEMORY_BYTES = 1 << 30


def normalise(mean: Sequence[float], std: Sequence[float]) -> Prepare:
    """A batched function from bytes (B, C, H, W) to floats ``(x / 255 - mean) / std``."""
    shift = torch.tensor(mean).view(-1, 1, 1) * 255
    scale = torch.tensor(std).view(-1, 1, 1) * 255

    def prepare(images: Tensor) -> Tensor:
        return images.float().sub_(shift.to(images.device)).div_(scale.to(images.device))

    return prepare


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Encoded images (paths or bytes) and labels; an item is (bytes (C, H, W), label).

    Images become RGB (``channels=3``) or grey (1). With ``size`` = (height, width) they are resized (bilinear);
    without it they must all be of the first one's size. Raises `DataError` naming the image that cannot be read.
    """

    def __init__(
        self,
        images: Sequence[Path | bytes],
        labels: Sequence[int],
        classes: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        channels: int | None = None,
    ) -> None:
        self.images, self.targets, self.classes = images, list(labels), list(classes)
        first = self._open(0)
        self.channels = channels or (1 if first.mode in ("1", "L", "I", "F", "I;16") else 3)
        self.size = size or (first.height, first.width)
        self._resize = size is not None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self._pixels(index)), self.targets[index]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All images (N, C, H, W) as bytes and their labels."""
        pixels = np.empty((len(self), self.channels, *self.size), np.uint8)
        for index in range(len(self)):
            pixels[index] = self._pixels(index)
        return pixels, np.asarray(self.targets, np.int64)

    def _open(self, index: int) -> Any:
        image_module = _pillow()
        source = self.images[index]
        where = f"image {source}" if isinstance(source, Path) else f"image number {index}"
        try:
            image = image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where} cannot be read as an image ({str(error).splitlines()[0]})") from None
        return image

    def _pixels(self, index: int) -> np.ndarray:
        image = self._open(index).convert("L" if self.channels == 1 else "RGB")
        if (image.height, image.width) != self.size:
            if not self._resize:
                first, other = "x".join(map(str, self.size)), f"{image.height}x{image.width}"
                raise DataError(f"images have different sizes ({first} and {other} pixels); give size=, e.g. size=224")
            image = image.resize(self.size[::-1], _pillow().Resampling.BILINEAR)
        pixels = np.array(image, np.uint8)
        return pixels[None] if self.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def folder_source(
    folder: Path | str, *, evaluation_share: float = 0.2, seed: int = 0, num_workers: int = 0, **options: Any
) -> Source:
    """Images in one directory a class: ``train/CLASS/*.png`` with ``test/`` or ``val/`` beside it, or ``CLASS/*.png``.

    One tree without a test part is divided by class with ``seed``: ``evaluation_share`` of each class is held out for
    evaluation. With both ``test/`` and ``val/``, the latter is the calibration split.
    ``options``: ``size``, ``channels``, ``mean``, ``std`` and ``augment`` as `image_source` has them.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; expected one with a directory for each class")
    parts = {name: root / name for name in ("train", *EVALUATION_NAMES) if (root / name).is_dir()}
    if "train" not in parts:
        parts = {"all": root}
    elif len(parts) == 1:
        parts = {"all": parts["train"]}
    classes = sorted(child.name for child in next(iter(parts.values())).iterdir() if _is_class(child))
    if len(classes) < 2:
        raise DataError(
            f"{root} holds images of {len(classes)} classes, expected at least 2: "
            "CLASS/*.png, or train/CLASS/*.png and test/CLASS/*.png"
        )
    found = {name: _class_files(part, classes) for name, part in parts.items()}
    return image_source(
        root.name, found, classes, evaluation_share=evaluation_share, seed=seed, num_workers=num_workers, **options
    )


def parquet_source(
    path: Path | str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    evaluation_share: float = 0.2,
    seed: int = 0,
    num_workers: int = 0,
    **options: Any,
) -> Source:
    """Images in parquet: one file, or a folder of ``train*.parquet`` and ``test*.parquet`` (or ``val*``).

    The image column holds encoded bytes or ``{bytes, path}`` structs; it and the label column (integers or names) are
    found by type and name unless given. One file is divided as `folder_source` divides one tree.
    """
    path = Path(path)
    parts = parquet_parts(path)
    found: dict[str, tuple[list[bytes], list[Any]]] = {}
    classes: list[str] | None = None
    for name, files in parts.items():
        images, labels, known = read_parquet(files, image_column, label_column)
        found[name], classes = (images, labels), classes or known
    values = sorted({label for _, labels in found.values() for label in labels})
    if values and isinstance(values[0], int):
        if values[0] < 0:
            raise DataError(f"{path} has the label {values[0]}; expected integers from 0, or names")
        classes = classes or [str(i) for i in range(values[-1] + 1)]
        if values[-1] >= len(classes):
            raise DataError(f"{path} has the label {values[-1]} but only {len(classes)} class names")
    else:
        classes = [str(value) for value in values]
        codes = {value: code for code, value in enumerate(values)}
        found = {name: (images, [codes[label] for label in labels]) for name, (images, labels) in found.items()}
    return image_source(
        path.stem, found, classes, evaluation_share=evaluation_share, seed=seed, num_workers=num_workers, **options
    )


def image_source(
    name: str,
    found: dict[str, Any],
    classes: Sequence[str],
    *,
    evaluation_share: float,
    seed: int,
    num_workers: int,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
) -> Source:
    """The source over images found as ``{part: (images, labels)}``, part being ``train``/``test``/... or ``all``.

    ``size`` resizes (an integer: square). Pixels are normalised with ``mean`` and ``std`` (ImageNet's for colour, 0.5
    for grey). Up to 1 GiB of pixels is decoded once and kept in memory; larger sets are decoded as they are read.
    """
    if "all" in found:
        if not 0 < evaluation_share < 1:
            raise DataError(f"evaluation_share is {evaluation_share}, expected a share between 0 and 1")
        images, labels = found["all"]
        kept, held_out = divide_by_class(labels, evaluation_share, seed)
        found = {
            part: ([images[i] for i in rows], [labels[i] for i in rows])
            for part, rows in (("train", kept), ("evaluation", held_out))
        }
    shape = (size, size) if isinstance(size, int) else size
    files: dict[str, ImageFiles] = {}
    for part, (images, labels) in found.items():
        if not images:
            raise DataError(f"the {part} part of {name} has no images")
        files[part] = ImageFiles(images, labels, classes, size=shape, channels=channels)
        channels = files[part].channels
    if len(sizes := {file.size for file in files.values()}) > 1:
        listed = " and ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise DataError(f"images have different sizes ({listed} pixels); give size=, e.g. size=224")
    colour = channels == 3
    prepare = normalise(mean or (IMAGENET_MEAN if colour else (0.5,)), std or (IMAGENET_STD if colour else (0.5,)))
    splits: dict[str, Split] = {}
    for part, data in files.items():
        change = augment if part == "train" else None
        if len(data) * data.channels * data.size[0] * data.size[1] <= IN_MEMORY_BYTES:
            splits[part] = TensorSplit(*data.arrays(), name=part, prepare=prepare, augment=change)
        else:
            splits[part] = DatasetSplit(data, name=part, num_workers=num_workers, prepare=prepare, augment=change)
    train = splits.pop("train")
    evaluation = splits.pop(next(part for part in ("evaluation", *EVALUATION_NAMES) if part in splits))
    calibration = next(iter(splits.values()), None)
    return Source(name, train, evaluation, calibration, num_classes=len(classes))


def divide_by_class(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices in two parts, ``share`` of each class (at least one where it has two) in the second; sorted."""
    values, held_out = np.asarray(labels), list[int]()
    for label in np.unique(values):
        rows = np.flatnonzero(values == label)
        count = max(1, round(share * len(rows))) if len(rows) > 1 else 0
        order = torch.randperm(len(rows), generator=generator(seed, int(label))).numpy()
        held_out += rows[order[:count]].tolist()
    return sorted(set(range(len(values))) - set(held_out)), sorted(held_out)


def parquet_parts(path: Path) -> dict[str, list[Path]]:
    """Which files are ``train``, ``test``, ...; all of them are ``all`` where no name says so."""
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a parquet file or a folder of them")
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise DataError(f"{path} has no *.parquet file")
    parts = {name: [f for f in files if f.name.startswith(name)] for name in ("train", *EVALUATION_NAMES)}
    # "val" is also the beginning of "valid" and "validation".
    for short, longer in (("val", "valid"), ("valid", "validation")):
        parts[short] = [f for f in parts[short] if f not in parts[longer]]
    parts = {name: found for name, found in parts.items() if found}
    return parts if "train" in parts and len(parts) > 1 else {"all": files}


def read_parquet(
    files: Sequence[Path], image_column: str | None = None, label_column: str | None = None
) -> tuple[list[bytes], list[Any], list[str] | None]:
    """Encoded images, labels and (where the metadata of Hugging Face ``datasets`` has them) class names."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError("reading parquet needs pyarrow; pip install 'efficientdnns[data]'") from None
    images: list[bytes] = []
    labels: list[Any] = []
    names = None
    for file in files:
        try:
            table = pq.read_table(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{file} cannot be read as parquet ({str(error).splitlines()[0]})") from None
        image, label = _columns(file, table.schema, image_column, label_column)
        pixels = table.column(image).to_pylist()
        images += [row["bytes"] if isinstance(row, dict) else row for row in pixels]
        labels += table.column(label).to_pylist()
        names = names or _class_names(table.schema.metadata, label)
    if any(image is None for image in images) or any(label is None for label in labels):
        raise DataError(f"{files[0].parent} has rows without image bytes or label; every row needs both")
    return images, labels, names


def _columns(file: Path, schema: Any, image: str | None, label: str | None) -> tuple[str, str]:
    import pyarrow.types as kinds

    def holds_bytes(field: Any) -> bool:
        if kinds.is_struct(field.type):
            return field.type.get_field_index("bytes") >= 0
        return bool(kinds.is_binary(field.type) or kinds.is_large_binary(field.type))

    pictures = [field.name for field in schema if holds_bytes(field)]
    codes = [
        f.name for f in schema if kinds.is_integer(f.type) or kinds.is_string(f.type) or kinds.is_large_string(f.type)
    ]
    named = [name for name in codes if name.lower() in ("label", "labels", "target", "class", "category", "fine_label")]
    chosen = []
    for what, given, candidates in (("image", image, pictures), ("label", label, named or codes)):
        if given is not None and given not in schema.names:
            raise DataError(f"{file} has no column '{given}'; it has {', '.join(schema.names)}")
        if given is None and len(candidates) != 1:
            hint = "bytes" if what == "image" else "integers or names"
            raise DataError(
                f"{file} has {len(candidates)} columns that may hold the {what} ({hint}); "
                f"give {what}_column=, one of {', '.join(schema.names)}"
            )
        chosen.append(given or candidates[0])
    return chosen[0], chosen[1]


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return list(features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _is_class(folder: Path) -> bool:
    return folder.is_dir() and not folder.name.startswith(".") and any(_is_image(file) for file in folder.rglob("*"))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")


def _class_files(folder: Path, classes: list[str]) -> tuple[list[Path], list[int]]:
    present = {child.name for child in folder.iterdir() if _is_class(child)}
    if unknown := sorted(present - set(classes)):
        raise DataError(f"{folder} has a class '{unknown[0]}' that the training images lack (they have {len(classes)})")
    pairs = [
        (file, code)
        for code, name in enumerate(classes)
        if name in present
        for file in sorted((folder / name).rglob("*"))
        if _is_image(file)
    ]
    return [file for file, _ in pairs], [code for _, code in pairs]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("reading images needs Pillow; pip install 'efficientdnns[data]'") from None
    return Image
