"""Adversarial distillation: the two objectives, who moves when, and the run without a discriminator."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.distillation.adversarial_kd import (
    FAKE,
    REAL,
    AdversarialKD,
    Adversary,
    Discriminator,
    discriminator_loss,
    gan_loss,
    log_heads,
    logit_distance,
)
from efficientdnns.errors import ConfigurationError, DataError
from efficientdnns.models import build
from efficientdnns.training import Callback, Trainer, load_state, save_state

LABELS = torch.arange(12) % 10


def discriminator(depth: int = 3) -> Discriminator:
    return Discriminator(10, depth, 0.3, torch.Generator().manual_seed(0))


def test_two_heads_with_a_softmax_each():
    for depth in (1, 2, 3, 4):
        model = discriminator(depth)
        scores = model(torch.randn(12, 10))
        assert scores.shape == (12, 12)
        assert sum(isinstance(module, nn.Linear) for module in model.modules()) == depth + 1
        classes, real_fake = log_heads(scores)
        assert torch.allclose(classes.exp().sum(1), torch.ones(12))
        assert torch.allclose(real_fake.exp().sum(1), torch.ones(12))


def test_the_discriminators_objective_is_four_cross_entropies():
    t, s = torch.randn(12, 12), torch.randn(12, 12)
    real, fake = torch.full((12,), REAL), torch.full((12,), FAKE)
    expected = (
        F.cross_entropy(t[:, -2:], real)
        + F.cross_entropy(s[:, -2:], fake)
        + F.cross_entropy(t[:, :-2], LABELS)
        + F.cross_entropy(s[:, :-2], LABELS)
    ) / 2
    assert torch.allclose(discriminator_loss(t, s, LABELS), expected)


def test_non_saturating_changes_the_first_term_only():
    s = torch.randn(12, 12)
    classes, real_fake = log_heads(s)
    second = F.nll_loss(classes, LABELS)
    assert torch.allclose(2 * gan_loss(s, LABELS) - second, real_fake[:, FAKE].mean())
    assert torch.allclose(2 * gan_loss(s, LABELS, non_saturating=True) - second, -real_fake[:, REAL].mean())


def test_the_distance_is_summed_over_classes():
    t = torch.randn(12, 10)
    s = (t + 0.5).requires_grad_()
    assert logit_distance(s, t).item() == pytest.approx(5.0)
    s = t.clone().requires_grad_()
    logit_distance(s, t).backward()
    assert logit_distance(s, t) == 0
    assert torch.isfinite(s.grad).all()


def test_a_student_step_moves_each_part_in_its_direction():
    torch.manual_seed(0)
    student, judge = nn.Linear(5, 10), discriminator().eval()
    x = torch.randn(12, 5)

    def parts(model: nn.Module) -> tuple[Tensor, Tensor]:
        classes, real_fake = log_heads(judge(model(x)))
        return real_fake[:, FAKE].mean(), -F.nll_loss(classes, LABELS)

    def step(loss: Tensor) -> tuple[Tensor, Tensor]:
        moved = copy.deepcopy(student)
        for p, g in zip(moved.parameters(), torch.autograd.grad(loss, list(student.parameters()))):
            p.data -= 1e-3 * g
        return parts(moved)

    fake, label = parts(student)
    assert step(parts(student)[0])[0] < fake
    assert step(-parts(student)[1])[1] > label
    after = step(gan_loss(judge(student(x)), LABELS))
    assert after[0] - after[1] < fake - label


class Recorder(Callback):
    """Notes what a discriminator's step and a student's step change."""

    def after_backward(self, trainer: Trainer) -> None:
        adversary: Any = trainer.callbacks[0]
        self.before = copy.deepcopy(adversary.discriminator.state_dict())
        self.gradients = [p.grad for p in adversary.discriminator.parameters()]
        self.generator_state = torch.get_rng_state()


def small(**fields) -> AdversarialKD:
    return AdversarialKD(**{"epochs": 1, "learning_rate": 0.02, "batch_size": 64, **fields})


def test_each_step_moves_only_its_own_network(session, monkeypatch):
    work = session(build("small-resnet", width=0.25))
    checked = 0
    original = Adversary.discriminator_step

    def step(self: Adversary, trainer: Trainer, logits: Tensor, labels: Any) -> None:
        nonlocal checked
        student, judge = copy.deepcopy(trainer.model.state_dict()), copy.deepcopy(self.discriminator.state_dict())
        random = torch.get_rng_state()
        original(self, trainer, logits, labels)
        assert torch.equal(random, torch.get_rng_state()), "the discriminator draws from its own generator"
        assert all(torch.equal(student[name], value) for name, value in trainer.model.state_dict().items())
        assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters()) or trainer.step > 0
        assert any(not torch.equal(judge[name], value) for name, value in self.discriminator.state_dict().items())
        self.judge = {name: p.detach().clone() for name, p in self.discriminator.named_parameters()}
        checked += 1

    def after_step(self: Adversary, trainer: Trainer) -> None:
        for name, p in self.discriminator.named_parameters():
            assert torch.equal(self.judge[name], p)

    monkeypatch.setattr(Adversary, "discriminator_step", step)
    monkeypatch.setattr(Adversary, "after_step", after_step)
    small().apply(work)
    assert checked == 7
    assert set(work.findings["fit"]["loss_terms"]) == {"label", "l1", "gan", "discriminator"}


class Plain(Callback):
    """L_S + L_L1, written down independently."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def task_loss(self, trainer, batch, outputs, loss):
        with torch.no_grad():
            logits = self.teacher(batch.inputs)
        return loss + F.l1_loss(outputs, logits, reduction="sum") / len(logits)


def test_without_a_discriminator_the_trajectory_is_that_of_the_other_terms(session):
    student = {"name": "mlp", "hidden": [16], "dropout": 0.2}
    states = []
    for plain in (False, True):
        torch.manual_seed(0)
        work = session()
        method = small(student=student, gan_weight=0.0, epochs=2)
        method.prepare(work)
        callback = Plain(work.original) if plain else method.callback(work)
        torch.manual_seed(1)
        work.train([callback], epochs=2, learning_rate=0.02, batch_size=64)
        states.append(work.model.state_dict())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(states[0].values(), states[1].values()))


def test_a_discriminator_without_influence_leaves_the_trajectory_alone(session, monkeypatch):
    """D's initialisation, dropout and steps draw nothing that the student's dropout would have drawn."""
    student = {"name": "mlp", "hidden": [16], "dropout": 0.2}
    states = []
    for weight in (0.0, 1e-30):
        torch.manual_seed(0)
        work = session()
        small(student=student, gan_weight=weight, epochs=2).apply(work)
        states.append(work.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)])
def test_the_five_rows_of_the_ablation(session, weights):
    names = ("label_weight", "l1_weight", "gan_weight")
    work = session()
    small(student={"name": "mlp", "hidden": [32]}, epochs=10, **dict(zip(names, weights))).apply(work)
    terms = set(work.findings["fit"]["loss_terms"])
    assert ("l1" in terms) == bool(weights[1])
    assert ("discriminator" in terms) == bool(weights[2])
    if weights[0]:
        assert work.evaluate() > 50


def test_a_resumed_run_ends_where_an_unbroken_one_does(session, tmp_path, monkeypatch):
    method = small(student={"name": "mlp", "hidden": [16]}, epochs=3)
    torch.manual_seed(0)
    whole = session()
    method.apply(whole)
    save = Trainer._save

    def die(self: Trainer) -> None:
        save(self)
        if self.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save", die)
        torch.manual_seed(0)
        with pytest.raises(KeyboardInterrupt):
            method.apply(session(directory=tmp_path))
    torch.manual_seed(0)
    resumed = session(directory=tmp_path)
    method.apply(resumed)
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole.findings == resumed.findings


def test_state_is_plain_data(session, tmp_path):
    work = session()
    callback = small().callback(work)
    work.train([callback], epochs=1)
    save_state(tmp_path / "state.safetensors", callback.state_dict())
    assert set(load_state(tmp_path / "state.safetensors")) >= {"discriminator", "optimizer", "generator"}


def test_errors_come_before_work(session, digits):
    with pytest.raises(DataError, match="labelled"):
        small().check(session(task=digits.without_labels()))
    with pytest.raises(ConfigurationError, match="untrained"):
        small(teacher="cifar-resnet20").check(session())
    with pytest.raises(ConfigurationError, match="discriminator_depth"):
        small(discriminator_depth=5)
