"""Distillation: a small network learns a large one's distribution over classes at a raised temperature.

The relative probabilities of the wrong classes carry what the large network, or an ensemble of networks, has learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from efficientdnns.data.nested import to_device
from efficientdnns.data.outputs import class_logits
from efficientdnns.data.split import Batch
from efficientdnns.errors import ConfigurationError, DataError, ModelError
from efficientdnns.method import Need, Network, Paper, TrainingMethod
from efficientdnns.parts.networks import check_trained, student_network, teacher_network
from efficientdnns.parts.tap import weighted_layers
from efficientdnns.session import Session
from efficientdnns.training import Callback, Trainer

Mean = Literal["arithmetic", "geometric", "logit"]


def soft_loss(student: Tensor, teacher: Tensor, temperature: float, scale: bool = True) -> Tensor:
    r""":math:`T^2 \, \mathrm{KL}(\mathrm{softmax}(v/T) \,\|\, \mathrm{softmax}(z/T))`, mean over the batch.

    Args:
        student: logits z, (batch, classes) or (batch, time, classes).
        teacher: logits v of the same shape; no gradient flows into them.
        temperature: T > 0.
        scale: multiply by T^2, which keeps the gradient's size when T changes.
    """
    return soft_target_loss(student, F.softmax(teacher.detach() / temperature, dim=-1), temperature, scale)


def soft_target_loss(student: Tensor, targets: Tensor, temperature: float, scale: bool = True) -> Tensor:
    """`soft_loss` against given distributions p (those of an ensemble, say) in place of one teacher's logits."""
    log_q = F.log_softmax(student.flatten(0, -2) / temperature, dim=-1)
    loss = F.kl_div(log_q, targets.detach().flatten(0, -2), reduction="batchmean")
    return loss * temperature**2 if scale else loss


def ensemble_soft_targets(logits: Sequence[Tensor], temperature: float, mean: Mean = "arithmetic") -> Tensor:
    """One distribution per sample from several teachers' logits; 'geometric' and 'logit' are the same function."""
    stacked = torch.stack(list(logits)) / temperature
    if mean == "arithmetic":
        return stacked.softmax(-1).mean(0)
    if mean == "geometric":
        return stacked.log_softmax(-1).mean(0).softmax(-1)
    return stacked.mean(0).softmax(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last dimension; log(classes) means that the distribution says nothing."""
    return -torch.xlogy(probabilities, probabilities).sum(-1)


def best_class_bias(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> float:
    """The number to add to the logits of ``classes`` that gives the highest accuracy on (logits (n, C), labels (n)).

    Exact: the accuracy changes only where a sample's best logit inside ``classes`` meets its best one outside. Of a
    best interval the middle is returned, or the end where it is unbounded.
    """
    logits = logits.double()
    inside = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    inside[list(classes)] = True
    best_in, argmax_in = logits.masked_fill(~inside, -torch.inf).max(1)
    best_out, argmax_out = logits.masked_fill(inside, -torch.inf).max(1)
    # A sample goes over to the classes once the number exceeds its margin; what it then wins or loses in accuracy:
    margin, order = (best_out - best_in).sort()
    gain = ((argmax_in == labels).long() - (argmax_out == labels).long())[order]
    correct = torch.cat([gain.new_zeros(1), gain.cumsum(0)])
    edges = torch.cat([margin[:1], margin, margin[-1:]])
    # Equal margins cannot be told apart, so the empty intervals between them do not count.
    width = edges[1:] - edges[:-1]
    allowed = width > 0
    allowed[0] = allowed[-1] = True
    best = int(correct.masked_fill(~allowed, torch.iinfo(correct.dtype).min).argmax())
    slack = -1e-3 if best == 0 else 1e-3 if best == len(margin) else 0.0
    return float((edges[best] + edges[best + 1]) / 2 + slack)


@torch.no_grad()
def add_class_bias(head: nn.Module, classes: Sequence[int], delta: float) -> None:
    """Add ``delta`` to the output bias of ``classes``; the same as taking it from the bias of all others."""
    head.bias[list(classes)] += delta  # type: ignore[index, operator]


def recall(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> float:
    """Share of the samples of ``classes`` that are told right; 1 where there are none."""
    chosen = torch.isin(labels, torch.tensor(list(classes)))
    right = (logits.argmax(1) == labels)[chosen]
    return right.double().mean().item() if len(right) else 1.0


class KnowledgeDistillation(TrainingMethod):
    r"""Knowledge distillation, `Hinton et al., 2015 <https://arxiv.org/abs/1503.02531>`_.

    The student (logits z) is trained on the teacher's (logits v) softened distribution and on the labels:

    .. math::

        L = w_{soft} \, T^2 \, CE(\mathrm{softmax}(v/T), \mathrm{softmax}(z/T))
            + w_{hard} \, CE(y, \mathrm{softmax}(z))

    Without ``student`` the session's own network is trained, which repairs a pruned or quantized network against the
    original; with it a fresh student of that architecture takes the network's place. In segmentation every pixel is a
    sample, and an auxiliary output learns from the labels alone. A list of teachers is an
    ensemble, whose distributions are averaged. Labels are not needed where ``hard_weight`` is 0 or the data has none.

    Missing classes (section 3): the student's bias for a class that the transfer set lacks comes out too low;
    ``correct_bias_classes`` raises it by the amount that serves accuracy on the calibration split best.

    Reported: ``teacher_entropy``, the mean entropy in nats of the targets at temperature T (near log C they are too
    flat, near 0 they are only labels), ``bias_correction`` and what it does to the classes' recall.

    Specialists (section 5) are in `efficientdnns.distillation.specialists`.

    Deviations:
        The paper fixes T per experiment (20 on MNIST, 2 in speech) and gives no MNIST label weight; the defaults are
        the field's later ones (T = 4, 0.9 / 0.1). KL is used for CE: the gradients are the same. The teacher sees the
        same augmented batch as the student. The bias is tuned on the calibration split, the paper's on the test set.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="knowledge-distillation",
        title="Distilling the Knowledge in a Neural Network",
        authors="Geoffrey Hinton, Oriol Vinyals, Jeff Dean",
        venue="NIPS Deep Learning Workshop",
        year=2014,
        url="https://arxiv.org/abs/1503.02531",
    )
    kind: ClassVar[str] = "distillation"
    needs: ClassVar[frozenset[Need]] = frozenset({"training data", "teacher"})
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 1}

    temperature: PositiveFloat = 4.0
    """T; 1 to 20 is usual."""
    soft_weight: Annotated[float, Field(ge=0)] = 0.9
    """Weight of the teacher's term."""
    hard_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the label term; ignored where there are no labels."""
    teacher: Network | list[Network] = "original"
    """'original' (the network before compression), a saved result, {name, weights: FILE}, or a list of these."""
    ensemble_mean: Mean = "arithmetic"
    """How the distributions of several teachers are averaged."""
    student: Network | None = None
    """Architecture of a fresh student; None trains the session's network."""
    correct_bias_classes: tuple[NonNegativeInt, ...] = ()
    """Classes whose output bias is corrected after training; needs a labelled calibration split."""

    @property
    def teachers(self) -> list[Any]:
        """The teachers as a list."""
        return list(self.teacher) if isinstance(self.teacher, list | tuple) else [self.teacher]

    def check(self, session: Session) -> None:
        super().check(session)
        if not self.teachers:
            raise ConfigurationError("knowledge-distillation: teacher is an empty list; name at least one network")
        for teacher in self.teachers:
            check_trained(teacher)
        task, chosen = session.task, self.correct_bias_classes
        if task.kind == "detection":
            raise ConfigurationError(
                "knowledge-distillation matches distributions over classes, and a detector in training gives losses; "
                "fine-tune it with fit instead"
            )
        if not chosen:
            return
        if task.calibration is None or not task.calibration.has_labels or task.num_classes is None:
            raise DataError(f"correct_bias_classes needs labelled calibration data, but task '{task.name}' has none")
        if max(chosen) >= task.num_classes or len(set(chosen)) >= task.num_classes:
            known = task.num_classes - 1
            raise ConfigurationError(
                f"correct_bias_classes is {list(chosen)}, expected some of the classes 0 to {known}"
            )

    def prepare(self, session: Session) -> None:
        session.model = student_network(session, self.student)

    def callback(self, session: Session) -> Callback:
        head = output_layer(session) if self.correct_bias_classes else ""
        return Distillation(self, [teacher_network(session, t) for t in self.teachers], session.report, head)


class Distillation(Callback):
    """Mixes the teachers' term into the task loss; the teachers see the same augmented batch."""

    def __init__(
        self, method: KnowledgeDistillation, teachers: list[nn.Module], report: Callable[..., None], head: str = ""
    ) -> None:
        self.method, self.teachers, self.report, self.head = method, teachers, report, head
        self.entropy: Tensor | float = 0.0
        self.samples = 0

    def epoch_start(self, trainer: Trainer) -> None:
        self.entropy, self.samples = 0.0, 0

    def task_loss(self, trainer: Trainer, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        method = self.method
        with torch.no_grad():
            found = [trainer.task.outputs(teacher, batch.inputs) for teacher in self.teachers]
            logits = [class_logits(trainer.task.kind, outputs) for outputs in found]
            targets = ensemble_soft_targets(logits, method.temperature, method.ensemble_mean)
            self.entropy = self.entropy + entropy(targets.float()).sum()
            self.samples += targets.shape[:-1].numel()
        soft = soft_target_loss(class_logits(trainer.task.kind, outputs), targets, method.temperature)
        return method.soft_weight * soft + method.hard_weight * loss

    def finish(self, trainer: Trainer) -> None:
        if self.samples:
            self.report(teacher_entropy=float(self.entropy) / self.samples, temperature=self.method.temperature)
        if classes := self.method.correct_bias_classes:
            logits, labels = calibration_logits(trainer)
            delta = best_class_bias(logits, labels, classes)
            add_class_bias(trainer.model.get_submodule(self.head), classes, delta)
            before = recall(logits, labels, classes)
            logits[:, list(classes)] += delta
            after = recall(logits, labels, classes)
            self.report(bias_correction=delta, calibration_recall={"before": before, "after": after})

    def state_dict(self) -> dict[str, Any]:
        return {"entropy": float(self.entropy), "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.entropy, self.samples = state["entropy"], state["samples"]


def output_layer(session: Session) -> str:
    """Name of the layer that makes the logits; raises `ModelError` if it has no bias for each class."""
    name = weighted_layers(session.model, session.example_input, session.task.outputs)[-1]
    bias = getattr(session.model.get_submodule(name), "bias", None)
    if bias is None or len(bias) != session.task.num_classes:
        raise ModelError(f"the last layer '{name}' has no bias for each class, so correct_bias_classes cannot be met")
    return name


@torch.no_grad()
def calibration_logits(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Logits and labels of the calibration split."""
    assert trainer.task.calibration is not None
    pairs = [
        (trainer.task.outputs(trainer.model, to_device(batch.inputs, trainer.device)).cpu(), batch.targets.cpu())
        for batch in trainer.task.calibration.batches(512)
        if batch.targets is not None
    ]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])
