from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from efficientdnns.data import images as module
from efficientdnns.data.images import divide_by_class, folder_source, normalise, parquet_source
from efficientdnns.data.split import DatasetSplit, TensorSplit
from efficientdnns.errors import ConfigurationError, DataError
from efficientdnns.task import Task

Image = pytest.importorskip("PIL.Image")


def picture(value: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> object:
    return Image.new(mode, size, value if mode == "L" else (value, 0, 255))


def write_tree(root: Path, counts: dict[str, int], **options: object) -> None:
    for code, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(100 * code + number, **options).save(root / name / f"{number}.png")  # type: ignore[attr-defined, arg-type]


def encoded(value: int) -> bytes:
    buffer = io.BytesIO()
    picture(value).save(buffer, "PNG")  # type: ignore[attr-defined]
    return buffer.getvalue()


def test_one_tree_is_divided_by_class(tmp_path: Path) -> None:
    write_tree(tmp_path, {"cat": 10, "dog": 20})
    task = Task.from_folder(tmp_path, calibration_share=0.2)
    assert task.train is not None
    assert task.evaluation is not None
    assert task.calibration is not None
    assert task.num_classes == 2
    assert (len(task.train), len(task.calibration), len(task.evaluation)) == (20, 4, 6)
    red = [
        split.take(range(len(split))).inputs[:, 0, 0, 0] for split in (task.train, task.calibration, task.evaluation)
    ]
    assert len(set(torch.cat(red).tolist())) == 30, "every image is in one split and in one only"
    assert sorted(task.evaluation.take(range(6)).targets.tolist()) == [0, 0, 1, 1, 1, 1]  # type: ignore[union-attr]
    again = Task.from_folder(tmp_path, calibration_share=0.2)
    assert torch.equal(again.evaluation.take(range(6)).inputs, task.evaluation.take(range(6)).inputs)  # type: ignore[union-attr]


def test_train_test_and_val_folders(tmp_path: Path) -> None:
    for part, count in (("train", 5), ("val", 3), ("test", 4)):
        write_tree(tmp_path / part, {"a": count, "b": count}, mode="L")
    source = folder_source(tmp_path)
    assert (len(source.train), len(source.evaluation)) == (10, 8)
    assert source.calibration is not None
    assert (len(source.calibration), source.calibration.name) == (6, "val")
    task = Task.from_spec(str(tmp_path))
    assert tuple(task.example_input.shape) == (1, 1, 4, 6)
    assert len(task.calibration) == 6  # type: ignore[arg-type]


def test_pixels_and_normalisation(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 4, "b": 4})
    source = folder_source(tmp_path, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    assert isinstance(source.train, TensorSplit)
    batch = source.train.take([0])
    assert tuple(batch.inputs.shape) == (1, 3, 4, 6)
    red = source.train.inputs[0, 0, 0, 0].item()
    expected = [(red / 255 - 0.5) / 0.5, (0 - 0.5) / 0.25, (1 - 0.5) / 0.5]
    assert torch.allclose(batch.inputs[0, :, 0, 0], torch.tensor(expected))
    original = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    normalise((0.5,), (0.5,))(original)
    assert original.eq(255).all()


def test_large_sets_are_decoded_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path, {"a": 5, "b": 5})
    small = folder_source(tmp_path)
    monkeypatch.setattr(module, "IN_MEMORY_BYTES", 10)
    large = folder_source(tmp_path)
    assert isinstance(large.train, DatasetSplit)
    assert torch.equal(large.train.take(range(8)).inputs, small.train.take(range(8)).inputs)
    assert Task(large.train).num_classes == 2


def test_sizes(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 3, "b": 3})
    picture(0, size=(8, 8)).save(tmp_path / "a" / "odd.png")  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"different sizes .* give size="):
        folder_source(tmp_path)
    assert tuple(folder_source(tmp_path, size=5).train.take([0]).inputs.shape) == (1, 3, 5, 5)
    assert tuple(folder_source(tmp_path, size=(5, 7), channels=1).train.take([0]).inputs.shape) == (1, 1, 5, 7)


def test_folder_errors(tmp_path: Path) -> None:
    write_tree(tmp_path / "one", {"a": 2})
    with pytest.raises(DataError, match="1 classes, expected at least 2"):
        folder_source(tmp_path / "one")
    write_tree(tmp_path / "more" / "train", {"a": 2, "b": 2})
    write_tree(tmp_path / "more" / "test", {"a": 2, "c": 2})
    with pytest.raises(DataError, match="class 'c' that the training images lack"):
        folder_source(tmp_path / "more")
    write_tree(tmp_path / "broken", {"a": 2, "b": 2})
    (tmp_path / "broken" / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        folder_source(tmp_path / "broken")
    with pytest.raises(DataError, match="is not a folder"):
        folder_source(tmp_path / "missing")
    with pytest.raises(ConfigurationError, match=r"no option 'sise' \(did you mean 'size'"):
        Task.from_folder(tmp_path / "one", sise=4)


def test_division_by_class() -> None:
    labels = [0] * 10 + [1] * 5 + [2] + [3] * 2
    kept, held_out = divide_by_class(labels, 0.2, seed=0)
    assert sorted(kept + held_out) == list(range(18))
    assert [labels[i] for i in held_out] == [0, 0, 1, 3]
    assert divide_by_class(labels, 0.2, seed=0)[1] == held_out
    assert divide_by_class(labels, 0.2, seed=1)[1] != held_out


def write_parquet(path: Path, columns: dict[str, object], names: list[str] | None = None) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table(columns)
    if names is not None:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def test_parquet_folder_with_structs_and_class_names(tmp_path: Path) -> None:
    for part, start in (("train", 0), ("test", 100)):
        rows = [{"bytes": encoded(start + i), "path": f"{i}.png"} for i in range(10)]
        names = ["a", "b", "c"]
        write_parquet(tmp_path / f"{part}-0.parquet", {"image": rows, "label": [i % 2 for i in range(10)]}, names)
    task = Task.from_spec(str(tmp_path))
    assert task.train is not None
    assert task.num_classes == 3
    assert (len(task.train), len(task.calibration), len(task.evaluation)) == (9, 1, 10)  # type: ignore[arg-type]
    assert isinstance(task.evaluation, TensorSplit)
    assert task.evaluation.inputs[:, 0, 0, 0].tolist() == list(range(100, 110))


def test_one_parquet_file_with_named_labels(tmp_path: Path) -> None:
    path = tmp_path / "pets.parquet"
    labels = ["dog", "cat"] * 5
    write_parquet(path, {"picture": [encoded(i) for i in range(10)], "category": labels, "id": list(range(10))})
    task = Task.from_spec(str(path))
    assert (task.name, task.num_classes, len(task.evaluation)) == ("pets", 2, 2)  # type: ignore[arg-type]
    assert isinstance(task.train, TensorSplit)
    assert isinstance(task.train.targets, torch.Tensor)
    assert torch.equal(task.train.targets, 1 - task.train.inputs[:, 0, 0, 0] % 2)


def test_parquet_errors(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    write_parquet(path, {"image": [encoded(0)], "x": [1], "y": [2]})
    with pytest.raises(DataError, match=r"2 columns that may hold the label .* give label_column=, one of image, x, y"):
        parquet_source(path)
    with pytest.raises(DataError, match="has no column 'z'"):
        parquet_source(path, label_column="z")
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        parquet_source(path)
    with pytest.raises(DataError, match="does not exist"):
        parquet_source(tmp_path / "missing.parquet")


def test_arrays_keep_channel_order(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    train = folder_source(tmp_path).train
    assert isinstance(train, TensorSplit)
    assert np.array_equal(train.inputs[0].numpy(), pixels.transpose(2, 0, 1))
