"""Distillation of activation boundaries: before training, a student's neurons learn to fire where the teacher's do.

Which side of a neuron's hyperplane a sample falls on matters more than the exact response; ordinary training follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from efficientdnns.data.nested import length, to_device
from efficientdnns.data.split import Batch
from efficientdnns.distillation.knowledge_distillation import soft_loss
from efficientdnns.errors import DataError
from efficientdnns.method import Need, Network, Paper, TrainingMethod
from efficientdnns.parts.connect import ConnectorKind, average_gradients, connector
from efficientdnns.parts.networks import check_trained, student_network, teacher_network
from efficientdnns.parts.pair import Pair, pair_layers, pair_stages
from efficientdnns.parts.tap import Tap, evaluating
from efficientdnns.session import Session
from efficientdnns.training import Callback, Trainer


def boundary_loss(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    r"""A squared hinge per neuron with the teacher's on/off state as the label, summed over all elements.

    .. math:: \| \rho(T) \, \sigma(\mu - S) + (1 - \rho(T)) \, \sigma(\mu + S) \|_2^2,
        \quad \rho(z) = 1[z > 0], \; \sigma(z) = \max(0, z)

    Args:
        student: S, connected pre-activation responses (B, C, ...).
        teacher: T, the teacher's, of the same shape; only the signs matter.
        margin: mu > 0; responses beyond it on the right side cost nothing.
    """
    return torch.where(teacher > 0, margin - student, margin + student).relu().square().sum()


def activation_transfer_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r""":math:`\| \rho(T) - \rho(S) \|_1`, the number of neurons on the wrong side; `boundary_loss` stands in for it."""
    return ((teacher > 0) != (student > 0)).sum()


def layer_weights(layers: int, decay: float = 0.5) -> list[float]:
    """Weights from input to output: 1 for the deepest layer, times ``decay`` for each layer before it."""
    return [decay ** (layers - 1 - layer) for layer in range(layers)]


class ActivationBoundaries(TrainingMethod):
    r"""Activation boundary distillation (AB), `Heo et al., 2019 <https://arxiv.org/abs/1811.03233>`_.

    Phase 1 initialises the student without labels. With pre-activation responses :math:`T_l, S_l` of L paired layers,
    connectors :math:`r_l` (1x1 convolution and batch norm, trained along, then thrown away), margin :math:`\mu` and
    batch size B it minimises the squared hinge `boundary_loss`

    .. math:: \frac{w}{B} \sum_{l=1}^{L} 2^{l-L} \, \| \rho(T_l) \sigma(\mu - r_l(S_l))
        + (1 - \rho(T_l)) \sigma(\mu + r_l(S_l)) \|_2^2 , \quad \rho(z) = 1[z > 0], \; \sigma(z) = \max(0, z)

    with an optimizer of its own. Layers behind the deepest pair (the classifier) stay untouched. Phase 2 is the
    training run of this method: cross-entropy (``ce``) or distillation with KL at temperature T alone (``kd``). Other
    methods can share phase 2.

    Reported: ``activation_similarity``, the share of neurons with equal on/off state after phase 1, for each pair, on
    up to 512 calibration inputs.

    Deviations:
        The released script puts the teacher in training mode in phase 1, which moves its batch norm; here it stays in
        evaluation mode. Its ``kd`` has no factor T^2 and no label term, as here. The learning-rate steps (x0.2 after
        30, 60 and 80 % of 200 epochs) are not built in: phase 2 follows the session's training settings. The extra
        logit head for a teacher of other classes (the paper's transfer-learning runs) is left out.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="activation-boundaries",
        title="Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons",
        authors="Byeongho Heo, Minsik Lee, Sangdoo Yun, Jin Young Choi",
        venue="AAAI",
        year=2019,
        url="https://arxiv.org/abs/1811.03233",
    )
    kind: ClassVar[str] = "distillation"
    needs: ClassVar[frozenset[Need]] = frozenset({"training data", "teacher"})
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 1, "init_epochs": 1}

    teacher: Network = "original"
    """The teacher: 'original' (the network before compression), a saved result, {name, weights: FILE}."""
    student: Network | None = None
    """Architecture of a fresh student; None initialises the session's network."""
    layers: Literal["stage-ends"] | tuple[tuple[str, str], ...] = "stage-ends"
    """Pairs (teacher module, student module) whose pre-activation responses are matched; 'stage-ends' finds them."""
    margin: PositiveFloat = 1.0
    """mu: responses beyond it on the right side cost nothing."""
    weight: PositiveFloat = 0.003
    """w, the factor of the summed loss; depends on the size of the features (0.001 for ResNet-50 to MobileNet)."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of a layer against the next deeper one."""
    connector: ConnectorKind = "conv1x1-bn"
    """Adapter where widths differ; vectors always get a linear layer."""
    init_epochs: NonNegativeInt = 10
    """Epochs of phase 1."""
    init_learning_rate: PositiveFloat = 0.1
    """Learning rate of phase 1, constant."""
    init_weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """L2 coefficient of phase 1."""
    init_optimizer: Literal["sgd", "nesterov", "adam", "adamw", "rmsprop"] = "nesterov"
    """Optimizer of phase 1."""
    second_stage: Literal["kd", "ce"] = "kd"
    """Loss of phase 2: distillation without labels, or the task's own."""
    temperature: PositiveFloat = 3.0
    """T of the second stage 'kd'."""

    def check(self, session: Session) -> None:
        super().check(session)
        check_trained(self.teacher)
        if self.second_stage == "ce" and session.task.train is not None and not session.task.train.has_labels:
            raise DataError(f"second_stage 'ce' needs labels, but task '{session.task.name}' has none; write kd")

    def prepare(self, session: Session) -> None:
        """Build the student and run phase 1."""
        session.model = student_network(session, self.student)
        teacher = teacher_network(session, self.teacher)
        example, forward = session.example_input, session.task.outputs
        if self.layers == "stage-ends":
            pairs = pair_stages(teacher, session.model, example, forward)
        else:
            pairs = pair_layers(teacher, session.model, list(self.layers), example, forward)
        session.train(
            [Initialisation(self, teacher, pairs, session.report)],
            epochs=self.init_epochs,
            task=session.task.without_labels(),
            validate=False,
            optimizer=self.init_optimizer,
            learning_rate=self.init_learning_rate,
            weight_decay=self.init_weight_decay,
            schedule="constant",
            batch_size=self.batch_size or session.settings.batch_size,
        )

    def callback(self, session: Session) -> Callback:
        if self.second_stage == "ce":
            return Callback()
        return SoftTargets(teacher_network(session, self.teacher), self.temperature)


class Initialisation(Callback):
    """Phase 1: the boundary loss in place of the task's, and the connectors that it needs."""

    loss: Callable[[Tensor, Tensor, float], Tensor] = staticmethod(boundary_loss)

    def __init__(
        self, method: ActivationBoundaries, teacher: nn.Module, pairs: list[Pair], report: Callable[..., None]
    ) -> None:
        self.method, self.teacher, self.pairs, self.report = method, teacher, pairs, report
        self.weights = layer_weights(len(pairs), method.layer_decay)
        self.connectors = nn.ModuleList(
            connector(pair.student_shape, pair.teacher_shape, method.connector) for pair in pairs
        )
        self.untouched: list[nn.Parameter] = []

    def setup(self, trainer: Trainer) -> None:
        self.connectors.to(trainer.device).train()
        self.student_tap = Tap(trainer.model, [pair.student for pair in self.pairs], "pre-activation").attach()
        self.teacher_tap = Tap(self.teacher, [pair.teacher for pair in self.pairs], "pre-activation").attach()
        self.untouched = self._out_of_reach(trainer)
        for parameter in self.untouched:
            parameter.requires_grad_(False)

    def parameter_groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        parameters = list(self.connectors.parameters())
        return [{"params": parameters}] if parameters else []

    def task_loss(self, trainer: Trainer, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        with torch.no_grad():
            trainer.task.outputs(self.teacher, batch.inputs)
        terms = [
            weight * self.loss(student, teacher, self.method.margin)
            for weight, (student, teacher) in zip(self.weights, self._responses())
        ]
        return torch.stack(terms).sum() * self.method.weight / length(batch.inputs)

    def after_backward(self, trainer: Trainer) -> None:
        average_gradients(self.connectors.parameters(), trainer.accelerator)

    def finish(self, trainer: Trainer) -> None:
        for parameter in self.untouched:
            parameter.requires_grad_(True)
        self.report(activation_similarity=self._similarity(trainer))
        self.student_tap.detach()
        self.teacher_tap.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"connectors": dict(self.connectors.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.connectors.load_state_dict(state["connectors"])

    def _responses(self) -> list[tuple[Tensor, Tensor]]:
        """(connected student, teacher) responses of each pair in the last forward passes."""
        return [
            (connect(self.student_tap[pair.student]), self.teacher_tap[pair.teacher])
            for connect, pair in zip(self.connectors, self.pairs)
        ]

    def _out_of_reach(self, trainer: Trainer) -> list[nn.Parameter]:
        """The student's parameters that no paired layer depends on: the classifier."""
        with evaluating(trainer.model), torch.enable_grad():
            trainer.task.outputs(trainer.model, to_device(trainer.task.example_input, trainer.device))
            total = torch.stack([self.student_tap[pair.student].sum() for pair in self.pairs]).sum()
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return [p for p, gradient in zip(parameters, gradients) if gradient is None]

    @torch.no_grad()
    def _similarity(self, trainer: Trainer) -> dict[str, float]:
        split = trainer.task.calibration or trainer.train_split
        inputs = to_device(next(split.batches(512)).inputs, trainer.device)
        self.connectors.eval()
        with evaluating(trainer.model):
            trainer.task.outputs(trainer.model, inputs)
            trainer.task.outputs(self.teacher, inputs)
        return {
            pair.student: 1 - activation_transfer_loss(student, teacher).item() / teacher.numel()
            for pair, (student, teacher) in zip(self.pairs, self._responses())
        }


class SoftTargets(Callback):
    """Phase 2 of kind 'kd': KL to the teacher at a temperature, without labels."""

    def __init__(self, teacher: nn.Module, temperature: float) -> None:
        self.teacher, self.temperature = teacher, temperature

    def task_loss(self, trainer: Trainer, batch: Batch, outputs: Any, loss: Tensor) -> Tensor:
        with torch.no_grad():
            logits = trainer.task.outputs(self.teacher, batch.inputs)
        return soft_loss(outputs, logits, self.temperature, scale=False)
