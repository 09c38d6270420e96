"""Data-free distillation: images are made for which the teacher responds as it did to its training data.

A small record of activation statistics takes the place of the data; the student learns from the images alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.data.split import TensorSplit
from efficientdnns.distillation.activation_record import ActivationRecord, CovarianceKind, Scope, record_activations
from efficientdnns.errors import ConfigurationError, DataError, FileFormatError
from efficientdnns.method import Method, Need, Network, Paper
from efficientdnns.parts.networks import check_trained, student_network, teacher_network
from efficientdnns.parts.tap import Forward, Tap, call, evaluating
from efficientdnns.session import Session
from efficientdnns.task import Task
from efficientdnns.training import load_state, save_state


def response_loss(responses: list[Tensor], targets: list[Tensor], scope: Scope = "all") -> Tensor:
    r"""Distance of the teacher's responses (B, n_l) to the sampled ones, summed over blocks l.

    ``top`` and ``all``: :math:`\frac{1}{n_l} \mathrm{mean} (\sigma(a_l) - \sigma(h_l))^2` with
    :math:`\sigma(z) = \max(0, z)`, so units that are meant to be off and are off have no gradient; ``spectral-*``: the
    same of the coefficients, without :math:`\sigma`.
    """
    if not scope.startswith("spectral"):
        responses, targets = [h.relu() for h in responses], [a.relu() for a in targets]
    terms = [F.mse_loss(h, a) / (1 if scope == "top" else h.shape[1]) for h, a in zip(responses, targets)]
    return torch.stack(terms).sum()


class SoftCrossEntropy:
    """The loss CE(p, softmax(z / T)) against distributions p, mean over the batch."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs / self.temperature, targets)


class FixedDropout:
    """Gives a network in evaluation mode its dropout back, with one mask per layer that stays until `draw`.

    A mask holds one number for each unit, for all samples; kept units are scaled as in training.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator) -> None:
        self.generator = generator
        self.masks: dict[nn.Module, Tensor] = {}
        layers = [module for module in model.modules() if isinstance(module, nn.Dropout | nn.Dropout2d)]
        self.handles = [layer.register_forward_hook(self._apply) for layer in layers]

    def draw(self) -> None:
        """Forget the masks; the next forward pass draws new ones."""
        self.masks.clear()

    def remove(self) -> None:
        """Leave the network as it was."""
        for handle in self.handles:
            handle.remove()

    def _apply(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        if layer not in self.masks:
            shape = (1, *output.shape[1:]) if isinstance(layer, nn.Dropout) else (1, output.shape[1], 1, 1)
            rate = float(layer.p)  # type: ignore[arg-type]
            self.masks[layer] = (torch.rand(shape, generator=self.generator) >= rate).to(output) / (1 - rate)
        return output * self.masks[layer]


class Images(NamedTuple):
    """Reconstructed images (N, C, H, W), the teacher's softened outputs (N, classes), the loss before and after."""

    inputs: Tensor
    targets: Tensor
    losses: tuple[float, float]


def reconstruct(
    teacher: nn.Module,
    record: ActivationRecord,
    example: Tensor,
    images_per_class: int,
    *,
    steps: int = 1000,
    learning_rate: float = 0.07,
    init_mean: float = 0.15,
    init_std: float = 0.1,
    batch_size: int = 64,
    dropout_masks: bool = False,
    pixel_range: tuple[float, float] | None = None,
    seed: int = 0,
    forward: Forward = call,
    advance: Callable[[], None] = lambda: None,
) -> Images:
    """Make ``images_per_class`` images of the shape of ``example`` (1, ...) for every class, by Adam on the pixels.

    The teacher is left bit-identical; only the pixels move. Each batch holds one class; its targets are drawn from the
    record once. The other arguments are fields of `DataFreeKD`; ``advance`` is called after every step.

    Raises `DataError` if the record was made from another architecture.
    """
    numbers = torch.Generator().manual_seed(seed)
    names = [name for name in record.layers if name]
    frozen = [(parameter, parameter.requires_grad) for parameter in teacher.parameters()]
    teacher.requires_grad_(False)
    dropout = FixedDropout(teacher, numbers) if dropout_masks else None
    inputs: list[Tensor] = []
    losses: list[Tensor] = []
    try:
        with evaluating(teacher), Tap(teacher, names, "pre-activation") as tap:

            def responses(x: Tensor) -> list[Tensor]:
                values = record.read(tap, forward(teacher, x))
                return [block.responses(values) for block in record.blocks]

            _check_fits(record, responses(example))
            for label in range(record.classes):
                for start in range(0, images_per_class, batch_size):
                    count = min(batch_size, images_per_class - start)
                    targets = [block.sample(label, count, numbers).to(example.device) for block in record.blocks]
                    noise = torch.randn(count, *example.shape[1:], generator=numbers).to(example.device)
                    x = (init_mean + init_std * noise).requires_grad_()
                    if dropout is not None:
                        dropout.draw()
                    optimizer = torch.optim.Adam([x], lr=learning_rate)
                    losses.append(response_loss(responses(x), targets, record.scope).detach())
                    for _ in range(steps):
                        loss = response_loss(responses(x), targets, record.scope)
                        (x.grad,) = torch.autograd.grad(loss, x)
                        optimizer.step()
                        if pixel_range is not None:
                            x.data.clamp_(*pixel_range)
                        advance()
                    losses.append(response_loss(responses(x), targets, record.scope).detach())
                    inputs.append(x.detach())
    finally:
        if dropout is not None:
            dropout.remove()
        for parameter, flag in frozen:
            parameter.requires_grad_(flag)
    with evaluating(teacher), torch.no_grad():
        soft = [(forward(teacher, x) / record.temperature).softmax(1) for x in inputs]
    before, after = torch.stack(losses).view(-1, 2).mean(0).tolist()
    return Images(torch.cat(inputs).cpu(), torch.cat(soft).cpu(), (before, after))


def synthetic_task(task: Task, images: Images, temperature: float) -> Task:
    """A task whose training data are the images with the teacher's distributions, under `SoftCrossEntropy`.

    It has no calibration split, so that nothing of the original data is read in training.
    """
    train = TensorSplit(images.inputs, images.targets, name="reconstructed")
    loss = SoftCrossEntropy(temperature)
    return task.with_(train=train, calibration=None, loss=loss, name=f"{task.name} (reconstructed)")


class DataFreeKD(Method):
    r"""Data-free knowledge distillation, `Lopes et al., 2017 <https://arxiv.org/abs/1710.07535>`_.

    Record (once, with the data): for each layer l and class c the mean :math:`\mu_{l,c}` and covariance
    :math:`\Sigma_{l,c} = L L^T` (or deviations) of the pre-activation responses :math:`h_l`, the logits divided by T.
    Reconstruct (without data): for targets :math:`a_l = \mu_{l,c} + L z, \; z \sim N(0, I)` move the pixels x, from
    noise, by Adam on

    .. math:: \sum_l \frac{1}{n_l} \, \mathrm{mean} \, (\sigma(a_l) - \sigma(h_l(x)))^2, \quad \sigma(z) = \max(0, z)

    Distil: the student learns :math:`\mathrm{softmax}(h_L(x))`, the teacher's actual output, at temperature T with
    Adam. With a ``record`` file no training data is needed or read; without one the record is made first from the
    session's training data, and nothing else of it is used. ``steps`` 0 distils on noise, the baseline.

    Reported: sizes of the record and of the data in bytes, images made, mean loss before and after.

    Deviations:
        The spectral scopes are inferred (see `record_activations`): the released code computes the all-layers loss
        under their names. Distillation shuffles across classes, where the paper's batches hold one class each.
        Covariances are kept up to 256 units (``auto``); their factors L come from eigenvectors, which also takes
        singular matrices. The layer that makes the logits is in the record once, as the logits. ``dropout_masks`` uses
        the teacher's own dropout layers, rates and scaling. Pixels are in the network's input units: on data that is
        normalised by (mean, std), the paper's 0.15 +- 0.1 and rate 0.07 become (0.15 - mean) / std, 0.1 / std and
        0.07 / std.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="data-free-kd",
        title="Data-Free Knowledge Distillation for Deep Neural Networks",
        authors="Raphael Gontijo Lopes, Stefano Fenu, Thad Starner",
        venue="NIPS Workshop on Learning with Limited Labeled Data",
        year=2017,
        url="https://arxiv.org/abs/1710.07535",
    )
    kind: ClassVar[str] = "distillation"
    needs: ClassVar[frozenset[Need]] = frozenset({"teacher"})
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 2, "images_per_class": 8, "steps": 5, "scope": "top"}

    teacher: Network = "original"
    """The teacher: 'original' (the network before compression), a saved result, {name, weights: FILE}."""
    student: Network | None = None
    """Architecture of a fresh student; None trains the session's network."""
    record: str | None = None
    """File of an activation record; None makes one from the training data."""
    scope: Scope = "all"
    """What a record made here holds: logits, all layers, or spectral coefficients (inferred) of all or pairs."""
    covariance: CovarianceKind = "auto"
    """Covariances in a record made here: 'full', 'diagonal', or 'auto' (full up to 256 units)."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the spectral coefficients that is kept."""
    temperature: PositiveFloat = 8.0
    """T of the record and of the distillation; a record file brings its own."""
    images_per_class: PositiveInt = 6400
    """Images made for each class."""
    steps: NonNegativeInt = 1000
    """Adam steps on the pixels of each batch."""
    reconstruction_rate: PositiveFloat = 0.07
    """Learning rate on the pixels, in the network's input units."""
    reconstruction_batch: PositiveInt = 64
    """Images of one class that are made together."""
    init_mean: float = 0.15
    """Mean of the noise from which images start; the data's pixel mean, in the network's input units."""
    init_std: Annotated[float, Field(ge=0)] = 0.1
    """Deviation of that noise."""
    pixel_range: tuple[float, float] | None = None
    """Bounds to which pixels are clamped after every step; None leaves them free, as the paper does."""
    dropout_masks: bool = False
    """Hold one dropout mask per layer and batch, for teachers trained with dropout."""
    epochs: NonNegativeInt = 30
    """Epochs of the distillation."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate of the student (Adam); 1e-5 for the paper's fully connected nets."""
    batch_size: PositiveInt = 64
    """Images per step of the distillation."""

    def check(self, session: Session) -> None:
        super().check(session)
        check_trained(self.teacher)
        task = session.task
        if task.kind != "classification" or task.num_classes is None or not isinstance(task.example_input, Tensor):
            raise ConfigurationError(f"data-free-kd needs images and classes, but task '{task.name}' has other data")
        if self.record is not None:
            if not Path(self.record).is_file():
                raise FileFormatError(f"there is no activation record {self.record}; give a file or leave record out")
            if (classes := ActivationRecord.load(self.record).classes) != task.num_classes:
                raise DataError(
                    f"{self.record} records {classes} classes, but task '{task.name}' has {task.num_classes}"
                )
        elif task.train is None:
            raise DataError(
                f"data-free-kd needs a record, as task '{task.name}' has no training data; write record: FILE"
            )
        if self.pixel_range is not None and self.pixel_range[0] >= self.pixel_range[1]:
            raise ConfigurationError(f"pixel_range is {self.pixel_range}, expected (low, high) with low < high")

    def apply(self, session: Session) -> None:
        teacher = teacher_network(session, self.teacher)
        session.model = student_network(session, self.student)
        cache = session.directory / f"images-{session.runs + 1:03d}.safetensors" if session.directory else None
        if cache is not None and cache.is_file():
            state = load_state(cache)
            images, facts = Images(*state["images"]), state["facts"]
        else:
            record = self._record(session, teacher)
            images = self._reconstruct(session, teacher, record)
            facts = {
                "record_bytes": record.bytes,
                "data_bytes": record.data_bytes,
                "images": len(images.inputs),
                "reconstruction_loss": list(images.losses),
                "temperature": record.temperature,
            }
            if cache is not None:
                save_state(cache, {"images": tuple(images), "facts": facts})
        session.report(**facts)
        session.train(
            epochs=self.epochs,
            task=synthetic_task(session.task, images, facts["temperature"]),
            optimizer="adam",
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=0.0,
            schedule="constant",
        )

    def _record(self, session: Session, teacher: nn.Module) -> ActivationRecord:
        if self.record is not None:
            return ActivationRecord.load(self.record)
        assert session.task.train is not None
        sweeps = 2 if self.scope.startswith("spectral") else 1
        total = sweeps * session.task.train.number_of_batches(256)
        with session.progress.task("recording activations", total) as bar:
            return record_activations(
                teacher,
                session.task,
                self.scope,
                covariance=self.covariance,
                keep=self.keep,
                temperature=self.temperature,
                device=session.device,
                advance=lambda: bar.advance(),
            )

    def _reconstruct(self, session: Session, teacher: nn.Module, record: ActivationRecord) -> Images:
        batches = -(-self.images_per_class // self.reconstruction_batch) * record.classes
        with session.progress.task("making images", batches * self.steps) as bar:
            return reconstruct(
                teacher,
                record,
                session.example_input,
                self.images_per_class,
                steps=self.steps,
                learning_rate=self.reconstruction_rate,
                init_mean=self.init_mean,
                init_std=self.init_std,
                batch_size=self.reconstruction_batch,
                dropout_masks=self.dropout_masks,
                pixel_range=self.pixel_range,
                seed=session.seed,
                forward=session.task.outputs,
                advance=lambda: bar.advance(),
            )


def _check_fits(record: ActivationRecord, responses: list[Tensor]) -> None:
    for block, response in zip(record.blocks, responses):
        if response.shape[1] != block.mean.shape[1]:
            name = block.layers[0] or "logits"
            raise DataError(
                f"the record holds {block.mean.shape[1]} values for '{name}', the teacher has {response.shape[1]}; "
                "give the network that was recorded"
            )
