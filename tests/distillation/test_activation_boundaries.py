"""Activation boundaries: the hinge, what it ignores, and the two phases."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efficientdnns.distillation.activation_boundaries import (
    ActivationBoundaries,
    Initialisation,
    activation_transfer_loss,
    boundary_loss,
    layer_weights,
)
from efficientdnns.errors import ConfigurationError, DataError, ModelError
from efficientdnns.models import build
from efficientdnns.parts.pair import pair_stages
from efficientdnns.training import Callback


@pytest.mark.parametrize(
    ("teacher", "student", "loss"),
    [(1, 2, 0), (1, 1, 0), (1, 0, 1), (1, -1, 4), (-1, -2, 0), (-1, 0, 1), (-1, 1, 4), (0, -2, 0), (0, 1, 4)],
)
def test_the_table(teacher, student, loss):
    assert boundary_loss(torch.tensor([float(student)]), torch.tensor([float(teacher)])).item() == loss


@given(st.integers(0, 100), st.floats(0.1, 3.0), st.floats(1e-3, 1e3))
def test_only_the_teachers_signs_matter(seed, margin, factor):
    numbers = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(4, 6, generator=numbers, dtype=torch.float64) for _ in range(2))
    results = []
    for response in (teacher, factor * teacher, teacher**3, teacher.sign()):
        s = student.clone().requires_grad_()
        loss = boundary_loss(s, response, margin)
        results.append((loss, torch.autograd.grad(loss, s)[0]))
    assert all(torch.equal(loss, results[0][0]) and torch.equal(g, results[0][1]) for loss, g in results)
    assert results[0][0] >= margin**2 * activation_transfer_loss(student, teacher)


def test_zero_exactly_where_all_signs_agree_beyond_the_margin():
    teacher = torch.randn(5, 7)
    agreeing = torch.where(teacher > 0, 1.0, -1.0) * (1 + torch.rand(5, 7))
    assert boundary_loss(agreeing, teacher) == 0
    assert activation_transfer_loss(agreeing, teacher) == 0
    for value in (0.99 * torch.where(teacher > 0, 1.0, -1.0)[0, 0], -agreeing[0, 0]):
        other = agreeing.clone()
        other[0, 0] = value
        assert boundary_loss(other, teacher) > 0


def test_the_gradient_is_continuous_at_the_margin():
    for sign in (1.0, -1.0):
        s = torch.tensor([sign * (1 - 1e-6), sign * (1 + 1e-6)], dtype=torch.float64, requires_grad=True)
        boundary_loss(s, torch.full((2,), sign)).backward()
        assert s.grad.abs().max() < 1e-5


def test_deeper_layers_weigh_more():
    assert layer_weights(3) == [0.25, 0.5, 1.0]


def small(**fields) -> ActivationBoundaries:
    fast = {"learning_rate": 0.02, "init_learning_rate": 0.003, "init_optimizer": "adam", "batch_size": 64}
    return ActivationBoundaries(**{"epochs": 1, "init_epochs": 1, **fast, **fields})


def test_phase_1_leaves_the_classifier_and_the_teacher_alone(session):
    student = build("mlp", hidden=[32, 24])
    work = session(student)
    teacher = {name: value.clone() for name, value in work.original.state_dict().items()}
    small(init_weight_decay=0.1).prepare(work)
    before, after = student.state_dict(), work.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert moved == {"layers.1.weight", "layers.1.bias", "layers.3.weight", "layers.3.bias"}
    assert after.keys() == before.keys()
    assert type(work.model) is type(student)
    assert all(p.requires_grad for p in work.model.parameters())
    assert all(not module._forward_hooks for module in [*work.model.modules(), *work.original.modules()])
    assert all(torch.equal(teacher[name], value) for name, value in work.original.state_dict().items())


def test_batch_norm_of_the_teacher_stays(session, digits):
    work = session(build("small-resnet", width=0.25))
    work.original = build("small-resnet", width=0.5).eval()
    before = copy.deepcopy(work.original.state_dict())
    small(init_epochs=1).prepare(work)
    assert all(torch.equal(before[name], value) for name, value in work.original.state_dict().items())
    assert set(work.findings["fit"]["activation_similarity"]) == {"layer1", "layer2"}


def test_similarity_rises_with_training(session):
    found = []
    for epochs in (0, 12):
        torch.manual_seed(0)
        work = session(build("mlp", hidden=[32, 24]))
        small(init_epochs=epochs).prepare(work)
        found.append(list(work.findings["fit"]["activation_similarity"].values()))
    assert len(found[0]) == 2
    assert all(after > before + 0.15 for before, after in zip(*found))
    assert min(found[1]) > 0.75


def test_phase_1_helps_phase_2(session):
    accuracy = []
    for epochs in (0, 12):
        torch.manual_seed(0)
        work = session()
        fields = {"init_epochs": epochs, "epochs": 2, "second_stage": "ce", "learning_rate": 0.05}
        small(student={"name": "mlp", "hidden": [32, 24]}, **fields).apply(work)
        accuracy.append(work.evaluate())
    assert accuracy[1] > accuracy[0] + 10


def test_both_phases_work_without_labels(session, digits):
    work = session(task=digits.without_labels())
    small(student={"name": "mlp", "hidden": [32, 24]}, init_epochs=8, epochs=15, learning_rate=0.1).apply(work)
    assert digits.evaluate(work.model, "calibration").value > 60
    with pytest.raises(DataError, match="second_stage 'ce' needs labels"):
        small(second_stage="ce").check(work)


def test_named_layers_and_their_errors(session):
    work = session(build("mlp", hidden=[32, 24]))
    small(layers=[["layers.3", "layers.3"]]).prepare(work)
    assert list(work.findings["fit"]["activation_similarity"]) == ["layers.3"]
    with pytest.raises(ConfigurationError, match="no module 'conv9'"):
        small(layers=[["conv9", "layers.3"]]).prepare(work)
    work.original = build("small-resnet")
    work.model = build("small-resnet")
    with pytest.raises(ModelError, match=r"\(1, 32, 14, 14\)"):
        small(layers=[["layer2", "layer1"]]).prepare(work)


def test_a_mean_square_hint_can_stand_in_for_the_hinge(session, digits):
    """The paper's comparison: at equal steps the hinge agrees with more of the teacher's states than L2 does."""

    class Hint(Initialisation):
        loss = staticmethod(lambda student, teacher, margin: (student - teacher).square().sum())

    similarity = []
    for kind in (Hint, Initialisation):
        torch.manual_seed(0)
        student = build("mlp", hidden=[16, 12])
        work = session(student)
        pairs = pair_stages(work.original, student, work.example_input)
        callback: Callback = kind(small(), work.original, pairs, work.report)
        settings = {"optimizer": "adam", "learning_rate": 0.003, "batch_size": 64, "weight_decay": 0.0}
        work.train([callback], epochs=30, model=student, validate=False, **settings)
        similarity.append(list(work.findings["fit"]["activation_similarity"].values())[-1])
    assert similarity[1] > similarity[0] + 0.01
