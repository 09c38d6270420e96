"""Knowledge distillation: the gradient, its limits, ensembles, missing classes, and a run."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from efficientdnns.distillation.knowledge_distillation import (
    KnowledgeDistillation,
    add_class_bias,
    best_class_bias,
    ensemble_soft_targets,
    entropy,
    soft_loss,
    soft_target_loss,
)
from efficientdnns.distillation.transfer_set import transfer_set
from efficientdnns.errors import ConfigurationError, DataError, ModelError
from efficientdnns.models import build


def logits(seed: int, rows: int = 8, classes: int = 10) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def gradient(loss, z: torch.Tensor) -> torch.Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0]


@given(st.floats(0.5, 30.0), st.integers(0, 100))
def test_gradient_is_t_times_the_difference_of_distributions(temperature, seed):
    z, v = logits(seed), logits(seed + 1000)
    expected = temperature * ((z / temperature).softmax(1) - (v / temperature).softmax(1)) / len(z)
    assert torch.allclose(gradient(lambda z: soft_loss(z, v, temperature), z), expected, atol=1e-12)


def test_the_high_temperature_limit_matches_logits():
    z, v = logits(0), logits(1)
    difference = z - v
    limit = (difference - difference.mean(1, keepdim=True)) / z.shape[1] / len(z)
    found = gradient(lambda z: soft_loss(z, v, 1e3), z)
    assert (found - limit).norm() / limit.norm() < 1e-2


def test_a_one_hot_teacher_at_t_1_gives_cross_entropy():
    z, labels = logits(0), torch.arange(8)
    v = F.one_hot(labels, 10).double() * 1e4
    assert soft_loss(z, v, 1.0).item() == pytest.approx(F.cross_entropy(z, labels).item())


def test_an_equal_student_has_no_gradient():
    z = logits(0)
    assert gradient(lambda x: soft_loss(x, z, 4.0), z).abs().max() < 1e-12


def test_kl_and_cross_entropy_have_the_same_gradient():
    z, p = logits(0), (logits(1) / 3).softmax(1)
    cross_entropy = gradient(lambda z: 9 * F.cross_entropy(z / 3, p), z)
    assert torch.allclose(gradient(lambda z: soft_target_loss(z, p, 3.0), z), cross_entropy)


def test_shifting_a_cases_teacher_logits_changes_nothing():
    z, v = logits(0), logits(1)
    assert soft_loss(z, v + torch.arange(8.0)[:, None], 2.0).item() == pytest.approx(soft_loss(z, v, 2.0).item())


def test_the_factor_keeps_the_gradients_size():
    z, v = logits(0) / 10, logits(1) / 10
    sizes = [gradient(lambda z, t=t: soft_loss(z, v, t), z).norm().item() for t in (2, 20)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    assert soft_loss(z, v, 20.0, scale=False).item() == pytest.approx(soft_loss(z, v, 20.0).item() / 400)


def test_token_outputs_count_every_token():
    z, v = logits(0), logits(1)
    assert torch.allclose(soft_loss(z.view(2, 4, 10), v.view(2, 4, 10), 2.0), soft_loss(z, v, 2.0))


@given(st.floats(0.5, 20.0))
def test_ensemble_means(temperature):
    members = [logits(seed) for seed in range(3)]
    arithmetic, geometric, logit = (
        ensemble_soft_targets(members, temperature, mean) for mean in ("arithmetic", "geometric", "logit")
    )
    assert torch.allclose(arithmetic.sum(1), torch.ones(8, dtype=torch.float64))
    assert torch.allclose(arithmetic, sum((m / temperature).softmax(1) for m in members) / 3)
    assert torch.allclose(geometric, logit)
    assert torch.allclose(ensemble_soft_targets(members[:1], temperature), (members[0] / temperature).softmax(1))


def test_entropy_runs_from_labels_to_nothing():
    assert entropy(torch.eye(4)).abs().max() == 0
    assert torch.allclose(entropy(torch.full((3, 10), 0.1)), torch.tensor(10.0).log())


@given(st.integers(0, 200))
def test_best_class_bias_beats_every_other(seed):
    numbers = torch.Generator().manual_seed(seed)
    z = torch.randn(60, 5, generator=numbers).round(decimals=1)
    labels = torch.randint(0, 5, (60,), generator=numbers)

    def accuracy(delta: float) -> float:
        moved = z.double().clone()
        moved[:, [1, 3]] += delta
        return (moved.argmax(1) == labels).double().mean().item()

    best = accuracy(best_class_bias(z, labels, [1, 3]))
    assert best >= max(accuracy(delta + 0.0137) for delta in torch.arange(-6, 6, 0.05).tolist()) - 1e-12


def test_raising_some_classes_is_lowering_the_others():
    head = nn.Linear(3, 4)
    other = copy.deepcopy(head)
    add_class_bias(head, [0, 2], 1.5)
    add_class_bias(other, [1, 3], -1.5)
    x = torch.randn(5, 3)
    assert torch.allclose(head(x).softmax(1), other(x).softmax(1))


def fast(**fields) -> KnowledgeDistillation:
    return KnowledgeDistillation(**{"epochs": 1, "learning_rate": 0.02, "batch_size": 64, **fields})


def test_a_student_is_made_and_the_teacher_stays_as_it_was(session):
    work = session()
    before = copy.deepcopy(work.original.state_dict())
    fast(student={"name": "mlp", "hidden": [32]}, epochs=8).apply(work)
    assert type(work.model).__name__ == "MLP"
    assert work.model.factory["options"]["hidden"] == [32]
    assert work.evaluate() > 70
    assert all(torch.equal(before[name], value) for name, value in work.original.state_dict().items())
    assert 0 < work.findings["fit"]["teacher_entropy"] < 2.303


def test_works_without_labels(session, digits):
    work = session(build("mlp", hidden=[32]), digits.without_labels())
    fast(epochs=8, hard_weight=0.0).apply(work)
    assert digits.evaluate(work.model, "calibration").value > 70


def test_an_ensemble_of_one_network_twice_is_that_network(session, teacher):
    states = []
    for teachers in (teacher, [teacher, teacher]):
        work = session()
        torch.manual_seed(0)
        fast(teacher=teachers, student="lenet-300-100").apply(work)
        states.append(work.model.state_dict())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(states[0].values(), states[1].values()))


def test_a_missing_class_is_recovered_by_its_bias(session, digits):
    def recall_of_threes(model: nn.Module) -> float:
        batch = digits.evaluation.take(range(200))
        threes = batch.targets == 3
        return (model(batch.inputs)[threes].argmax(1) == 3).double().mean().item()

    task = digits.with_(train=transfer_set(digits.train, omit_classes=(3,)))
    work = session(task=task)
    student = {"name": "mlp", "hidden": [64]}
    fields = {"student": student, "temperature": 4.0, "hard_weight": 0.0, "epochs": 15}
    torch.manual_seed(0)
    fast(**fields).apply(work)
    plain = work.model
    work = session(task=task)
    torch.manual_seed(0)
    fast(correct_bias_classes=[3], **fields).apply(work)
    delta = work.findings["fit"]["bias_correction"]
    before = plain.state_dict()
    moved = {name for name, value in work.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"layers.3.bias"}
    assert (work.model.layers[3].bias - plain.layers[3].bias)[3].item() == pytest.approx(delta, abs=1e-5)
    assert delta > 0
    assert recall_of_threes(work.model) > recall_of_threes(plain)
    found = work.findings["fit"]["calibration_recall"]
    assert found["after"] > found["before"]


def test_errors_come_before_work(session, digits):
    work = session()
    for fields, kind, text in (
        ({"teacher": "cifar-resnet20"}, ConfigurationError, "teacher 'cifar-resnet20' would be untrained"),
        ({"teacher": []}, ConfigurationError, "empty list"),
        ({"correct_bias_classes": [10]}, ConfigurationError, "expected some of the classes 0 to 9"),
    ):
        with pytest.raises(kind, match=text):
            fast(**fields).check(work)
    with pytest.raises(DataError, match="labelled calibration"):
        fast(correct_bias_classes=[1]).check(session(task=digits.without_labels()))
    work.model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10, bias=False))
    with pytest.raises(ModelError, match="no bias for each class"):
        fast(correct_bias_classes=[1]).callback(work)
