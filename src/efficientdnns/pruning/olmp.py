"""OLMP: a derivative-free search finds the pruning threshold of every layer, again and again while the network trains.

Pruned weights go on being trained behind the mask and may come back; weights and biases are pruned alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from accelerate.utils import broadcast
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.data.split import Batch, generator
from efficientdnns.errors import ConfigurationError, DataError
from efficientdnns.method import Paper, TrainingMethod
from efficientdnns.parts.budgets import limits_of, require_reachable
from efficientdnns.parts.negatively_correlated_search import NegativelyCorrelatedSearch, RandomSearch
from efficientdnns.parts.select import largest_mask, without
from efficientdnns.parts.sparse_budgets import kept_weights, trim
from efficientdnns.training import Callback, Trainer
from efficientdnns.training.sparsity import apply_masks
from efficientdnns.training.trainer import to_device

if TYPE_CHECKING:
    from efficientdnns.session import Session

START = 1e-3
"""Threshold scale c before the first search."""
INFEASIBLE = 1.1
"""Fitness of thresholds that lose too much; above that of any feasible ones."""


def layer_statistics(tensors: Sequence[Tensor]) -> tuple[float, float]:
    r""":math:`\mu = \overline{|w|}` and :math:`\sigma = \sqrt{\overline{w^2} - \mu^2}` over all entries together."""
    pooled = torch.cat([tensor.detach().flatten() for tensor in tensors]).double()
    mean = pooled.abs().mean()
    return float(mean), float((pooled.square().mean() - mean.square()).clamp(min=0).sqrt())


def update_mask(mask: Tensor, weight: Tensor, threshold: float, hysteresis: tuple[float, float] = (0.9, 1.1)) -> Tensor:
    """The mask after pruning at ``threshold`` a: 0 where |w| <= 0.9 a, 1 where |w| > 1.1 a, as it was in between."""
    size, (low, high) = weight.abs(), hysteresis
    return ((size > high * threshold) | mask) & (size > low * threshold)


def search_thresholds(
    evaluate: Callable[[Tensor], tuple[float, float]],
    start: Tensor,
    delta: float,
    *,
    step_size: float,
    bound: float,
    population: int = 10,
    evaluations: int = 1600,
    random: torch.Generator | None = None,
    search: Literal["ncs", "random"] = "ncs",
) -> tuple[Tensor, float]:
    r""":math:`\min_c R(c)` subject to :math:`score(c) \geq score(c_0) - \delta`, by negatively correlated search.

    Args:
        evaluate: thresholds c, (layers,), to (R, score): the share of parameters that stays, and a score to be kept up.
            It must leave no trace.
        start: :math:`c_0`.
        delta: loss of score that is allowed.
        step_size: initial step of the search.
        bound: upper bound of c; the lower one is 0.
        population: candidates per generation.
        evaluations: candidates in all.
        random: source of randomness.
        search: "random" tries points of the whole box instead.

    Returns:
        The best feasible c seen and its R; ``start`` where nothing better is feasible.
    """
    remaining, score = evaluate(start)
    generations = max(1, evaluations // population)
    common: dict[str, Any] = {"bounds": (0.0, bound), "population": population, "generator": random}
    if search == "random":
        searcher: NegativelyCorrelatedSearch | RandomSearch = RandomSearch(start, remaining, **common)
    else:
        searcher = NegativelyCorrelatedSearch(start, remaining, step_size, generations=generations, **common)
    for _ in range(generations):
        results = [evaluate(candidate) for candidate in searcher.ask()]
        searcher.tell([share if got >= score - delta else INFEASIBLE for share, got in results])
    return searcher.best, searcher.best_fitness


class OLMP(TrainingMethod):
    r"""Optimization based layer-wise magnitude pruning, `Li et al., 2018 <https://www.ijcai.org/proceedings/2018/330>`_.

    Layer l has the mask T and the threshold :math:`a_l = \mu_l + c_l \sigma_l`, with :math:`\mu_l` the mean and
    :math:`\sigma_l` the deviation of the magnitudes of its initial weights and biases:

    .. math:: T \leftarrow 0 \text{ if } |w| \leq 0.9\, a_l, \qquad T \leftarrow 1 \text{ if } |w| > 1.1\, a_l

    and unchanged in between. The network computes with w T; the gradient moves all w, so that a pruned weight can
    grow and come back. Every ``search_every`` steps the c of the active layers are searched on the current batch:

    .. math:: \min_c R(c) \quad \text{subject to} \quad acc(M(c)) \geq acc(M(c_{now})) - \delta

    with R the share of weights and biases left and negatively correlated search as optimizer. At step t a layer is
    active with probability :math:`1/(1 + \gamma t)`; active layers apply their thresholds at every step, and a search
    takes at least two of them. After ``prune_share`` of the run the masks are fixed; under a budget all thresholds are
    multiplied then by the one factor that leaves what the budget allows. The score is the task's metric as
    a mean over samples (accuracy as a share), so delta = 0.05 allows five points of accuracy.

    Deviations:
        The search replaces parents as Tang et al. describe it; in the released code the acceptance test is never true,
        and the search only samples around its start. Masks are restored between candidates, so that their order does
        not matter. ``samples`` searches on calibration data instead of one batch. Phases are shares of the run.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="olmp",
        title="Optimization based Layer-wise Magnitude-based Pruning for DNN Compression",
        authors="Guiying Li, Chao Qian, Chunhui Jiang, Xiaofen Lu, Ke Tang",
        venue="IJCAI",
        year=2018,
        url="https://www.ijcai.org/proceedings/2018/330",
    )
    kind: ClassVar[str] = "pruning"
    budgets: ClassVar[frozenset[str]] = frozenset({"params", "bytes"})
    contract_fields: ClassVar[dict[str, Any]] = {
        "epochs": 3, "search_every": 4, "evaluations": 60, "learning_rate": 0.01
    }  # fmt: skip

    epochs: NonNegativeInt = 32
    """Epochs of the run (the paper's 30,000 steps of 64 images of MNIST)."""
    delta: NonNegativeFloat = 0.05
    """Loss of the mean score that one search may cost; 0.05 for LeNet-5, 0.08 for LeNet-300-100 and AlexNet."""
    search_every: PositiveInt = 1000
    """Steps between searches."""
    prune_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the run during which masks change."""
    search: Literal["ncs", "random"] = "ncs"
    """Negatively correlated search, or uniform random search of the box of thresholds as a control."""
    evaluations: PositiveInt = 1600
    """Candidates that one search tries."""
    population: Annotated[int, Field(ge=2)] = 10
    """Candidates per generation."""
    bound: PositiveFloat = 20.0
    """Largest c; 20 for LeNet-5, 10 for the others."""
    step_size: PositiveFloat = 5.0
    """Initial step of a search in units of c."""
    step_drop: Annotated[float, Field(ge=0, le=1)] = 2 / 3
    """Share of the pruning phase after which the initial step is ten times smaller; 1 for LeNet-300-100."""
    hysteresis: tuple[PositiveFloat, PositiveFloat] = (0.9, 1.1)
    """Factors on the threshold for pruning and for coming back."""
    gamma_convolution: NonNegativeFloat = 2e-5
    """Decay of the activity of convolutions with the step."""
    gamma_linear: NonNegativeFloat = 2e-4
    """Decay of the activity of linear and recurrent layers with the step."""
    skip: tuple[str, ...] = ()
    """Layers to leave alone, by name pattern such as ``fc3`` or ``layer1.*``."""
    samples: PositiveInt | None = None
    """Search on this many calibration samples; None: on the batch at hand."""

    def check(self, session: Session) -> None:
        super().check(session)
        if self.hysteresis[0] > self.hysteresis[1]:
            raise ConfigurationError(f"{self.name}: hysteresis is {list(self.hysteresis)}, expected low <= high")
        if self.samples is not None and session.task.calibration is None:
            raise DataError(f"{self.name}: samples needs a calibration split, but task '{session.task.name}' has none")
        if not self.layers(session.model):
            raise ConfigurationError(f"{self.name}: {type(session.model).__name__} has no layer to prune")

    def check_network(self, session: Session) -> None:
        if limits_of(session, self):
            names = [names for _, names in self.layers(session.model).values()]
            whole = {name: session.model.get_parameter(name).detach() for layer in names for name in layer}
            order = relative_sizes(whole, names, [1.0] * len(names))
            require_reachable(session, self, lambda: _masked(session.model, whole, order, len(names)))

    def layers(self, model: nn.Module) -> dict[str, tuple[nn.Module, list[str]]]:
        """The layers that are pruned and the names of their parameters."""
        return without(_layers(model), self.skip, f"{self.name}: skip")

    def callback(self, session: Session) -> Callback:
        return Surgery(self, session)


def _layers(model: nn.Module) -> dict[str, tuple[nn.Module, list[str]]]:
    """Layers with weights and the names of their parameters, weights and biases alike."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: (m, [f"{name}.{p}" if name else p for p, _ in m.named_parameters()]) for name, m in found.items()}


def relative_sizes(
    whole: Mapping[str, Tensor], layers: Sequence[Sequence[str]], thresholds: Sequence[float]
) -> dict[str, Tensor]:
    """Magnitudes over the threshold of their layer; that of the largest weight of each layer is infinite."""
    sizes: dict[str, Tensor] = {}
    for names, threshold in zip(layers, thresholds):
        for name in names:
            sizes[name] = whole[name].abs() / max(threshold, 1e-30)
        largest = max(names, key=lambda name: float(sizes[name].max()))
        sizes[largest][torch.unravel_index(sizes[largest].argmax(), sizes[largest].shape)] = torch.inf
    return sizes


def largest_masks(sizes: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
    """Masks of the ``kept`` largest entries of all tensors together."""
    chosen = largest_mask(torch.cat([size.flatten() for size in sizes.values()]), kept)
    parts = chosen.split([size.numel() for size in sizes.values()])
    return {name: part.view_as(size) for (name, size), part in zip(sizes.items(), parts)}


@torch.no_grad()
def _masked(model: nn.Module, whole: Mapping[str, Tensor], sizes: Mapping[str, Tensor], kept: int) -> nn.Module:
    model = copy.deepcopy(model)
    for name, mask in largest_masks(sizes, kept).items():
        model.get_parameter(name).copy_(torch.where(mask, whole[name], 0.0))
    return model


class Surgery(Callback):
    """The run. The model holds w T but for the optimizer's step, which moves the whole w."""

    def __init__(self, method: OLMP, session: Session) -> None:
        self.method, self.session = method, session
        self.whole: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.searches: list[dict[str, Any]] = []
        self.budget_met = not limits_of(session, method)

    def setup(self, trainer: Trainer) -> None:
        layers = self.method.layers(trainer.model)
        self.layers = {name: parameters for name, (_, parameters) in layers.items()}
        self.names = list(self.layers.values())
        self.parameters = {n: trainer.model.get_parameter(n) for names in self.names for n in names}
        self.masked = {name: parameter.data for name, parameter in self.parameters.items()}
        self.whole = {name: value.clone() for name, value in self.masked.items()}
        self.masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in self.whole.items()}
        self.statistics = [layer_statistics([self.whole[n] for n in names]) for names in self.names]
        self.scales = torch.full((len(layers),), START, dtype=torch.float64)
        convolution = [isinstance(module, nn.modules.conv._ConvNd) for module, _ in layers.values()]
        m = self.method
        self.gammas = torch.tensor([m.gamma_convolution if is_one else m.gamma_linear for is_one in convolution])
        self.last_step = round(m.prune_share * trainer.total_steps)

    def batch(self, trainer: Trainer, batch: Batch) -> Batch:
        if trainer.step < self.last_step and trainer.step % self.method.search_every == 0:
            active = self._active(trainer.step)
            if int(active.sum()) > 1:
                self._search(trainer, batch, active)
            self._prune(active)
        if trainer.step >= self.last_step:
            self._meet_budget(trainer)
        return batch

    def _meet_budget(self, trainer: Trainer) -> None:
        """Once, when the masks are about to be fixed: one factor on all thresholds leaves what the budget allows."""
        if self.budget_met:
            return
        thresholds = [mean + float(c) * deviation for (mean, deviation), c in zip(self.statistics, self.scales)]
        sizes = relative_sizes(self.whole, self.names, thresholds)
        build = partial(_masked, trainer.model, self.whole, sizes)
        total = sum(size.numel() for size in sizes.values())
        kept = kept_weights(self.session, self.method, build, len(self.names), total)
        self.masks = largest_masks(sizes, kept)
        self._show(self.masks)
        self.budget_met = True

    def after_backward(self, trainer: Trainer) -> None:
        # The gradient of the masked network moves the whole weights. Swapping storage spares two copies a step.
        if trainer.step < self.last_step:
            for name, parameter in self.parameters.items():
                parameter.data = self.whole[name]

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step < self.last_step:
            for name, parameter in self.parameters.items():
                parameter.data = self.masked[name]
            self._prune(self._active(trainer.step))
        else:
            apply_masks(trainer.model, self.masks)

    def finish(self, trainer: Trainer) -> None:
        self._meet_budget(trainer)
        if trim(self.session, self.method, trainer.model, self.masks):
            self.masks = {name: trainer.model.get_parameter(name) != 0 for name in self.masks}
        self.session.sparse.update(self.masks)
        kept = {name: sum(int(self.masks[n].sum()) for n in names) for name, names in self.layers.items()}
        sizes = {name: sum(self.masks[n].numel() for n in names) for name, names in self.layers.items()}
        self.session.report(
            kept={name: [kept[name], sizes[name]] for name in kept},
            ratio=sum(sizes.values()) / max(1, sum(kept.values())),
            searches=self.searches,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "whole": self.whole, "masks": self.masks, "scales": self.scales,
            "statistics": self.statistics, "searches": self.searches, "budget_met": self.budget_met,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.session.device
        self.whole = {name: value.to(device) for name, value in state["whole"].items()}
        self.masks = {name: value.to(device) for name, value in state["masks"].items()}
        self.scales, self.statistics, self.searches = state["scales"], state["statistics"], state["searches"]
        self.budget_met = state["budget_met"]

    def _active(self, step: int) -> Tensor:
        return torch.rand(len(self.gammas)) < 1 / (1 + self.gammas * step)

    def _prune(self, active: Tensor) -> None:
        self.masks |= self._masks(self.scales, active)
        self._show(self.masks)

    def _masks(self, scales: Tensor, active: Tensor) -> dict[str, Tensor]:
        """New masks of the active layers at these c; the present ones are left as they are."""
        masks = {}
        for layer in active.nonzero().flatten().tolist():
            mean, deviation = self.statistics[layer]
            threshold = max(mean + float(scales[layer]) * deviation, 0.0)
            for name in self.names[layer]:
                masks[name] = update_mask(self.masks[name], self.whole[name], threshold, self.method.hysteresis)
        return masks

    @torch.no_grad()
    def _show(self, masks: dict[str, Tensor]) -> None:
        """Put w T into the model."""
        for name, mask in masks.items():
            whole = self.whole[name]
            torch.where(mask, whole, whole.new_zeros(()), out=self.masked[name])

    def _search(self, trainer: Trainer, batch: Batch, active: Tensor) -> None:
        method, task = self.method, trainer.task
        data = [batch] if method.samples is None else list(self._calibration(trainer))
        total = sum(mask.numel() for mask in self.masks.values())
        fixed = sum(int(self.masks[n].sum()) for layer, on in zip(self.names, active) if not on for n in layer)
        sign = 1.0 if task.metric.higher_is_better else -1.0

        def evaluate(chosen: Tensor) -> tuple[float, float]:
            masks = self._masks(self.scales.masked_scatter(active, chosen.double()), active)
            self._show(masks)
            parts = [task.metric.function(task.outputs(trainer.model, b.inputs), b.targets) for b in data]
            score = sum(float(value) for value, _ in parts) / sum(count for _, count in parts)
            return (fixed + sum(int(mask.sum()) for mask in masks.values())) / total, sign * score

        drop = trainer.step >= method.step_drop * self.last_step
        with self._undisturbed(trainer):
            best, share = search_thresholds(
                evaluate,
                self.scales[active],
                method.delta,
                step_size=method.step_size / (10 if drop else 1),
                bound=method.bound,
                population=method.population,
                evaluations=method.evaluations,
                random=generator(trainer.seed, trainer.step),
                search=method.search,
            )
        # Every process has searched on its own share of the batch; the first one's thresholds hold.
        best = broadcast(best.to(trainer.device)).cpu()
        self.scales = self.scales.masked_scatter(active, best)
        self.searches.append({"step": trainer.step, "scales": self.scales.tolist(), "remaining": share})
        self.session.say(f"search at step {trainer.step}: {100 * share:.2f} % of the parameters left")

    @contextmanager
    def _undisturbed(self, trainer: Trainer) -> Iterator[None]:
        """Evaluation mode without gradients; afterwards modes and weights are as before."""
        modes = [(module, module.training) for module in trainer.model.modules()]
        trainer.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            self._show(self.masks)

    def _calibration(self, trainer: Trainer) -> Iterator[Batch]:
        split, left = trainer.task.calibration, self.method.samples or 0
        assert split is not None
        for batch in split.batches(min(left, 512)):
            if left > 0:
                assert batch.targets is not None
                left -= len(batch.targets)
                yield to_device(batch, trainer.device)
