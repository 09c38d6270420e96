"""The common course of methods that zero single weights: how many stay, masks on a schedule, and what may come back.

A method is a `WeightOptions` with a schedule; the run is `ScheduledMasks`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.errors import ConfigurationError
from efficientdnns.method import Method, Ratio
from efficientdnns.parts.budgets import limits_of, require_reachable
from efficientdnns.parts.criteria import WeightCriterion, weight_scores
from efficientdnns.parts.project import largest_in_runs
from efficientdnns.parts.select import by_pattern, largest_mask, layer_weights, without
from efficientdnns.parts.sparse_budgets import kept_weights, trim
from efficientdnns.parts.sparsity_schedule import scheduled_sparsity
from efficientdnns.training import Trainer
from efficientdnns.training.sparsity import MaskedTraining, apply_masks

if TYPE_CHECKING:
    from efficientdnns.session import Session

Regrowth = Literal["none", "soft", "gradient", "random"]
"""What may come back: nothing; whatever has grown again by the next pruning (zeroed weights go on being trained); where the
gradient is largest; anything by chance."""
Granularity = Annotated[str, Field(pattern=r"^(weights|rows|[1-9]\d*:[1-9]\d*)$")]
"""'weights', 'rows' (whole rows of a weight matrix, filters of a convolution), or 'N:M' as in '2:4'."""
EVERYTHING = ""
"""Name under which all weights together are counted."""


class WeightOptions(Method):
    """Fields of every method that zeroes single weights; with a budget in the run the sparsity is solved for."""

    kind: ClassVar[str] = "pruning"
    budgets: ClassVar[frozenset[str]] = frozenset({"params", "bytes"})

    sparsity: Ratio = 0.9
    """Share of the weights that is removed; solved for when the run has a budget."""
    sparsities: dict[str, Ratio] = {}
    """Sparsity of single layers by name pattern, in place of `sparsity`."""
    scope: Literal["layer", "global"] = "layer"
    """One sparsity for every layer, or one threshold for all weights."""
    skip: tuple[str, ...] = ()
    """Layers left alone, by name pattern such as ``fc3`` or ``layer1.*``."""

    def check(self, session: Session) -> None:
        super().check(session)
        if self.sparsities and (self.scope == "global" or limits_of(session, self)):
            why = "scope=global" if self.scope == "global" else f"budget {limits_of(session, self)[0]}"
            raise ConfigurationError(f"{self.name}: sparsities fix what {why} decides; leave one of them out")

    def check_network(self, session: Session) -> None:
        weights = self.weights(session.model)
        by_pattern(self.sparsities, weights, f"{self.name}: sparsities")
        if limits_of(session, self):
            require_reachable(session, self, lambda: self.pruned(session.model, len(weights)))

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that may be pruned, by parameter name."""
        return without(layer_weights(model), self.skip, f"{self.name}: skip")

    def kept(self, session: Session) -> dict[str, int]:
        """How many weights stay at the end: by parameter name, or of all together with ``scope="global"``."""
        sizes = {name: weight.numel() for name, weight in self.weights(session.model).items()}
        total = sum(sizes.values())
        count = total - round(self.sparsity * total)
        if limits_of(session, self):
            count = kept_weights(session, self, partial(self.pruned, session.model), len(sizes), total)
        if self.scope == "global":
            return {EVERYTHING: count}
        if limits_of(session, self):
            return share_evenly(sizes, count)
        own = by_pattern(self.sparsities, sizes, f"{self.name}: sparsities")
        return {name: size - round(own.get(name, self.sparsity) * size) for name, size in sizes.items()}

    @torch.no_grad()
    def pruned(self, model: nn.Module, count: int) -> nn.Module:
        """A copy with so many of the weights, the largest ones."""
        model = copy.deepcopy(model)
        weights = self.weights(model)
        sizes = {name: weight.numel() for name, weight in weights.items()}
        kept = {EVERYTHING: count} if self.scope == "global" else share_evenly(sizes, count)
        apply_masks(model, masks_of(weight_scores(weights), kept))
        return model


def share_evenly(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Share ``total`` kept weights out in proportion to the sizes of the layers, at least one for each; the sum is exact
    unless there are fewer weights than layers."""
    everything = sum(sizes.values())
    exact = {name: total * size / everything for name, size in sizes.items()}
    kept = {name: max(1, math.floor(value + 1e-9)) for name, value in exact.items()}
    for name in sorted(sizes, key=lambda n: kept[n] - exact[n]):
        missing = total - sum(kept.values())
        kept[name] = max(1, min(sizes[name], kept[name] + (1 if missing > 0 else min(0, missing))))
    return kept


def masks_of(scores: Mapping[str, Tensor], kept: Mapping[str, int]) -> dict[str, Tensor]:
    """Boolean masks of the highest scores: so many of every tensor, or of all together where ``kept`` counts them together."""
    if EVERYTHING not in kept:
        return {name: largest_mask(score, kept[name]) for name, score in scores.items()}
    flat = torch.cat([score.flatten() for score in scores.values()])
    chosen = largest_mask(flat, kept[EVERYTHING]).split([score.numel() for score in scores.values()])
    return {name: mask.view_as(score) for (name, score), mask in zip(scores.items(), chosen, strict=True)}


def row_masks(scores: Mapping[str, Tensor], kept: Mapping[str, int]) -> dict[str, Tensor]:
    """Masks of whole rows, those of the highest mean scores: as many as fit into the number of weights that stay.

    One row of a tensor stays in any case, or one of all together where ``kept`` counts them together.
    """
    means = {name: score.flatten(1).mean(1) for name, score in scores.items()}
    lengths = {name: score[0].numel() for name, score in scores.items()}
    if EVERYTHING not in kept:
        rows = {name: largest_mask(mean, max(1, kept[name] // lengths[name])) for name, mean in means.items()}
    else:
        costs = torch.cat([torch.full((len(mean),), lengths[name]) for name, mean in means.items()])
        flat = torch.cat([mean.cpu() for mean in means.values()])
        order = flat.sort(descending=True, stable=True).indices
        fits = (costs[order].cumsum(0) <= kept[EVERYTHING]) & (flat[order] >= 0)  # below 0 is masked already
        count = max(1, int(fits.sum()))
        chosen = torch.zeros(len(flat), dtype=torch.bool).index_fill_(0, order[:count], True)
        rows = dict(zip(means, chosen.split([len(mean) for mean in means.values()]), strict=True))
    return {
        name: rows[name].to(score.device).view(-1, *[1] * (score.dim() - 1)).expand_as(score).clone()
        for name, score in scores.items()
    }


def pattern_mask(scores: Tensor, n: int, m: int, share: float = 1.0) -> Tensor:
    """N:M mask along the input channels, in force for the ``share`` of runs that lose least; all other runs stay dense."""
    sparse = largest_in_runs(scores, n, m)
    if share >= 1:
        return sparse
    lost = (scores.clamp_min(0) * ~sparse).movedim(1, -1)
    length = lost.shape[-1]
    runs = torch.nn.functional.pad(lost, (0, -length % m)).unflatten(-1, (-1, m)).sum(-1)
    dense = ~largest_mask(-runs, round(share * runs.numel()))
    return sparse | dense.repeat_interleave(m, -1)[..., :length].movedim(-1, 1)


class ScheduledMasks(MaskedTraining):
    """Prunes on a schedule: every ``frequency`` steps between two points of the run the lowest scores are masked.

    Each mask has exactly the scheduled number of ones (of whole rows: as many as fit into it). Without regrowth masked
    weights rank lowest, so masks only shrink.

    Args:
        method: says which weights, and how many stay.
        session: the run.
        criterion: scores; gradients are those of the current batch.
        granularity: what is masked together.
        initial: sparsity with which pruning begins.
        begin, end: the first and last pruning, as shares of the run.
        frequency: steps between prunings.
        exponent: of the schedule.
        regrowth: what may come back.
        regrown: with regrowth by gradient or chance, the share of the kept weights that changes place at first.
    """

    def __init__(
        self,
        method: WeightOptions,
        session: Session,
        *,
        criterion: WeightCriterion = "magnitude",
        granularity: str = "weights",
        initial: float = 0.0,
        begin: float = 0.0,
        end: float = 1.0,
        frequency: PositiveInt = 100,
        exponent: PositiveFloat = 3.0,
        regrowth: Regrowth = "none",
        regrown: float = 0.3,
    ) -> None:
        super().__init__()
        self.method, self.session, self.criterion, self.granularity = method, session, criterion, granularity
        self.initial, self.begin, self.end, self.frequency, self.exponent = initial, begin, end, frequency, exponent
        self.regrowth, self.regrown = regrowth, regrown
        self.reached = 0.0
        """Progress of the last pruning."""
        self.history: list[list[float]] = []
        """[step, sparsity] of every pruning."""

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        weights = self.method.weights(trainer.model)
        self.sizes = {name: weight.numel() for name, weight in weights.items()}
        self.kept = self.method.kept(self.session)
        self.first = min(trainer.total_steps - 1, round(self.begin * trainer.total_steps))
        last = min(trainer.total_steps - 1, round(self.end * trainer.total_steps))
        self.prunings = max(0, last - self.first) // self.frequency
        """Intervals n: there are n + 1 prunings, the last of which reaches the final sparsity."""

    def start(self, trainer: Trainer) -> None:
        if trainer.epochs == 0:
            self.prune(trainer, 1.0)

    def progress(self, step: int) -> float | None:
        """Share of the schedule at which to prune now; None where this is no pruning step."""
        number, rest = divmod(step - self.first, self.frequency)
        if rest or not 0 <= number <= self.prunings:
            return None
        return number / self.prunings if self.prunings else 1.0

    def after_backward(self, trainer: Trainer) -> None:
        progress = self.progress(trainer.step)
        if progress is not None:
            zeros = self.prune(trainer, progress)
            self.history.append([trainer.step, zeros / sum(self.sizes.values())])
        super().after_backward(trainer)

    def epoch_end(self, trainer: Trainer) -> None:
        if self.regrowth == "soft" and self.history:  # what is validated and kept is the pruned network
            self.prune(trainer, self.reached)

    @torch.no_grad()
    def prune(self, trainer: Trainer, progress: float) -> int:
        """Mask the lowest scores; returns how many weights are masked."""
        weights = {name: trainer.model.get_parameter(name) for name in self.sizes}
        gradients = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
        step = trainer.step
        chance = torch.Generator().manual_seed(self.session.seed * 1_000_003 + step)
        scores = weight_scores(weights, self.criterion, gradients, chance)
        if self.masks and self.regrowth != "soft":
            scores = {
                n: torch.where(self.masks[n].bool(), s, -1.0) if n in self.masks else s for n, s in scores.items()
            }
        masks = self._masks(scores, progress)
        if self.regrowth in ("gradient", "random") and self.masks and progress < 1:
            masks = self._regrow(masks, scores, gradients, chance, progress)
        self.masks = {name: mask.to(weights[name].dtype) for name, mask in masks.items()}
        apply_masks(trainer.model, self.masks)
        zeros = sum(int((mask == 0).sum()) for mask in self.masks.values())
        self.reached = progress
        if self.regrowth == "soft":
            self.masks = {}
        return zeros

    def _masks(self, scores: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        if ":" in self.granularity:
            n, m = map(int, self.granularity.split(":"))
            share = scheduled_sparsity(progress, 1.0, self.initial, self.exponent)
            able = {name: score for name, score in scores.items() if score.shape[1] >= m}
            masks = {name: pattern_mask(score, n, m, share) for name, score in able.items()}
            return {name: mask & (scores[name] >= 0) for name, mask in masks.items()}
        sizes = self.sizes if EVERYTHING not in self.kept else {EVERYTHING: sum(self.sizes.values())}
        kept = {}
        for name, size in sizes.items():
            final = 1 - self.kept[name] / size
            sparsity = scheduled_sparsity(progress, final, min(self.initial, final), self.exponent)
            kept[name] = round((1 - sparsity) * size)
        return row_masks(scores, kept) if self.granularity == "rows" else masks_of(scores, kept)

    def _regrow(
        self,
        masks: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        chance: torch.Generator,
        progress: float,
    ) -> dict[str, Tensor]:
        """Give up the weakest of what is kept and take as many others in its place, which start at zero."""
        share = self.regrown * (1 + math.cos(math.pi * progress)) / 2
        result = {}
        for name, mask in masks.items():
            kept = int(mask.sum())
            moved = min(round(share * kept), mask.numel() - kept)
            stays = largest_mask(torch.where(mask, scores[name], -2.0), kept - moved)
            wanted = gradients[name].abs() if self.regrowth == "gradient" else None
            wanted = torch.rand(mask.shape, generator=chance).to(mask.device) if wanted is None else wanted
            result[name] = stays | largest_mask(torch.where(stays, -1.0, wanted), moved)
        return result

    def finish(self, trainer: Trainer) -> None:
        apply_masks(trainer.model, self.masks)
        trim(self.session, self.method, trainer.model, self.sizes)
        self.session.sparse.update(self.sizes)
        self.session.report(
            sparsity_history=self.history,
            kept={n: [int(p.count_nonzero()), p.numel()] for n, p in layer_weights(trainer.model).items()},
        )

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks, "history": self.history, "reached": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.reached = state["history"], state["reached"]
        self.masks = {name: mask.to(self.session.device) for name, mask in state["masks"].items()}
