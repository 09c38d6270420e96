"""Data-free distillation: the record, the reconstruction, and a student that sees no data."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from efficientdnns.data.split import Split
from efficientdnns.distillation.activation_record import (
    ActivationRecord,
    Moments,
    Statistics,
    graph_basis,
    record_activations,
    square_root,
)
from efficientdnns.distillation.data_free_kd import (
    DataFreeKD,
    FixedDropout,
    SoftCrossEntropy,
    reconstruct,
    response_loss,
)
from efficientdnns.errors import ConfigurationError, DataError, FileFormatError
from efficientdnns.models import build
from efficientdnns.parts.tap import tap_once
from efficientdnns.task import Task


class Forbidden(Split):
    """Data that nobody may read."""

    has_labels = True

    def __len__(self) -> int:
        return 100

    def subset(self, indices):
        raise AssertionError("the data was touched")

    def _fetch(self, batches):
        raise AssertionError("the data was read")


@pytest.mark.parametrize("full", [True, False])
def test_streaming_moments_equal_numpys(full):
    values, labels = torch.randn(300, 7).double() * 3 + 5, torch.randint(0, 4, (300,))
    moments = Moments(5, 7, full)
    for start in range(0, 300, 37):
        moments.add(values[start : start + 37], labels[start : start + 37])
    assert moments.count.sum() == 300
    for label in range(4):
        rows = values[labels == label].numpy()
        covariance = np.cov(rows.T, bias=True)
        assert np.allclose(moments.mean[label], rows.mean(0), rtol=1e-6)
        expected = covariance if full else np.diag(covariance)
        assert np.allclose(moments.covariance[label], expected, rtol=1e-6)
    assert (moments.covariance[4] == 0).all()


def test_samples_have_the_recorded_covariance():
    numbers = torch.Generator().manual_seed(0)
    factor = torch.randn(20, 20, generator=numbers) * torch.logspace(0, 1, 20)
    covariance = factor @ factor.T
    draws = Statistics(["x"], torch.full((1, 20), 3.0), covariance[None]).sample(0, 100_000, numbers)
    error = (torch.cov(draws.T) - covariance).norm() / covariance.norm()
    assert error < 0.02
    assert (draws.mean(0) - 3).abs().max() < 0.5
    wrong = torch.randn(100_000, 20, generator=numbers) @ covariance.T
    assert (torch.cov(wrong.T) - covariance).norm() / covariance.norm() > 0.5
    variances = Statistics(["x"], torch.zeros(1, 2), torch.tensor([[4.0, 0.0]])).sample(0, 50_000, numbers)
    assert variances.std(0).tolist() == pytest.approx([2.0, 0.0], rel=0.02)


def test_the_square_root_takes_singular_matrices():
    half = torch.randn(6, 2)
    root = square_root(half @ half.T)
    assert torch.allclose(root @ root.T, half @ half.T, atol=1e-5)


def test_the_record_holds_every_layer_before_its_relu(teacher, digits):
    record = record_activations(teacher, digits, "all", batch_size=100)
    assert record.layers == ["layers.1", "layers.3", ""]
    assert sum(record.counts) == len(digits.train)
    batch = digits.train.take(range(len(digits.train)))
    hidden = teacher.layers[:2](batch.inputs)
    assert (hidden < 0).any()
    for label in (0, 7):
        rows = hidden[batch.targets == label].detach()
        assert torch.allclose(record.blocks[0].mean[label], rows.mean(0), atol=1e-5)
        assert torch.allclose(record.blocks[0].covariance[label], torch.cov(rows.T, correction=0), atol=1e-4)
        logits = teacher(batch.inputs)[batch.targets == label].detach() / 8
        assert torch.allclose(record.blocks[2].mean[label], logits.mean(0), atol=1e-5)


def test_wide_layers_keep_their_deviations_only(digits):
    record = record_activations(build("lenet5"), digits, "all")
    assert record.layers == ["conv1", "conv2", "fc1", ""]
    assert [block.covariance.dim() for block in record.blocks] == [2, 2, 2, 3]
    assert record.bytes < record.data_bytes * 10


def test_without_labels_predictions_take_their_place(teacher, digits):
    record = record_activations(teacher, digits.without_labels(), "top")
    batch = digits.train.take(range(len(digits.train)))
    assert record.counts == teacher(batch.inputs).argmax(1).bincount(minlength=10).tolist()


def test_a_record_survives_its_file(teacher, digits, tmp_path):
    record = record_activations(teacher, digits, "spectral-pairs", keep=0.3)
    record.save(tmp_path / "record.safetensors")
    again = ActivationRecord.load(tmp_path / "record.safetensors")
    assert again.layers == record.layers
    assert again.counts == record.counts
    assert (again.scope, again.temperature, again.bytes) == (record.scope, record.temperature, record.bytes)
    for a, b in zip(record.blocks, again.blocks):
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.covariance, b.covariance)
        assert torch.equal(a.basis, b.basis)
    content = (tmp_path / "record.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") < len(content), "a safetensors header, no pickle"
    assert len(content) < record.bytes * 1.1 + 10_000
    (tmp_path / "other").write_text("x")
    for name in ("other", "missing"):
        with pytest.raises(FileFormatError):
            ActivationRecord.load(tmp_path / name)


def test_all_spectral_coefficients_are_the_responses_turned(teacher, digits):
    matrix = torch.randn(12, 12)
    basis = graph_basis(matrix + matrix.T, 1.0)
    assert torch.allclose(basis.T @ basis, torch.eye(12), atol=1e-5)
    h, a = torch.randn(5, 12), torch.randn(5, 12)
    spectral = response_loss([h @ basis], [a @ basis], "spectral-pairs")
    assert torch.allclose(spectral, ((h - a) ** 2).mean() / 12, rtol=1e-4)
    record = record_activations(teacher, digits, "spectral-all", keep=0.25)
    assert record.blocks[0].basis.shape == (64 + 48 + 10, 30)


def test_the_loss_ignores_units_that_are_rightly_off():
    h = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    response_loss([h], [torch.tensor([[-5.0, 1.0]])]).backward()
    assert h.grad[0, 0] == 0
    assert h.grad[0, 1] != 0


def test_reconstruction_reaches_attainable_targets_and_moves_only_the_pixels():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(60, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 4)).train()
    for _ in range(5):
        teacher(torch.randn(64, 60))
    # A unit that is off where it should be on has no gradient, so all start on.
    nn.init.constant_(teacher[1].bias, 1.0)
    teacher[0].weight.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    image = torch.randn(1, 60)
    values = tap_once(teacher, ["0"], image)
    blocks = [Statistics(["0"], values["0"], torch.zeros(1, 30))]
    record = ActivationRecord("all", 8.0, 1, [1], 0, blocks)
    images = reconstruct(teacher, record, image, 16, steps=300, init_mean=0.0, init_std=0.1)
    assert images.losses[1] < images.losses[0] / 10
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(module.training for module in teacher.modules())
    assert [p.requires_grad for p in teacher.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in teacher.parameters())


def test_a_known_image_comes_back():
    torch.manual_seed(0)
    layer = nn.Linear(12, 12)
    nn.init.orthogonal_(layer.weight)
    nn.init.constant_(layer.bias, 6.0)
    teacher = nn.Sequential(layer, nn.ReLU(), nn.Linear(12, 3))
    image = torch.rand(1, 12)
    values = tap_once(teacher, ["0"], image)
    assert (values["0"] > 0).all()
    record = ActivationRecord("all", 8.0, 1, [1], 0, [Statistics(["0"], values["0"], torch.zeros(1, 12))])
    images = reconstruct(teacher, record, image, 3, steps=800, learning_rate=0.02)
    assert torch.allclose(images.inputs, image.expand(3, -1), atol=1e-2)
    expected = (teacher(images.inputs) / 8).softmax(1)
    assert torch.allclose(images.targets, expected, atol=1e-6)


def test_counts_batches_and_seeds(teacher, digits):
    record = record_activations(teacher, digits, "top")

    def make(**options):
        fields = {"steps": 40, "batch_size": 4, "init_std": 0.3, "learning_rate": 0.1, **options}
        return reconstruct(teacher, record, digits.example_input, **{"images_per_class": 6, **fields})

    images = make()
    assert images.inputs.shape == (60, 1, 28, 28)
    assert images.inputs.min() < 0
    agreement = (images.targets.argmax(1) == torch.arange(10).repeat_interleave(6)).double().mean()
    assert agreement > 0.9
    few = {"images_per_class": 1, "steps": 3}
    assert torch.equal(make(**few).inputs, make(**few).inputs)
    assert not torch.equal(make(**few).inputs, make(seed=1, **few).inputs)
    bounded = make(pixel_range=(0.0, 1.0), **few)
    assert bounded.inputs.min() >= 0
    assert bounded.inputs.max() <= 1


def test_dropout_masks_hold_until_drawn_again():
    model = nn.Sequential(nn.Dropout(0.2), nn.Linear(50, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 3)).eval()
    x = torch.rand(8, 50)
    plain = model(x)
    masks = FixedDropout(model, torch.Generator().manual_seed(0))
    first, second = model(x), model(x)
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    assert all(set(mask.unique().tolist()) == {0.0, 1 / (1 - p)} for mask, p in zip(masks.masks.values(), (0.2, 0.5)))
    masks.draw()
    assert not torch.equal(first, model(x))
    masks.remove()
    assert torch.equal(plain, model(x))


def test_the_loss_of_the_reconstructed_task_is_that_of_distillation():
    z, p = torch.randn(6, 10), torch.randn(6, 10).softmax(1)
    expected = -(p * (z / 8).log_softmax(1)).sum(1).mean()
    assert torch.allclose(SoftCrossEntropy(8.0)(z, p), expected)


def test_the_student_needs_the_record_alone(session, teacher, digits, tmp_path):
    path = tmp_path / "record.safetensors"
    record_activations(teacher, digits, "all").save(path)
    task = Task(Forbidden(), digits.evaluation, Forbidden(), num_classes=10, example_input=digits.example_input)
    student = {"name": "mlp", "hidden": [64]}
    fields = {"record": str(path), "student": student, "images_per_class": 40, "learning_rate": 3e-3, "epochs": 30}
    work = session(task=task)
    DataFreeKD(steps=60, reconstruction_batch=40, **fields).apply(work)
    noise = session(task=task)
    DataFreeKD(steps=0, **fields).apply(noise)
    accuracy, baseline = (digits.evaluate(w.model).value for w in (work, noise))
    assert accuracy > 50
    assert accuracy > baseline + 15
    found = work.findings["fit"]
    assert found["images"] == 400
    assert found["reconstruction_loss"][1] < found["reconstruction_loss"][0] / 3
    assert found["record_bytes"] > 0
    assert found["data_bytes"] == len(digits.train) * 784 * 4


def test_made_images_are_not_made_again(session, tmp_path):
    fields = {"images_per_class": 8, "steps": 5, "scope": "top", "epochs": 1}
    first, second = session(directory=tmp_path), session(directory=tmp_path)
    DataFreeKD(**fields).apply(first)
    stamp = (tmp_path / "images-001.safetensors").stat().st_mtime_ns
    DataFreeKD(**fields).apply(second)
    assert (tmp_path / "images-001.safetensors").stat().st_mtime_ns == stamp
    a, b = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert first.findings == second.findings


def test_errors_come_before_work(session, teacher, digits, tmp_path):
    empty = Task(None, digits.evaluation, num_classes=10)
    with pytest.raises(DataError, match="needs a record"):
        DataFreeKD().check(session(task=empty))
    with pytest.raises(FileFormatError, match="no activation record"):
        DataFreeKD(record=str(tmp_path / "none")).check(session())
    with pytest.raises(ConfigurationError, match="low < high"):
        DataFreeKD(pixel_range=(1, 0)).check(session())
    record = record_activations(teacher, digits, "all")
    with pytest.raises(DataError, match=r"holds 64 values for 'layers\.1', the teacher has 32"):
        reconstruct(build("mlp", hidden=[32, 48]), record, digits.example_input, 1, steps=1)
    with pytest.raises(ConfigurationError, match=r"no module 'layers\.1'"):
        reconstruct(build("lenet5"), record, digits.example_input, 1, steps=1)
