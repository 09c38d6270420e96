"""Splits, batched augmentation, named data sets, image folders, parquet files and text."""

from efficientdnns.data.augment import compose, random_crop, random_flip
from efficientdnns.data.convert import as_split, carve
from efficientdnns.data.named import names
from efficientdnns.data.split import Batch, DatasetSplit, LoaderSplit, Split, TensorSplit
from efficientdnns.data.text import WindowSplit

__all__ = [
    "Batch",
    "DatasetSplit",
    "LoaderSplit",
    "Split",
    "TensorSplit",
    "WindowSplit",
    "as_split",
    "carve",
    "compose",
    "names",
    "random_crop",
    "random_flip",
]
