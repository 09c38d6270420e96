"""Distillation with a learned loss: a small discriminator tells teacher logits from student logits.

The student learns from labels, from the distance to the teacher's logits, and from fooling the discriminator, which
also classifies the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.data.split import Batch
from efficientdnns.errors import ConfigurationError
from efficientdnns.method import Need, Network, Paper, Ratio, TrainingMethod
from efficientdnns.parts.connect import average_gradients
from efficientdnns.parts.networks import check_trained, student_network, teacher_network
from efficientdnns.session import Session
from efficientdnns.training import Callback, Trainer

REAL, FAKE = 0, 1


class Dropout(nn.Module):
    """Dropout whose numbers come from a generator of its own, so that others' randomness is left alone."""

    def __init__(self, rate: float, generator: torch.Generator) -> None:
        super().__init__()
        self.rate, self.generator = rate, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class ResidualBlock(nn.Module):
    """[Linear, BN, ReLU, Dropout, Linear, BN, Dropout] plus the input, ReLU."""

    def __init__(self, width: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            Dropout(dropout, generator),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            Dropout(dropout, generator),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.layers(x)).relu()


class Discriminator(nn.Module):
    """Logits (B, C) to scores (B, C + 2): C of classes, then Real and Fake, two softmaxes apart.

    Batch norm of the input, ``depth`` hidden linear layers of width C, an output layer. The hidden layers are residual
    blocks of two; an odd depth begins with [Linear, BN, ReLU, Dropout].
    """

    def __init__(self, classes: int, depth: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm1d(classes)]
        if depth % 2:
            linear = [nn.Linear(classes, classes), nn.BatchNorm1d(classes), nn.ReLU(), Dropout(dropout, generator)]
            layers += linear
        layers += [ResidualBlock(classes, dropout, generator) for _ in range(depth // 2)]
        self.layers = nn.Sequential(*layers, nn.Linear(classes, classes + 2))

    def forward(self, logits: Tensor) -> Tensor:
        return self.layers(logits)


def log_heads(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the classes (B, C) and of Real and Fake (B, 2), each head with its own softmax."""
    return scores[:, :-2].log_softmax(1), scores[:, -2:].log_softmax(1)


def discriminator_loss(teacher_scores: Tensor, student_scores: Tensor, labels: Tensor) -> Tensor:
    """-(L_A + L_DS) / 2: half the sum of {teacher: Real, student: Fake} and {teacher: label, student: label}."""
    loss = teacher_scores.new_zeros(())
    for scores, origin in ((teacher_scores, REAL), (student_scores, FAKE)):
        classes, real_fake = log_heads(scores)
        loss = loss - real_fake[:, origin].mean() + F.nll_loss(classes, labels)
    return loss / 2


def gan_loss(student_scores: Tensor, labels: Tensor, non_saturating: bool = False) -> Tensor:
    """The student's part of (L_A - L_DS) / 2: [log P(Fake | s) - log P(label | s)] / 2, mean over the batch.

    ``non_saturating`` puts -log P(Real | s) for the first term.
    """
    classes, real_fake = log_heads(student_scores)
    fooling = -real_fake[:, REAL].mean() if non_saturating else real_fake[:, FAKE].mean()
    return (fooling + F.nll_loss(classes, labels)) / 2


def logit_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """L1 distance of logits (B, C): summed over the classes, mean over the batch."""
    return (student - teacher).abs().sum(1).mean()


class AdversarialKD(TrainingMethod):
    r"""Distillation with conditional adversarial networks, `Xu et al., 2018 <https://arxiv.org/abs/1709.00513>`_.

    A discriminator D maps teacher logits t and student logits F(x) in :math:`R^C` to C class scores and the two scores
    Real and Fake. Each step updates D, then the student:

    .. math::

        \max_D \; \tfrac12 (L_A + L_{DS}), \quad
        L_A = \log P(Real | D(t)) + \log P(Fake | D(F(x))), \quad
        L_{DS} = \log P(l | D(t)) + \log P(l | D(F(x)))

        \min_F \; L_S + L_{L1} + L_{GAN}, \quad L_S = H(l, F(x)), \quad L_{L1} = \| F(x) - t \|_1, \quad
        L_{GAN} = \tfrac12 [\log P(Fake | D(F(x))) - \log P(l | D(F(x)))]

    with means over the batch. There is no temperature. D sees the logits of the student's own forward pass, so its step
    moves nothing of the student; it is frozen in the student's step and thrown away at the end. It draws from a random
    generator of its own, so that ``gan_weight`` 0 (no D at all) gives exactly the run with the other two terms.

    Reported: the means of all terms over the last epoch.

    Deviations:
        The order inside D's residual block is read from a small figure; depth counts hidden linear layers. D is in
        training mode in both steps (dropout on; its batch norm's running averages, which nobody reads, move in both).
        Teacher logits come from the same augmented batch, not from a cache. D takes the student's weight decay and
        schedule. The joint 2C-way head, which the paper found equal, and the learning-rate steps (a tenth at 40 and
        80 % of 200 epochs) are not built in.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="adversarial-kd",
        title="Training Shallow and Thin Networks for Acceleration via Knowledge Distillation with Conditional "
        "Adversarial Networks",
        authors="Zheng Xu, Yen-Chang Hsu, Jiawei Huang",
        venue="ICLR Workshop",
        year=2018,
        url="https://arxiv.org/abs/1709.00513",
    )
    kind: ClassVar[str] = "distillation"
    needs: ClassVar[frozenset[Need]] = frozenset({"training data", "labels", "teacher"})
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 1}

    teacher: Network = "original"
    """The teacher: 'original' (the network before compression), a saved result, {name, weights: FILE}."""
    student: Network | None = None
    """Architecture of a fresh student; None trains the session's network."""
    label_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of L_S."""
    l1_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of L_L1."""
    gan_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of L_GAN; at 0 there is no discriminator."""
    discriminator_depth: Annotated[PositiveInt, Field(le=4)] = 3
    """Hidden linear layers of D; the paper tries 1 to 4."""
    discriminator_dropout: Ratio = 0.3
    """Dropout rate of D."""
    discriminator_learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of D (SGD with the run's momentum)."""
    non_saturating: bool = False
    """Fool D by raising log P(Real) instead of lowering log P(Fake), which is the paper's form."""

    def check(self, session: Session) -> None:
        super().check(session)
        check_trained(self.teacher)
        if session.task.kind != "classification" or session.task.num_classes is None:
            raise ConfigurationError(f"adversarial-kd needs classes, but task '{session.task.name}' has none")

    def prepare(self, session: Session) -> None:
        session.model = student_network(session, self.student)

    def callback(self, session: Session) -> Callback:
        return Adversary(self, teacher_network(session, self.teacher), session.report)


class Adversary(Callback):
    """Owns the step: D's update on the logits at hand, then the student's."""

    discriminator: Discriminator | None = None

    def __init__(self, method: AdversarialKD, teacher: nn.Module, report: Callable[..., None]) -> None:
        self.method, self.teacher, self.report = method, teacher, report
        self.terms: dict[str, Tensor] = {}
        self.steps = 0

    def setup(self, trainer: Trainer) -> None:
        if self.method.gan_weight == 0:
            return
        method, settings = self.method, trainer.settings
        self.generator = torch.Generator(trainer.device).manual_seed(trainer.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trainer.seed)
            assert trainer.task.num_classes is not None
            self.discriminator = Discriminator(
                trainer.task.num_classes, method.discriminator_depth, method.discriminator_dropout, self.generator
            ).to(trainer.device)
        self.optimizer = torch.optim.SGD(
            self.discriminator.parameters(),
            lr=method.discriminator_learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )

    def epoch_start(self, trainer: Trainer) -> None:
        self.terms, self.steps = {}, 0

    def training_step(self, trainer: Trainer, batch: Batch) -> Tensor:
        outputs = trainer.forward(batch)
        with torch.no_grad():
            self.logits = trainer.task.outputs(self.teacher, batch.inputs).float()
        if self.discriminator is not None:
            self.discriminator_step(trainer, outputs.detach().float(), batch.targets)
        loss = trainer.loss(batch, outputs)
        trainer.update(loss)
        self.steps += 1
        return loss

    def discriminator_step(self, trainer: Trainer, student_logits: Tensor, labels: Any) -> None:
        """One update of D; teacher and student logits pass as batches of their own."""
        assert self.discriminator is not None
        group = trainer.optimizer.param_groups[0]
        self.optimizer.param_groups[0]["lr"] = (
            self.method.discriminator_learning_rate * group["lr"] / group["initial_lr"]
        )
        self.discriminator.requires_grad_(True).train()
        loss = discriminator_loss(self.discriminator(self.logits), self.discriminator(student_logits), labels)
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.discriminator.parameters(), trainer.accelerator)
        self.optimizer.step()
        self.discriminator.requires_grad_(False)
        self._note("discriminator", loss)

    def task_loss(self, trainer: Trainer, batch: Batch, outputs: Tensor, loss: Tensor) -> Tensor:
        method, total = self.method, self.method.label_weight * loss
        self._note("label", loss)
        if method.l1_weight:
            distance = logit_distance(outputs.float(), self.logits)
            self._note("l1", distance)
            total = total + method.l1_weight * distance
        if self.discriminator is not None:
            labels: Any = batch.targets
            fooling = gan_loss(self.discriminator(outputs.float()), labels, method.non_saturating)
            self._note("gan", fooling)
            total = total + method.gan_weight * fooling
        return total

    def loss_terms(self) -> dict[str, float]:
        """Mean of each term over the steps of this epoch."""
        return {name: value.item() / max(1, self.steps) for name, value in self.terms.items()}

    def finish(self, trainer: Trainer) -> None:
        self.report(loss_terms=self.loss_terms())

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"terms": dict(self.terms), "steps": self.steps}
        if self.discriminator is not None:
            state["discriminator"] = dict(self.discriminator.state_dict())
            state["optimizer"] = self.optimizer.state_dict()
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.terms, self.steps = state["terms"], state["steps"]
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"].cpu())

    def _note(self, name: str, value: Tensor) -> None:
        self.terms[name] = self.terms.get(name, torch.zeros((), device=value.device)) + value.detach()
