"""Joint sparsity: one network that is sparse in the spatial domain and, once transformed, in the Winograd domain.

The smallest weights of both domains are pulled to zero with strengths that are learned; what stays is quantized and coded.
"""

from __future__ import annotations

import bz2
import copy
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.coding import weights_size
from efficientdnns.coding.deep_compression import CentroidTraining, SharedWeight
from efficientdnns.coding.dither import DitheredCodec, dither, quantize_uniform
from efficientdnns.measurement.macs import count_macs
from efficientdnns.method import Paper, Ratio, TrainingMethod
from efficientdnns.parts.sparse_budgets import trim
from efficientdnns.parts.weight_pruning import WeightOptions, masks_of
from efficientdnns.parts.winograd import WinogradConv2d, has_winograd_form, winograd_transform
from efficientdnns.session import Session
from efficientdnns.surgery import replace_module
from efficientdnns.training import Callback, Trainer
from efficientdnns.training.sparsity import apply_masks


def smallest_threshold(values: Iterable[Tensor], share: float) -> float:
    """The round(s N)-th smallest magnitude of all values together; -1, below everything, where that is none."""
    flat = torch.cat([value.detach().abs().flatten() for value in values])
    count = round(share * flat.numel())
    return float(flat.kthvalue(count).values) if count else -1.0


def partial_l2(values: Iterable[Tensor], threshold: float) -> Tensor:
    r""":math:`\frac{1}{N} \sum w^2 \, \mathbf 1[|w| \le \theta]`, the indicator taken for a constant."""
    values = list(values)
    size = sum(value.numel() for value in values)
    squares = [torch.where(value.detach().abs() <= threshold, value, 0.0).square().sum() for value in values]
    return torch.stack(squares).sum() / size


def weighted(penalty: Tensor, zeta: Tensor, alpha: float) -> Tensor:
    r""":math:`e^\zeta R - \alpha \zeta`; in zeta it is smallest at :math:`\ln(\alpha / R)`."""
    return zeta.exp() * penalty - alpha * zeta


class QuantizedWeight(SharedWeight):
    r"""A weight on a uniform grid of its own step, whose levels can be trained; zeros stay zeros.

    A weight that stays but falls into the middle cell keeps a level of its own, :math:`\pm \Delta / 4`, so that the number
    of weights is what was pruned to; with dither it decodes to minus its dither.
    """

    def __init__(self, weight: nn.Parameter, levels: int, seed: int | None = None) -> None:
        values = weight.detach()
        self.step, self.seed = float(2 * values.abs().max().clamp_min(1e-12) / levels), seed
        noise = None if seed is None else dither(values.numel(), self.step, seed).view_as(values).to(values)
        halves = 2 * quantize_uniform(values, self.step, noise)
        if noise is None:
            halves = torch.where(halves == 0, values.sign().long(), halves)
        kept, assignments = halves[values != 0].unique(return_inverse=True)
        centroids = torch.where(kept % 2 == 0, kept * (self.step / 2), kept * (self.step / 4)).to(values)
        super().__init__(weight, centroids, assignments)
        self.noise = noise
        self.members = self.index.flatten().bincount(minlength=len(kept) + 1)[1:].clamp_min(1)

    def dense(self) -> Tensor:
        values = super().dense()
        return values if self.noise is None else torch.where(self.index > 0, values - self.noise, values)

    def gradient(self, dense: Tensor) -> Tensor:
        """Mean of a dense gradient over the members of each level."""
        return super().gradient(dense) / self.members

    def codecs(self) -> tuple[Any, ...]:
        """Candidates for the file."""
        if self.seed is None:
            return ("codebook", "sparse")
        return (DitheredCodec(self.step, self.seed, tuple(self.centroids.detach().tolist())), "codebook", "sparse")


class JointSparsity(WeightOptions, TrainingMethod):
    r"""Joint sparsity, `Choi et al., 2018 <https://arxiv.org/abs/1805.08303>`_.

    1. *Train* on the task's loss E with two partial L2 regularisers, of the share s of weights that is smallest in the
       spatial domain and in the Winograd domain (of stride-1 convolutions), and learned coefficients:

       .. math::
           C = E + e^{\zeta_W} R_W + e^{\zeta_S} R_S - \alpha (\zeta_W + \zeta_S), \qquad
           R_S = \tfrac{1}{N_S} \sum \| w \odot \mathbf 1[|w| \le \theta_S] \|^2, \quad
           R_W = \tfrac{1}{N_W} \sum \| G w G^T \odot \mathbf 1[|G w G^T| \le \theta_W] \|^2

       In equilibrium :math:`e^\zeta = \alpha / R`: the smaller the small weights, the harder they are pulled.
    2. *Prune* spatially, *quantize* the rest uniformly with ``levels`` a layer (with ``dither`` after adding repeatable
       noise), and *train the levels*, with the mean gradient of their members.
    3. *Deploy* the file either way: spatially, or as Winograd convolutions whose transformed weights up to
       :math:`\theta_W` are zero (``deploy="winograd"``, `WinogradConv2d`). The report has the metric on the calibration
       split and the sparsity and multiplications of both. `sparse-execution` as the next step skips the zeros of either
       domain where that is faster.

    Deviations:
        The coefficients start in equilibrium, which from the paper's start takes thousands of steps to reach. Thresholds
        are solved anew every ``refresh`` steps. The step of the quantizer is that of each layer. Symbols are coded by this
        library's entropy coder, the report has the bytes of bzip2 beside it. The levels are trained on the task's loss
        alone. Regularised training is short, and therefore with a larger learning rate than the paper's 1e-5 and with
        alpha = 2 in place of 0.1, which left the small weights too large to be cut in a few hundred steps. Adam is needed:
        plain gradient steps on :math:`e^\zeta R` diverge once zeta is large.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="joint-sparsity",
        title="Compression of Deep Convolutional Neural Networks under Joint Sparsity Constraints",
        authors="Yoojin Choi, Mostafa El-Khamy, Jungwon Lee",
        venue="arXiv",
        year=2018,
        url="https://arxiv.org/abs/1805.08303",
    )
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 1, "codebook_epochs": 1, "sparsity": 0.7, "refresh": 4}

    sparsity: Ratio = 0.8
    """Share s of spatial weights that is regularised, then removed; solved for when the run has a budget."""
    winograd_sparsity: Ratio | None = None
    """Share of the transformed weights; None takes that of the spatial ones."""
    scope: Literal["layer", "global"] = "global"
    """One spatial sparsity for every layer when it is pruned, or one threshold for all weights."""
    domains: Literal["joint", "spatial", "winograd"] = "joint"
    """Where small weights are regularised; pruning is spatial in any case."""
    tile: Annotated[int, Field(ge=2, le=4)] = 2
    """Outputs m of a Winograd tile in each direction; larger ones save more and amplify rounding."""
    alpha: PositiveFloat = 2.0
    """How much the coefficients are worth."""
    learned: bool = True
    """Learn the coefficients; else zeta stays at ``zeta``."""
    zeta: float | None = None
    """Coefficients at the start, as logarithms; None starts in equilibrium, at ln(alpha / R) of the network."""
    zeta_learning_rate: PositiveFloat = 0.05
    """Peak learning rate of the coefficients."""
    refresh: PositiveInt = 10
    """Steps between solving for the thresholds."""
    optimizer: Literal["sgd", "nesterov", "adam", "adamw", "rmsprop"] | None = "adam"
    """Optimizer of the run."""
    learning_rate: PositiveFloat | None = 1e-3
    """Peak learning rate."""
    levels: Annotated[int, Field(ge=2, le=256)] | None = 16
    """Cells of the quantizer between the largest weight and its negative; None leaves floats."""
    dither: bool = False
    """Add repeatable noise before rounding and subtract it after."""
    codebook_epochs: NonNegativeInt = 2
    """Epochs in which the levels are trained, with a tenth of the learning rate."""
    deploy: Literal["spatial", "winograd"] = "spatial"
    """How the convolutions of the result compute."""

    @property
    def shares(self) -> dict[str, float]:
        """The regularised share of each domain."""
        winograd = self.sparsity if self.winograd_sparsity is None else self.winograd_sparsity
        both = {"spatial": self.sparsity, "winograd": winograd}
        return both if self.domains == "joint" else {self.domains: both[self.domains]}

    @torch.no_grad()
    def pruned(self, model: nn.Module, count: int) -> nn.Module:
        model = super().pruned(model, count)
        for name, book in self.quantized(model, 0).items():
            model.get_parameter(name).copy_(book.dense())
        return model

    def quantized(self, model: nn.Module, seed: int) -> dict[str, QuantizedWeight]:
        """The levels of every layer that has weights left."""
        if self.levels is None:
            return {}
        left = {name: weight for name, weight in self.weights(model).items() if weight.count_nonzero()}
        seeds = [1000 * seed + number if self.dither else None for number in range(len(left))]
        return {name: QuantizedWeight(w, self.levels, s) for (name, w), s in zip(left.items(), seeds)}

    def callback(self, session: Session) -> Callback:
        return JointPenalty(self, session)

    def convolutions(self, model: nn.Module) -> dict[str, nn.Conv2d]:
        """The convolutions with a Winograd form that are not skipped, by name."""
        names = [parameter.rpartition(".")[0] for parameter in self.weights(model)]
        layers = {name: model.get_submodule(name) for name in names}
        return {n: layer for n, layer in layers.items() if isinstance(layer, nn.Conv2d) and has_winograd_form(layer)}

    def afterwards(self, session: Session) -> None:
        """Quantize, train the levels, and say what both deployments are worth."""
        scored = session.task.calibration is not None and session.task.has_labels
        accuracy = {"pruned": session.evaluate()} if scored else {}
        books = self.quantized(session.model, session.seed)
        if books:
            rate = (self.learning_rate or session.settings.learning_rate) / 10
            options: dict[str, Any] = {"optimizer": self.optimizer} if self.optimizer else {}
            training = CentroidTraining(books)
            session.train([training], epochs=self.codebook_epochs, learning_rate=rate, weight_decay=0.0, **options)
            session.codecs |= {name: book.codecs() for name, book in books.items()}
        trim(session, self, session.model, self.weights(session.model))
        transformed = self.winograd(session.model)
        if scored:
            accuracy |= {"spatial": session.evaluate(), "winograd": session.evaluate(transformed)}
        finding = {"accuracy": accuracy} | deployments(session.model, transformed, session)
        if self.deploy == "winograd":
            session.model = transformed
        state = {name: value.detach().cpu() for name, value in session.model.state_dict().items()}
        finding["bytes"] = {"file": weights_size(state, session.codecs)}
        if books:
            symbols = torch.cat([book.index.flatten() for book in books.values()]).to(torch.int16).cpu()
            narrow = symbols.to(torch.uint8) if symbols.max() < 256 else symbols
            finding["bytes"]["bzip2"] = len(bz2.compress(narrow.numpy().tobytes()))
        session.report(**finding)

    @torch.no_grad()
    def winograd(self, model: nn.Module) -> nn.Module:
        """A copy whose convolutions are Winograd ones, pruned there to the wanted share with one threshold."""
        model = copy.deepcopy(model)
        layers = self.convolutions(model)
        if layers:
            share = self.sparsity if self.winograd_sparsity is None else self.winograd_sparsity
            transformed = [winograd_transform(layer.weight, self.tile) for layer in layers.values()]
            threshold = max(0.0, smallest_threshold(transformed, share))
            for name, layer in layers.items():
                replace_module(model, name, WinogradConv2d.of(layer, self.tile, threshold))
        return model


class JointPenalty(Callback):
    """The regularised run, with spatial pruning at its end."""

    def __init__(self, method: JointSparsity, session: Session) -> None:
        self.method, self.session = method, session
        self.shares = method.shares
        self.thresholds: dict[str, float] = {}
        self.zetas: dict[str, nn.Parameter] = {}

    def setup(self, trainer: Trainer) -> None:
        self.names = list(self.method.weights(trainer.model))
        self.kept = self.method.kept(self.session)
        sizes = {name: trainer.model.get_parameter(name).numel() for name in self.names}
        if "spatial" in self.shares:
            self.shares["spatial"] = 1 - sum(self.kept.values()) / sum(sizes.values())
        self.layers = list(self.method.convolutions(trainer.model))
        if not self.layers:
            self.shares.pop("winograd", None)
        self.zetas = {domain: nn.Parameter(self._start(trainer, domain)) for domain in self.shares}

    @torch.no_grad()
    def _start(self, trainer: Trainer, domain: str) -> Tensor:
        values = self.weights_of(trainer, domain)
        penalty = partial_l2(values, smallest_threshold(values, self.shares[domain]))
        if self.method.zeta is not None or penalty <= 0:
            return torch.full_like(penalty, self.method.zeta or 0.0)
        return (self.method.alpha / penalty).log()

    def parameter_groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        if not (self.method.learned and self.zetas):
            return []
        return [{"params": list(self.zetas.values()), "lr": self.method.zeta_learning_rate, "weight_decay": 0.0}]

    def weights_of(self, trainer: Trainer, domain: str) -> list[Tensor]:
        """All weights of a domain."""
        if domain == "spatial":
            return [trainer.model.get_parameter(name) for name in self.names]
        weights = [trainer.model.get_parameter(f"{name}.weight") for name in self.layers]
        return [winograd_transform(weight, self.method.tile) for weight in weights]

    def penalty(self, trainer: Trainer) -> Tensor | None:
        total = None
        for domain, share in self.shares.items():
            values = self.weights_of(trainer, domain)
            if trainer.step % self.method.refresh == 0 or domain not in self.thresholds:
                self.thresholds[domain] = smallest_threshold(values, share)
            term = weighted(partial_l2(values, self.thresholds[domain]), self.zetas[domain], self.method.alpha)
            total = term if total is None else total + term
        return total

    def finish(self, trainer: Trainer) -> None:
        weights = {name: trainer.model.get_parameter(name) for name in self.names}
        scores = {name: weight.detach().abs() for name, weight in weights.items()}
        apply_masks(trainer.model, {n: m.to(weights[n].dtype) for n, m in masks_of(scores, self.kept).items()})
        self.session.sparse.update(self.names)
        self.session.report(
            zeta={domain: zeta.item() for domain, zeta in self.zetas.items()},
            kept={name: [int(weight.count_nonzero()), weight.numel()] for name, weight in weights.items()},
        )

    def state_dict(self) -> dict[str, Any]:
        zetas = {domain: zeta.detach() for domain, zeta in self.zetas.items()}
        return {"zetas": zetas, "thresholds": self.thresholds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.thresholds = dict(state["thresholds"])
        for domain, zeta in state["zetas"].items():
            self.zetas[domain].data.copy_(zeta)


def deployments(spatial: nn.Module, winograd: nn.Module, session: Session) -> dict[str, Any]:
    """Sparsity of the convolutions, and multiplications of one sample that are not by zero, in both domains.

    Cropped tiles are left out: a Winograd tile counts as m^2 outputs.
    """
    macs = count_macs(spatial, session.example_input, session.task.outputs).by_module
    total = {"dense": 0.0, "spatial": 0.0, "winograd": 0.0}
    zeros: Mapping[str, list[int]] = {"spatial": [0, 0], "winograd": [0, 0]}
    for name, count in macs.items():
        weights = [p for p in spatial.get_submodule(name).parameters(recurse=False) if p.dim() > 1]
        size = sum(p.numel() for p in weights)
        sparse = count * sum(int(p.count_nonzero()) for p in weights) / size if size else float(count)
        total["dense"] += count
        total["spatial"] += sparse
        layer = winograd.get_submodule(name)
        if isinstance(layer, WinogradConv2d):
            u = layer.transformed().detach()
            total["winograd"] += count / size * int(u.count_nonzero()) / layer.m**2
            for domain, value in (("spatial", weights[0]), ("winograd", u)):
                zeros[domain][0] += value.numel() - int(value.count_nonzero())
                zeros[domain][1] += value.numel()
        else:
            total["winograd"] += sparse
    return {
        "sparsity": {domain: found / of for domain, (found, of) in zeros.items() if of},
        "multiplications": {domain: round(value) for domain, value in total.items()},
    }
