from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from efficientdnns.data import Split, TensorSplit, WindowSplit
from efficientdnns.errors import ConfigurationError, DataError
from efficientdnns.task import Metric, Task


def pair(count: int = 50, classes: int = 5) -> tuple[Tensor, Tensor]:
    return torch.eye(classes)[torch.arange(count) % classes], torch.arange(count) % classes


def ids_of(split: Split | None) -> set[float]:
    assert split is not None
    return set(split.take(range(len(split))).inputs.flatten().tolist())


def test_splits_are_disjoint_and_repeatable() -> None:
    x, y = torch.arange(200.0)[:, None], torch.arange(200) % 2
    tasks = [Task.from_tensors((x, y), (x[:20] + 1000, y[:20]), seed=seed) for seed in (0, 0, 1)]
    first = tasks[0]
    assert len(first.calibration) == 20  # type: ignore[arg-type]
    train, calibration, evaluation = ids_of(first.train), ids_of(first.calibration), ids_of(first.evaluation)
    assert train | calibration == set(range(200))
    assert not train & calibration
    assert evaluation == set(range(1000, 1020))
    assert ids_of(tasks[1].calibration) == calibration
    assert ids_of(tasks[2].calibration) != calibration
    assert {batch for b in first.train.batches(8, shuffle=True) for batch in b.inputs.flatten().tolist()} == train  # type: ignore[union-attr]


def test_calibration_is_at_most_5000_samples_and_may_be_given_or_none() -> None:
    x, y = torch.zeros(60_000, 1), torch.zeros(60_000, dtype=torch.long)
    assert len(Task.from_tensors((x, y)).calibration) == 5000  # type: ignore[arg-type]
    own = Task.from_tensors((x, y), calibration=(x[:7], y[:7]))
    assert (len(own.train), len(own.calibration)) == (60_000, 7)  # type: ignore[arg-type]
    assert Task.from_tensors((x, y), calibration_share=0).calibration is None


def test_accuracy_over_uneven_batches_and_training_flags() -> None:
    class Half(nn.Module):
        """Right on class 0 to 2 only."""

        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(1.0)
            self.frozen = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return self.dropout(x) * torch.tensor([1.0, 1, 1, -1, -1]) + 1e-3

    model = Half()
    model.train()
    model.frozen.eval()
    task = Task.from_tensors(pair(), pair(50))
    value = task.evaluate(model, batch_size=7)
    assert value == ("accuracy", 60.0, "evaluation", 50, True, "%")
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training
    assert task.evaluate(model, limit=8, batch_size=3)[1:4] == (75.0, "evaluation", 8)
    assert task.evaluate(model, "calibration").split == "calibration"
    assert task.evaluate(model, task.train).n == 45  # type: ignore[arg-type]


def test_flags_come_back_after_a_failure() -> None:
    model = nn.Linear(3, 5).train()
    with pytest.raises(RuntimeError):
        Task.from_tensors(pair(), pair()).evaluate(model)
    assert model.training


def test_regression() -> None:
    x = torch.rand(30, 4)
    y = 2 * x.sum(1)
    task = Task.from_tensors((x, y), (x, y), kind="regression")
    model = nn.Linear(4, 1)
    value = task.evaluate(model, batch_size=7)
    expected = (model(x)[:, 0] - y).square().mean()
    assert value.value == pytest.approx(expected.item(), rel=1e-5)
    assert not value.higher_is_better
    assert torch.allclose(task.loss(model(x), y), expected)
    assert task.num_classes is None


def test_language_modelling() -> None:
    ids = torch.randint(0, 7, (400,))
    split = WindowSplit(ids, 16)
    task = Task(split, split, kind="language-modelling")
    assert task.num_classes == 7
    assert tuple(task.example_input.shape) == (1, 16)
    model = nn.Embedding(7, 7)
    batch = split.take(range(len(split)))
    mean = F.cross_entropy(model(batch.inputs).reshape(-1, 7), batch.targets.reshape(-1)).item()  # type: ignore[union-attr]
    assert task.loss(model(batch.inputs), batch.targets).item() == pytest.approx(mean)
    assert task.evaluate(model, batch_size=5).value == pytest.approx(math.exp(mean), rel=1e-5)
    bits = task.with_(metric="bits-per-character").evaluate(model)
    assert (bits.value, bits.n) == (pytest.approx(mean / math.log(2), rel=1e-5), len(split))


def test_own_loss_metric_and_forward() -> None:
    def within(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).abs() < 0.5).float().mean()

    x, y = torch.arange(10.0)[:, None], torch.arange(10.0)[:, None]
    options = {"kind": "custom", "loss": F.l1_loss, "forward": lambda model, inputs: model(inputs)[0]}
    task = Task.from_tensors((x, y), (x, y), metric=within, **options)

    def model(inputs: Tensor) -> tuple[Tensor, str]:
        return torch.where(inputs < 3, inputs, inputs + 1), "extra"

    value = task.evaluate(model, batch_size=4)
    assert (value.name, value.value) == ("within", pytest.approx(0.3))
    largest = Metric("sum", lambda outputs, targets: (outputs.sum(), len(targets)), False, "m", lambda mean: 2 * mean)
    assert task.with_(metric=largest).evaluate(model).value == pytest.approx(2 * 5.2)
    with pytest.raises(ConfigurationError, match="a custom task needs loss="):
        Task.from_tensors((x, y), kind="custom", metric=within)


def test_tuples_and_mappings_as_inputs() -> None:
    a, b, y = torch.rand(6, 2), torch.rand(6, 2), torch.arange(6) % 2
    task = Task.from_tensors(((a, b), y), ((a, b), y))
    assert [tuple(part.shape) for part in task.example_input] == [(1, 2), (1, 2)]

    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    assert torch.equal(task.outputs(Sum(), (a, b)), a + b)
    assert torch.equal(task.outputs(Sum(), {"a": a, "b": b}), a + b)
    assert task.evaluate(Sum()).n == 6


def test_without_labels_and_without_data() -> None:
    task = Task.from_tensors(pair(), pair()).without_labels()
    assert not task.has_labels
    assert next(task.train.batches(4)).targets is None  # type: ignore[union-attr]
    with pytest.raises(DataError, match="the evaluation split of task 'custom' has no labels"):
        task.evaluate(nn.Identity())
    half = Task.from_tensors(pair()[0], pair())
    assert not half.has_labels
    assert half.num_classes == 5
    assert half.evaluate(nn.Identity()).value == 100
    bare = Task(None, None, example_input=torch.zeros(1, 3), num_classes=4)
    assert not bare.has_labels
    with pytest.raises(DataError, match="has no evaluation split"):
        bare.evaluate(nn.Identity())
    with pytest.raises(DataError, match="give example_input="):
        Task(None, None)


def test_generated_data_replaces_the_training_split() -> None:
    task = Task.from_tensors(pair(), pair())
    made = task.with_(train=torch.rand(8, 5), name="custom + synthetic")
    assert (len(made.train), made.has_labels, made.calibration) == (8, False, task.calibration)  # type: ignore[arg-type]
    assert len(task.train) == 45  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"a task has no 'trian' \(did you mean 'train'"):
        task.with_(trian=None)


def test_from_datasets_and_loaders() -> None:
    data = TensorDataset(*pair())
    task = Task.from_datasets(data, data)
    assert isinstance(task.train, TensorSplit)
    assert (task.num_classes, len(task.train)) == (5, 45)
    loaders = Task.from_loaders(DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=8))
    assert loaders.calibration is None
    assert (loaders.num_classes, tuple(loaders.example_input.shape)) == (5, (1, 5))
    assert loaders.evaluate(nn.Identity(), limit=10)[1:4] == (100.0, "evaluation", 10)


def test_targets_that_do_not_fit() -> None:
    x, y = pair()
    with pytest.raises(DataError, match="expected integers, or kind='regression'"):
        Task.from_tensors((x, y.float()))
    with pytest.raises(DataError, match="hold class -1"):
        Task.from_tensors((x, y - 1))
    with pytest.raises(DataError, match="hold 5 classes, but num_classes is 3"):
        Task.from_tensors((x, y), num_classes=3)
    soft = Task.from_tensors((x, F.one_hot(y).float()), (x, F.one_hot(y).float()))
    assert (soft.num_classes, soft.evaluate(nn.Identity()).value) == (5, 100)
    with pytest.raises(ConfigurationError, match="kind is 'clasification'"):
        Task.from_tensors((x, y), kind="clasification")
    with pytest.raises(ConfigurationError, match="metric is 'acuracy'"):
        Task.from_tensors((x, y), metric="acuracy")


FACTORY = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from efficientdnns import errors
from efficientdnns.task import Task

def parts(count=20):
    data = TensorDataset(torch.rand(count, 3), torch.arange(count) % 2)
    return DataLoader(data, batch_size=4), DataLoader(data, batch_size=4)

def task():
    return Task.from_tensors((torch.rand(20, 3), torch.arange(20) % 2), name="mine")

def nothing():
    return 3

def broken():
    return {}["key"]
"""


def test_from_spec_with_a_factory(tmp_path: Path) -> None:
    path = tmp_path / "my_data.py"
    path.write_text(FACTORY)
    assert Task.from_spec(f"{path}:task").name == "mine"
    assert len(Task.from_spec(f"{path}:parts", count=12).train) == 12  # type: ignore[arg-type]
    for name, message in (
        ("nothing", "returned a int; expected a Task"),
        ("broken", r"failed: KeyError: 'key' \(my_data.py, line 18\)"),
        ("tusk", r"no function or class 'tusk' \(did you mean 'task'"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            Task.from_spec(f"{path}:{name}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["minst", "no/such/folder", "no.parquet", "absent.py:make", "{tmp}", "{tmp}/notes.txt"]
)
def test_from_spec_errors_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError) as caught:
        Task.from_spec(text.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


def test_masked_tokens_count_for_nothing() -> None:
    ids, targets = torch.randint(0, 5, (6, 4)), torch.full((6, 4), -100)
    targets[:, 1] = ids[:, 1]
    task = Task((ids, targets), (ids, targets), kind="language-modelling", num_classes=5)
    model = nn.Embedding(5, 5)
    expected = F.cross_entropy(model(ids[:, 1]), ids[:, 1]).item()
    assert task.evaluate(model, batch_size=4).value == pytest.approx(math.exp(expected), rel=1e-5)


def test_logits_of_output_objects() -> None:
    class Output(dict):
        logits = torch.eye(5)[:2]

    task = Task.from_tensors(pair(), pair())
    model = nn.Identity()
    model.forward = lambda x: Output(logits=x, hidden_states=None)  # type: ignore[method-assign]
    assert torch.equal(task.outputs(model, torch.ones(2, 5)), torch.eye(5)[:2])
    other = Task.from_tensors(pair(), pair(), forward=lambda model, x: model(x)["logits"])
    assert torch.equal(other.outputs(model, torch.ones(2, 5)), torch.ones(2, 5))


def test_segmentation() -> None:
    masks = torch.randint(0, 3, (10, 4, 4))
    masks[:, 0] = 255
    images = F.one_hot(masks.clamp(max=2), 4).permute(0, 3, 1, 2).float()
    task = Task((images, masks), (images, masks), kind="segmentation", num_classes=4)
    assert task.evaluate(nn.Identity()).value == 100
    assert Task((images, masks), kind="segmentation").num_classes == 3
    shifted = nn.Conv2d(4, 4, 1)
    by_batches = {task.evaluate(shifted, batch_size=size).value for size in (1, 3, 10)}
    assert len(by_batches) == 1
    for targets, message in ((masks.float(), "expected class indices"), (masks[:, 0], "expected class indices")):
        with pytest.raises(DataError, match=message):
            Task((images, targets), kind="segmentation")
    with pytest.raises(DataError, match="hold 3 classes, but num_classes is 2"):
        Task((images, masks), kind="segmentation", num_classes=2)


def test_detection_batches_are_lists() -> None:
    images = [torch.rand(3, 8 + i, 8) for i in range(6)]
    boxes = torch.tensor([[0.0, 0, 2, 2], [2, 2, 5, 5], [5, 0, 7, 2], [0, 5, 2, 7], [3, 3, 4, 4]])
    targets = [{"boxes": boxes[:i], "labels": torch.ones(i, dtype=torch.long)} for i in range(6)]
    task = Task((images, targets), (images, targets), kind="detection", calibration_share=0.5)
    assert task.num_classes == 2
    assert isinstance(task.example_input, tuple)
    assert [image.shape for image in task.example_input[0]] == [(3, 8, 8)]
    assert (len(task.train), len(task.calibration)) == (3, 3)  # type: ignore[arg-type]

    class Detector(nn.Module):
        def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> object:
            if self.training:
                assert targets is not None
                return {"a": torch.tensor(1.0), "b": torch.tensor(float(sum(len(t["labels"]) for t in targets)))}
            rows = [len(image[0]) - 8 for image in images]
            found = [{k: v for k, v in targets_[i].items()} | {"scores": torch.ones(i)} for i in rows]
            return found

    targets_, model = targets, Detector()
    assert task.evaluate(model, batch_size=4) == ("map", pytest.approx(100), "evaluation", 6, True, "%")
    assert task.evaluate(model, limit=2).n == 2
    batch = next(task.evaluation.batches(4))  # type: ignore[union-attr]
    assert task.loss(task.outputs(model.train(), batch.inputs, batch.targets), batch.targets) == 7
    assert isinstance(task.outputs(model.eval(), batch.inputs, batch.targets), list)
    with pytest.raises(DataError, match="no boxes"):
        Task((images, [{"box": 1}] * 6), kind="detection")
    with pytest.raises(DataError, match="6 inputs but 5 targets"):
        Task((images, targets[:5]), kind="detection")


def test_embeddings_and_labels_from_a_network() -> None:
    x = torch.rand(12, 4)
    model = nn.Linear(4, 3)
    task = Task((x,), (x,), kind="feature-extraction").labelled_by(model)
    assert task.has_labels
    assert task.evaluate(model).value == pytest.approx(100)
    half = nn.Linear(4, 3)
    expected = F.cosine_similarity(half(x), model(x)).mean().item()
    assert task.evaluate(half, batch_size=5).value == pytest.approx(100 * expected, rel=1e-5)
    assert task.loss(half(x), model(x)).item() == pytest.approx(1 - expected, rel=1e-5)
    with pytest.raises(DataError, match="not in memory"):
        Task(DataLoader(TensorDataset(x)), kind="feature-extraction").labelled_by(model)
