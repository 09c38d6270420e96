"""ADMM pruning: training under a hard limit on the weights of each layer, by turns ordinary training and projection.

The weights are pulled towards a sparse copy until the final cut hardly hurts; masked retraining repairs the rest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.budget import widths
from efficientdnns.errors import ConfigurationError, SurgeryError
from efficientdnns.method import Paper, Ratio, TrainingMethod
from efficientdnns.parts.budgets import costs, limits_of, require_reachable, targets_of
from efficientdnns.parts.project import ConstraintSet, LargestEntries, LargestInGroups, LargestRows, SparsitySet
from efficientdnns.parts.select import by_pattern, layer_weights, share_out, without
from efficientdnns.parts.sparse_budgets import kept_weights, sparse_macs, trim
from efficientdnns.parts.structured import Widths, cut, kept_widths, prunable, require_widths, weakest
from efficientdnns.surgery import ChannelGraph, Group, remove
from efficientdnns.training import Callback, Trainer, factor
from efficientdnns.training.sparsity import MaskedTraining, apply_masks

if TYPE_CHECKING:
    from efficientdnns.session import Session

Keep = Annotated[float, Field(gt=0)]
"""A share of a layer up to 1, a number of weights or filters above."""


def project_and_update(weight: Tensor, dual: Tensor, constraint: ConstraintSet) -> tuple[Tensor, Tensor]:
    r"""Z-step and dual step: :math:`Z' = \Pi_S(W + U)`, :math:`U' = U + W - Z'`; returns (Z', U')."""
    copy = constraint.project(weight + dual)
    return copy, dual + weight - copy


class ADMMPruning(TrainingMethod):
    r"""ADMM pruning, `Zhang et al., 2018 <https://arxiv.org/abs/1804.03294>`_.

    :math:`\min f(W)` subject to :math:`W_i \in S_i`, where :math:`S_i` holds the weights of layer i with at most
    :math:`l_i` non-zeros, is solved with a sparse copy :math:`Z_i` and a scaled dual :math:`U_i` of each weight:

    .. math::
        W &\leftarrow \text{training on } f(W) + \sum_i \tfrac{\rho}{2} \|W_i - Z_i + U_i\|_F^2 \\
        Z_i &\leftarrow \Pi_{S_i}(W_i + U_i), \qquad U_i \leftarrow U_i + W_i - Z_i

    :math:`\Pi_{S_i}` is the Euclidean projection: for weights it keeps the :math:`l_i` largest magnitudes. The Z and U
    steps come once a round; after ``epochs`` the weights outside the :math:`l_i` largest are cut, and
    ``retrain_epochs`` follow under the mask. Biases are neither pruned nor counted. Dropout is off in the first phase.
    Validation during that phase sees the cut network, and the report has :math:`\|W_i - Z_i\|_F` of every round.

    With few epochs take a larger rho: 1e-3 gave the best final accuracy in 9 epochs on MNIST, 1e-2 the best before
    retraining. With ``constraint="filters"`` whole filters are cut and really removed, where no other layer adds to
    their maps. A budget says how many weights stay (params, bytes), or how many filters (latency and macs too).

    Deviations:
        ``sparsity`` is shared out so that the kept weights of a layer grow with the square root of its size, which
        comes close to the budgets of the paper's networks; the paper chooses them by hand (``keep``). The number of
        rounds is fixed, there is no early stop at a small residual. The schedule starts anew for retraining, the
        optimizer's state does not. Counts are exact, where the released code cuts at a percentile.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="admm-pruning",
        title="A Systematic DNN Weight Pruning Framework using Alternating Direction Method of Multipliers",
        authors="Tianyun Zhang, Shaokai Ye, Kaiqi Zhang, Jian Tang, Wujie Wen, Makan Fardad, Yanzhi Wang",
        venue="ECCV",
        year=2018,
        url="https://arxiv.org/abs/1804.03294",
    )
    kind: ClassVar[str] = "pruning"
    budgets: ClassVar[frozenset[str]] = frozenset({"macs", "params", "bytes", "latency"})
    contract_fields: ClassVar[dict[str, Any]] = {
        "epochs": 2, "every": 1, "retrain_epochs": 1, "sparsity": 0.8, "rho": 1e-2, "learning_rate": 0.01
    }  # fmt: skip

    epochs: NonNegativeInt = 120
    """Epochs of the ADMM phase; 0 is one-shot magnitude pruning."""
    every: PositiveInt = 4
    """Epochs of a round, between two projections."""
    retrain_epochs: NonNegativeInt = 17
    """Epochs of masked retraining."""
    sparsity: Ratio | None = None
    """Share of all weights (or filters) that is removed; solved for when the run has a budget."""
    keep: dict[str, Keep] | None = None
    """What stays of each layer: name pattern -> share up to 1 or count above; layers that none fits stay dense."""
    skip: tuple[str, ...] = ()
    """Layers to leave alone, by name pattern such as ``fc3`` or ``layer1.*``."""
    constraint: Annotated[str, Field(pattern=r"^(weights|filters|[1-9]\d*:[1-9]\d*)$")] = "weights"
    """The constraint set: 'weights', 'filters', or 'N:M' (at most N of M consecutive input channels, such as '2:4')."""
    round_to: PositiveInt = 1
    """With filters: every layer keeps a multiple of this many, or all of them."""
    rho: PositiveFloat = 1e-4
    """Penalty weight; 1e-4 to 1e-2."""
    rho_growth: Annotated[float, Field(ge=1)] = 1.0
    """Factor on rho after every round."""
    restart_schedule: bool = False
    """Start the learning-rate schedule anew in every round, and not only for retraining."""

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.retrain_epochs

    @property
    def solves(self) -> frozenset[str]:
        # Zeros make a network smaller, not faster.
        return self.budgets if self.constraint == "filters" else frozenset({"params", "bytes"})

    def check(self, session: Session) -> None:
        super().check(session)
        limits = limits_of(session, self)
        if self.round_to > 1 and self.constraint != "filters":
            raise ConfigurationError(f"{self.name}: round_to is for filters; write constraint=filters or leave it out")
        if limits and (self.keep is not None or ":" in self.constraint):
            fixed = "keep" if self.keep is not None else f"constraint {self.constraint}"
            raise ConfigurationError(
                f"{self.name}: {fixed} leaves nothing to solve budget {limits[0]} with; leave one of them out"
            )
        if not limits:
            self.constraints(session)

    def check_network(self, session: Session) -> None:
        weights = self.weights(session.model)
        if limits_of(session, self) and self.constraint == "filters":
            require_widths(session, self, *self.filters(session))
        elif limits_of(session, self):
            require_reachable(session, self, lambda: _pruned(session.model, weights, len(weights)))

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that may be pruned, by parameter name."""
        return without(layer_weights(model), self.skip, f"{self.name}: skip")

    def callback(self, session: Session) -> Callback:
        return ADMM(self, session, self.constraints(session))

    def constraints(self, session: Session) -> dict[str, SparsitySet]:
        """The constraint set of every weight that is pruned, by parameter name.

        Raises:
            ConfigurationError: fields that do not go together, or a pattern that fits no layer.
            BudgetError: the budget leaves less than one weight for every layer.
        """
        weights = self.weights(session.model)
        if ":" in self.constraint:
            if self.keep is not None or self.sparsity is not None:
                raise ConfigurationError(
                    f"{self.name}: {self.constraint} fixes what stays; leave out keep and sparsity"
                )
            n, m = map(int, self.constraint.split(":"))
            return {name: LargestInGroups(n, m) for name, weight in weights.items() if weight.shape[1] >= m}
        if self.keep is not None and self.sparsity is not None:
            raise ConfigurationError(f"{self.name}: keep and sparsity both say what stays; give one of them")
        if self.constraint == "filters":
            return {name: LargestRows(count) for name, count in self._filter_counts(session).items()}
        return {name: LargestEntries(count) for name, count in self._counts(session, weights).items()}

    def _counts(self, session: Session, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Weights that stay, by parameter name."""
        sizes = {name: weight.numel() for name, weight in weights.items()}
        if self.keep is not None:
            shares = by_pattern(self.keep, weights, f"{self.name}: keep")
            return {name: _count(share, sizes[name]) for name, share in shares.items()}
        total = sum(sizes.values())
        if limits_of(session, self):
            build = partial(_pruned, session.model, weights)
            return share_out(sizes, kept_weights(session, self, build, len(sizes), total))
        if self.sparsity is not None:
            return share_out(sizes, round((1 - self.sparsity) * total))
        raise ConfigurationError(
            f"{self.name} must know what stays; write sparsity=0.9, keep={{fc1: 0.1}} or a budget params=0.1"
        )

    def filters(self, session: Session) -> tuple[ChannelGraph, list[Group], Widths]:
        """The filters that can be cut, by convolution, and how many each may keep.

        Which of them stay shows only after training; what they cost depends on how many.

        Raises:
            SurgeryError: there are none.
        """
        weights = self.weights(session.model)
        rows = {name.removesuffix(".weight"): len(weight) for name, weight in weights.items() if weight.dim() > 2}
        graph, groups = prunable(session)
        groups = [g for g in groups if graph.producers(g) == [g.name] and rows.get(g.name) == g.size]
        if not groups:
            raise SurgeryError(f"{self.name}: no convolution of {type(session.model).__name__} can lose filters")
        return graph, groups, Widths.of({g.name: torch.zeros(g.size) for g in groups}, round_to=self.round_to)

    def _filter_counts(self, session: Session) -> dict[str, int]:
        """Filters that stay, by parameter name."""
        graph, groups, offer = self.filters(session)
        if limits_of(session, self):
            plan = kept_widths(session, self, graph, groups, offer, 0.0)
            return {f"{name}.weight": kept for name, kept in plan.items()}
        able = {f"{group.name}.weight": group.size for group in groups}
        if self.keep is not None:
            shares: dict[str, float] = by_pattern(self.keep, able, f"{self.name}: keep")
        elif self.sparsity is not None:
            shares = dict.fromkeys(able, 1 - self.sparsity)
        else:
            raise ConfigurationError(
                f"{self.name} must know what stays; write sparsity=0.5, keep={{conv1: 0.5}} or a budget macs=0.5"
            )
        least = {name: _count(share, able[name]) for name, share in shares.items()}
        return {n: next(w for w in widths(able[n], self.round_to) if w >= count) for n, count in least.items()}


@torch.no_grad()
def _pruned(model: nn.Module, weights: Mapping[str, Tensor], kept: int) -> nn.Module:
    """A copy with so many of the named weights, the largest of each layer."""
    model = copy.deepcopy(model)
    for name, count in share_out({name: weight.numel() for name, weight in weights.items()}, kept).items():
        weight = model.get_parameter(name)
        weight.copy_(LargestEntries(count).project(weight))
    return model


def _count(share: float, size: int) -> int:
    return max(1, min(size, round(share * size if share <= 1 else share)))


class ADMM(MaskedTraining):
    """The run: a penalty and dual variables until the cut, a mask after it."""

    def __init__(self, method: ADMMPruning, session: Session, constraints: Mapping[str, SparsitySet]) -> None:
        super().__init__()
        self.method, self.session, self.constraints = method, session, dict(constraints)
        self.structural = method.constraint == "filters"
        self.rho, self.cut = method.rho, False
        self.copies: dict[str, Tensor] = {}
        self.duals: dict[str, Tensor] = {}
        self.targets: dict[str, Tensor] = {}
        self.residuals: dict[str, list[float]] = {name: [] for name in self.constraints}

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        for name, weight in self._weights(trainer):
            self.copies[name] = self.constraints[name].project(weight.detach())
            self.duals[name] = torch.zeros_like(weight)
        self._set_targets()
        self.dropouts = [(m, m.p) for m in trainer.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        self.graph = ChannelGraph.trace(trainer.model, self.session.example_input) if self.structural else None

    def start(self, trainer: Trainer) -> None:
        if self.method.epochs == 0:
            self._cut(trainer)

    def epoch_start(self, trainer: Trainer) -> None:
        # Dropout noise would be pulled into the copies and keep the residual up.
        for module, p in self.dropouts:
            module.p = p if self.cut else 0.0

    def penalty(self, trainer: Trainer) -> Tensor | None:
        if self.cut:
            return None
        squares = [F.mse_loss(w, self.targets[name], reduction="sum") for name, w in self._weights(trainer)]
        return self.rho / 2 * torch.stack(squares).sum() if squares else None

    def learning_rate(self, trainer: Trainer) -> float | None:
        first = self.method.epochs * trainer.steps_per_epoch
        if trainer.step >= first:
            step, length = trainer.step - first, trainer.total_steps - first
        else:
            length = self.method.every * trainer.steps_per_epoch if self.method.restart_schedule else first
            step = trainer.step % length
        return factor(trainer.settings.schedule, step / length)

    def epoch_end(self, trainer: Trainer) -> None:
        epoch = trainer.epoch + 1
        if self.cut:
            return
        if epoch % self.method.every == 0 or epoch == self.method.epochs:
            self._update(trainer)
        if epoch == self.method.epochs:
            self._cut(trainer)

    @contextmanager
    def validation(self, trainer: Trainer) -> Iterator[None]:
        masks = {} if self.cut else self._final_masks(trainer)
        kept = {name: trainer.model.get_parameter(name).detach().clone() for name in masks}
        apply_masks(trainer.model, masks)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    trainer.model.get_parameter(name).copy_(value)

    def finish(self, trainer: Trainer) -> None:
        for module, p in self.dropouts:
            module.p = p
        if self.graph is not None:
            selection = {g.name: gone for g in self.graph.groups if len(gone := self._gone(g, self.masks))}
            trainer.model = remove(trainer.model, self.session.example_input, selection)
            self._trim_filters(trainer)
        else:
            trim(self.session, self.method, trainer.model, self.constraints)
            self.session.sparse.update(self.constraints)
        self._report(trainer)

    def _trim_filters(self, trainer: Trainer) -> None:
        """Training changes how well floats can be coded: where the file got too large, cut the weakest filters too."""
        session, method = self.session, self.method
        target = targets_of(session, method).get("bytes", math.inf)
        if target == math.inf or costs(session, trainer.model, ["bytes"])["bytes"] <= target:
            return
        session.model = trainer.model
        graph, groups, offer = method.filters(session)
        plan = kept_widths(session, method, graph, groups, offer, 0.0)
        squares = {name: p.detach().square() for name, p in trainer.model.named_parameters() if p.dim() > 2}
        selection = {g.name: weakest(g.reduce(squares).cpu(), g.size - plan[g.name]) for g in groups}
        trainer.model = cut(session, graph, selection)

    def state_dict(self) -> dict[str, Any]:
        return {
            "rho": self.rho, "cut": self.cut, "copies": self.copies, "duals": self.duals,
            "masks": self.masks, "residuals": self.residuals,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rho, self.cut, self.residuals = state["rho"], state["cut"], state["residuals"]
        for mine, theirs in ((self.copies, state["copies"]), (self.duals, state["duals"])):
            device = next((tensor.device for tensor in mine.values()), None)
            mine.clear()
            mine.update({name: tensor.to(device) for name, tensor in theirs.items()})
        self.masks = {name: mask.to(self.session.device) for name, mask in state["masks"].items()}
        self._set_targets()

    def _weights(self, trainer: Trainer) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, trainer.model.get_parameter(name)) for name in self.constraints)

    def _set_targets(self) -> None:
        self.targets = {name: self.copies[name] - self.duals[name] for name in self.copies}

    @torch.no_grad()
    def _update(self, trainer: Trainer) -> None:
        """Z-step and dual step of every layer."""
        for name, weight in self._weights(trainer):
            self.copies[name], dual = project_and_update(weight, self.duals[name], self.constraints[name])
            # U is the dual variable divided by rho.
            self.duals[name] = dual / self.method.rho_growth
            self.residuals[name].append(float((weight - self.copies[name]).norm()))
        self.rho *= self.method.rho_growth
        self._set_targets()

    def _cut(self, trainer: Trainer) -> None:
        self.masks = self._final_masks(trainer)
        self.cut = True
        self.copies, self.duals, self.targets = {}, {}, {}
        apply_masks(trainer.model, self.masks)

    @torch.no_grad()
    def _final_masks(self, trainer: Trainer) -> dict[str, Tensor]:
        """What the cut keeps, from W itself; with a filter goes everything that belongs to its channel."""
        masks = {name: self.constraints[name].mask(w).to(w.dtype) for name, w in self._weights(trainer)}
        if self.graph is None:
            return masks
        parameters = dict(trainer.model.named_parameters())
        whole = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
        for group in self.graph.groups:
            gone = self._gone(group, masks)
            for member in group.members:
                if member.tensor in whole and len(gone):
                    whole[member.tensor].index_fill_(member.dim, member.index[gone].flatten().to(gone.device), 0.0)
        return {name: mask for name, mask in whole.items() if not mask.all()}

    def _gone(self, group: Group, masks: Mapping[str, Tensor]) -> Tensor:
        """Units of the group whose filter is cut."""
        for member in group.members:
            if member.role == "out" and member.tensor in self.constraints and member.tensor in masks:
                return (masks[member.tensor].flatten(1).amax(1)[member.index[:, 0]] == 0).nonzero().flatten()
        return torch.empty(0, dtype=torch.long)

    def _report(self, trainer: Trainer) -> None:
        task = self.session.task
        finding: dict[str, Any] = {
            "residuals": self.residuals,
            "kept": {n: [int(p.count_nonzero()), p.numel()] for n, p in layer_weights(trainer.model).items()},
            "theoretical_macs": sparse_macs(trainer.model, task.example_input, task.outputs),
        }
        if 0 < self.method.epochs <= len(trainer.history):
            metric = task.metric.name
            finding["metric_before_retraining"] = trainer.history[self.method.epochs - 1].get(metric)
        self.session.report(**finding)
