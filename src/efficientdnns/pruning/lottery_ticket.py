"""Lottery tickets: train, prune the smallest weights, put the rest back to what they were early on, and train again.

The sparse network found that way trains to the accuracy of the dense one, where the same mask with other initial weights does
not; for deep networks "early on" must be late enough that two runs from there end in the same valley.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from efficientdnns.method import Need, Paper, Ratio
from efficientdnns.parts.budgets import limits_of
from efficientdnns.parts.criteria import weight_scores
from efficientdnns.parts.reinitialise import reinitialised
from efficientdnns.parts.select import by_pattern, largest_mask
from efficientdnns.parts.sparse_budgets import trim
from efficientdnns.parts.weight_pruning import EVERYTHING, WeightOptions, masks_of, share_evenly
from efficientdnns.session import Session
from efficientdnns.training.sparsity import MaskedTraining, apply_masks

Masks = dict[str, Tensor]
Control = Literal["reinitialised", "random-mask"]


def next_masks(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    fractions: Mapping[str, float],
    everywhere: bool,
    least: int = 0,
) -> Masks:
    """Masks without the smallest of the weights that are left: a share of each layer's, or of all together.

    Exactly ceil(p n) of n remaining weights go with one threshold for all (``everywhere``), round(p n) of each layer
    otherwise, but no more than leave ``least`` weights altogether.
    """
    scores = {n: torch.where(masks[n], s, -1.0) for n, s in weight_scores(weights).items()}
    left = {name: int(mask.sum()) for name, mask in masks.items()}
    total = sum(left.values())
    if everywhere:
        share = next(iter(fractions.values()))
        return masks_of(scores, {EVERYTHING: max(least, total - math.ceil(total * share))})
    going = {name: round(fractions[name] * count) for name, count in left.items()}
    allowed = max(0, total - least)
    if sum(going.values()) > allowed:
        going = share_evenly(going, allowed)
    return {name: largest_mask(score, left[name] - going[name]) for name, score in scores.items()}


def shuffled(masks: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """Masks with as many ones in each layer, in random places."""
    places = {name: torch.randperm(mask.numel(), generator=generator).to(mask.device) for name, mask in masks.items()}
    return {name: mask.flatten()[places[name]].view_as(mask) for name, mask in masks.items()}


@torch.no_grad()
def interpolated(first: nn.Module, second: nn.Module, share: float) -> nn.Module:
    """A copy of the first network with weights (1 - a) W1 + a W2; statistics of batch norms are interpolated as well."""
    model, other = copy.deepcopy(first), second.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(other[name], share)
    return model


def error_barrier(first: nn.Module, second: nn.Module, error: Callable[[nn.Module], float], points: int = 11) -> float:
    r""":math:`\max_a e((1-a) W_1 + a W_2) - (e(W_1) + e(W_2)) / 2` over ``points`` values of a from 0 to 1."""
    errors = [error(interpolated(first, second, a / (points - 1))) for a in range(points)]
    return max(errors) - (errors[0] + errors[-1]) / 2


class LotteryTicket(WeightOptions):
    r"""Iterative magnitude pruning with rewinding, `Frankle and Carbin, ICLR 2019 <https://arxiv.org/abs/1803.03635>`_.

    With :math:`\theta_k` the weights after k steps of training (k = 0: the initial ones), every level trains
    :math:`m \odot \theta_k` from step k to the end T, with the learning rates and the order of data of the first run, and
    removes the share p of the remaining weights of smallest magnitude :math:`|\theta_T|`:

    .. math:: m \leftarrow m \odot 1[|\theta_T| > t_p], \qquad \text{density after r levels} \approx (1 - p)^r

    The network handed over is the last ticket, trained. Give it an untrained network: its weights are :math:`\theta_0`.
    Late rewinding (`Frankle et al., ICML 2020 <https://arxiv.org/abs/1912.05671>`_) is ``rewind_steps``, learning-rate
    rewinding ``rewind="learning-rate"``. ``controls`` trains twins of every ``control_every``-th ticket and of the last: the
    same mask with new initial weights, or as many weights of each layer in random places. ``instability_points`` trains
    the dense network twice from :math:`\theta_k` with different orders of data and reports the error barrier between the two
    results: below 2 points the network is stable at k, and tickets can be expected.

    Accuracies in the report are those of the calibration split.

    Deviations:
        Exactly round(p n) weights of a layer go (ceil(p n) with ``scope="global"``); both official codes remove one
        more. Data augmentation draws on the global random numbers and is not repeated from level to level, the order of
        the data is. Steps taken in one level leave no trace in the optimizer of the next. Batch-norm statistics are
        interpolated with the weights.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="lottery-ticket",
        title="The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
        authors="Jonathan Frankle, Michael Carbin",
        venue="ICLR",
        year=2019,
        url="https://arxiv.org/abs/1803.03635",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"training data", "labels", "calibration data"})
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 1, "levels": 2, "controls": ("random-mask",)}

    levels: PositiveInt = 15
    """Rounds of pruning; with a budget, the most there may be."""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """p: share of the remaining weights removed in each round."""
    fractions: dict[str, Ratio] = {}
    """p of single layers by name pattern (the paper's MNIST network: 0.1 for the output layer)."""
    sparsity: Ratio = 0.0
    """Not used: ``levels`` and ``fraction`` decide how much goes, or the budget."""
    epochs: PositiveInt = 10
    """Epochs of a full training; each level repeats it from step k on."""
    rewind: Literal["weights", "learning-rate", "none"] = "weights"
    """What is put back: weights and schedule, the schedule alone, or nothing but the mask (fine-tuning at a constant rate)."""
    rewind_steps: NonNegativeInt = 0
    """k: the training step to which weights go back; 0 is the original."""
    controls: tuple[Control, ...] = ()
    """Twins that are trained beside tickets."""
    control_every: PositiveInt = 1
    """Levels between tickets that have twins."""
    instability_points: Annotated[int, Field(ge=0)] = 0
    """Points on the line between two twins of the dense network; 0 leaves the analysis out."""

    def apply(self, session: Session) -> None:
        weights = self.weights(session.model)
        least = sum(self.kept(session).values()) if limits_of(session, self) else len(weights)
        names = sorted(weights)
        own = by_pattern(self.fractions, weights, f"{self.name}: fractions")
        fractions = {name: own.get(name, self.fraction) for name in names}
        run = Tickets(self, session, names)
        masks: Masks = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in names}
        run.record(masks, run.first())
        for level in range(1, self.levels + 1):
            trained = {name: session.model.get_parameter(name).detach() for name in names}
            masks = next_masks(trained, masks, fractions, self.scope == "global", least)
            last = level == self.levels or sum(int(mask.sum()) for mask in masks.values()) <= least
            accuracy = run.ticket(masks)
            twins = self.controls if last or level % self.control_every == 0 else ()
            run.record(masks, accuracy, {control: run.twin(control, masks) for control in twins})
            if last:
                break
        trim(session, self, session.model, names)
        session.sparse.update(names)
        session.report(levels=run.levels)


class Tickets:
    """The trainings of one search, all with the order of data of the first."""

    def __init__(self, method: LotteryTicket, session: Session, names: list[str]) -> None:
        self.method, self.session, self.names = method, session, names
        self.seed = session.seed * 1000 + 500
        self.initial = copy.deepcopy(session.model)
        self.levels: list[dict[str, Any]] = []

    def first(self) -> float:
        """Train the dense network to step k, keep a copy, and on to the end."""
        method, session = self.method, self.session
        if method.rewind_steps:
            session.train(epochs=method.epochs, seed=self.seed, until=method.rewind_steps, validate=False)
        self.early = copy.deepcopy(session.model)
        if method.instability_points:
            one, other = (self.train(copy.deepcopy(self.early), {}, seed=self.seed + 1 + n)[0] for n in range(2))
            higher = session.task.metric.higher_is_better

            def error(model: nn.Module) -> float:
                return -session.evaluate(model) if higher else session.evaluate(model)

            session.report(instability=error_barrier(one, other, error, method.instability_points))
        session.model, accuracy = self.train(session.model, {})
        return accuracy

    def ticket(self, masks: Masks) -> float:
        """Rewind, and train the ticket."""
        start = self.early if self.method.rewind == "weights" else self.session.model
        self.session.model, accuracy = self.train(copy.deepcopy(start), masks)
        return accuracy

    def twin(self, control: Control, masks: Masks) -> float:
        """Train a control of the ticket."""
        seed = self.seed + 10 + len(self.levels)
        if control == "reinitialised":
            return self.train(reinitialised(self.initial, seed), masks, start=0)[1]
        return self.train(copy.deepcopy(self.early), shuffled(masks, torch.Generator().manual_seed(seed)))[1]

    def train(
        self, model: nn.Module, masks: Masks, start: int | None = None, seed: int | None = None
    ) -> tuple[nn.Module, float]:
        """Train a network from step k (or ``start``) to the end under masks; returns it with its accuracy."""
        session = self.session
        by_type = {name: mask.to(model.get_parameter(name).dtype) for name, mask in masks.items()}
        apply_masks(model, by_type)
        tuned: dict[str, Any] = {"schedule": "constant"} if self.method.rewind == "none" and self.levels else {}
        session.train(
            [MaskedTraining(by_type)],
            model=model,
            epochs=self.method.epochs,
            seed=self.seed if seed is None else seed,
            start=self.method.rewind_steps if start is None else start,
            **tuned,
        )
        return model, session.evaluate(model)

    def record(self, masks: Masks, accuracy: float, controls: Mapping[str, float] | None = None) -> None:
        """Note what came of a level."""
        size = sum(mask.numel() for mask in masks.values())
        density = sum(int(mask.sum()) for mask in masks.values()) / size
        self.levels.append({"density": density, "ticket": accuracy, **(controls or {})})
        self.session.say(f"level {len(self.levels) - 1}: density {density:.2%}, {accuracy:.2f}")
