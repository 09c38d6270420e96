from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from efficientdnns.data import named
from efficientdnns.data.cache import cached_arrays
from efficientdnns.data.named import IDX_FILES, named_source, read_idx
from efficientdnns.data.split import TensorSplit
from efficientdnns.errors import ConfigurationError, DataError
from efficientdnns.task import Task


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFICIENTDNNS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("EFFICIENTDNNS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path


def test_digits() -> None:
    task = Task.from_name("digits")
    assert task.train is not None
    assert task.evaluation is not None
    assert task.calibration is not None
    assert (len(task.train), len(task.calibration), len(task.evaluation)) == (1168, 129, 500)
    batch = task.evaluation.take(range(500))
    assert tuple(batch.inputs.shape) == (500, 1, 28, 28)
    assert 0 <= batch.inputs.min() < batch.inputs.max() <= 1
    assert batch.targets is not None
    assert batch.targets.bincount().tolist() == [50, 51, 49, 51, 50, 51, 50, 50, 48, 50]
    assert torch.equal(Task.from_name("digits").train.take([0, 900]).inputs, task.train.take([0, 900]).inputs)  # type: ignore[union-attr]


def test_digits_options() -> None:
    task = Task.from_name("digits", size=8, limit=100, evaluation_limit=20, seed=1)
    assert tuple(task.example_input.shape) == (1, 1, 8, 8)
    assert (len(task.train), len(task.calibration), len(task.evaluation)) == (90, 10, 20)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"data set 'digits' has no option 'siez' \(did you mean 'size'"):
        Task.from_name("digits", siez=8)
    with pytest.raises(DataError, match=r"no data set is named 'digts' \(did you mean 'digits'"):
        Task.from_name("digts")
    with pytest.raises(ConfigurationError, match="limit is 0"):
        Task.from_name("digits", limit=0)


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("layout", ["mnist/{}.gz", "mnist/{}", "MNIST/raw/{}"])
def test_idx_files(folders: Path, layout: str) -> None:
    rng = np.random.default_rng(0)
    for name in IDX_FILES:
        shape = (
            ((20, 28, 28) if "images" in name else (20,))
            if "train" in name
            else ((5, 28, 28) if "images" in name else (5,))
        )
        write_idx(folders / "data" / layout.format(name), rng.integers(0, 10, shape, dtype=np.uint8))
    source = named_source("mnist")
    assert isinstance(source.train, TensorSplit)
    raw = read_idx(folders / "data" / layout.format(IDX_FILES[0]))
    expected = (torch.from_numpy(raw).float() / 255 - 0.1307) / 0.3081
    assert torch.allclose(source.train.inputs[:, 0], expected)
    assert (len(source.train), len(source.evaluation), source.num_classes) == (20, 5, 10)


def test_fashion_mnist_of_a_system_package(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(folders))
    for name in IDX_FILES:
        shape = (6, 28, 28) if "images" in name else (6,)
        write_idx(folders / "share" / "datasets" / "fashion-mnist" / f"{name}.gz", np.ones(shape, np.uint8))
    assert len(named_source("fashion-mnist").train) == 6


def test_a_truncated_idx_file(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    write_idx(path, np.zeros(10, np.uint8))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="not a complete idx file"):
        read_idx(path)
    (tmp_path / "x.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "x.gz")


def test_cifar10_binary_is_read_once_and_cached(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    folder = folders / "data" / "cifar-10-batches-bin"
    folder.mkdir()
    records = {}
    for name in (*named.CIFAR10_BATCHES, "test_batch.bin"):
        records[name] = rng.integers(0, 10, (4, 3073), dtype=np.uint8)
        records[name].tofile(folder / name)
    source = named_source("cifar10")
    assert isinstance(source.train, TensorSplit)
    first = records["data_batch_1.bin"]
    assert np.array_equal(source.train.inputs[0].numpy(), first[0, 1:].reshape(3, 32, 32))
    assert source.train.targets.tolist()[:4] == first[:, 0].tolist()  # type: ignore[union-attr]
    assert source.train.augment is not None
    assert source.evaluation.augment is None
    assert named_source("cifar10", augment=False).train.augment is None
    monkeypatch.setattr(named, "_read_cifar10_binary", lambda files: pytest.fail("read again"))
    assert torch.equal(named_source("cifar10").train.inputs, source.train.inputs)  # type: ignore[attr-defined]


def test_the_cache_follows_its_sources(folders: Path) -> None:
    path = folders / "source"
    calls = []

    def make(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        calls.append(1)
        value = int(files[0].read_text())
        return np.full(3, value, np.uint8), np.full(3, value)

    for text, expected in (("7", 1), ("7", 1), ("12", 2)):
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        inputs, _ = cached_arrays("numbers", [path], make)
        assert inputs.tolist() == [int(text)] * 3
        assert len(calls) == expected
    assert not [file for file in (folders / "cache").iterdir() if file.name.startswith(".")]


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(folders: Path) -> None:
    (folders / "cache").mkdir(mode=0o500)
    (folders / "source").write_text("1")
    with pytest.warns(UserWarning, match="EFFICIENTDNNS_CACHE"):
        cached_arrays("x", [folders / "source"], lambda files: (np.zeros(1), np.zeros(1)))


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tinyshakespeare"])
def test_offline_is_one_clear_line(folders: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def offline(*args: object, **options: object) -> None:
        raise OSError("no network\nmore lines")

    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", offline)
    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    with pytest.raises(DataError, match=rf"data set '{name}' is not here .* EFFICIENTDNNS_DATA is '.*data'") as caught:
        named_source(name)
    assert "\n" not in str(caught.value)


def test_shakespeare_splits_the_text_in_order(folders: Path) -> None:
    text = "abcdefghij" * 100
    (folders / "data" / "tinyshakespeare").mkdir()
    (folders / "data" / "tinyshakespeare" / "input.txt").write_text(text)
    task = Task.from_name("tinyshakespeare", length=9, metric="bits-per-character")
    assert (task.kind, task.num_classes, task.metric.name) == ("language-modelling", 10, "bits-per-character")
    assert (len(task.train), len(task.calibration), len(task.evaluation)) == (99, 5, 5)  # type: ignore[arg-type]
    batch = task.train.take([1])  # type: ignore[union-attr]
    assert batch.inputs.tolist() == [[9, 0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.targets.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8]]  # type: ignore[union-attr]


def test_the_real_mnist(data_folder: Path) -> None:
    task = Task.from_name("mnist", calibration_share=0)
    assert isinstance(task.train, TensorSplit)
    assert (len(task.train), len(task.evaluation), task.calibration) == (60_000, 10_000, None)  # type: ignore[arg-type]
    assert abs(task.train.inputs.mean()) < 1e-3
    assert abs(task.train.inputs.std() - 1) < 1e-3


def test_training_images_of_mnist_move_over_their_own_background(data_folder) -> None:
    plain, moved = named_source("mnist", limit=64), named_source("mnist", limit=64, shift=2)
    still = next(iter(plain.train.batches(64))).inputs
    again = next(iter(moved.train.batches(64, augment=True))).inputs
    assert not torch.equal(still, again)
    assert again.min() == still.min(), "the border is background, not the mean"
    assert torch.equal(next(iter(moved.train.batches(64))).inputs, still)
    assert moved.evaluation.augment is None
    with pytest.raises(ConfigurationError, match="expected 0 to 8 pixels"):
        named_source("mnist", shift=20)
