"""Coreset compression: filters that hardly respond to any class go, and the rest becomes a small bank of basis filters.

A layer is replaced by its basis filters and their linear combinations, with ranks that the singular values choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.budget import Block, Plan, fill, within
from efficientdnns.data.nested import length, to_device
from efficientdnns.measurement.macs import count_macs
from efficientdnns.measurement.size import nonzero_parameters
from efficientdnns.method import Method, Need, Paper
from efficientdnns.parts.budgets import check_patterns, costs, limits_of, matches, meet, require_reachable, targets_of
from efficientdnns.parts.channel_activations import observing
from efficientdnns.parts.channel_pruning import fine_tune
from efficientdnns.parts.factorable import layers_of
from efficientdnns.parts.filter_coreset import (
    Rule,
    coreset,
    coreset_layers,
    coreset_limit,
    filter_matrix,
    rank_by_rule,
    sparse_coreset,
)
from efficientdnns.parts.low_rank import Layer, replace_everywhere
from efficientdnns.parts.select import by_pattern
from efficientdnns.parts.structured import Widths, cut, kept_report, kept_widths, layer_names, narrowed, weakest
from efficientdnns.parts.tap import Tap, evaluating, weighted_layers
from efficientdnns.session import Session
from efficientdnns.storage import share
from efficientdnns.surgery import ChannelGraph, Group

Ranks = dict[str, int]
Factors = Callable[[str, int], tuple[Tensor, Tensor]]
"""(layer, rank) -> coefficients, basis."""


def best_ranks(responses: Tensor, classes: Tensor) -> Tensor:
    """(n,) the best place that each filter takes in any class, from 1 for the weakest to n.

    Args:
        responses: (samples, n) of every filter to every image.
        classes: (samples,). Within a class filters are ranked by the norm of their responses.
    """
    best = torch.zeros(responses.shape[1], dtype=torch.float64)
    for label in classes.unique():
        order = responses[classes == label].norm(dim=0).sort(stable=True).indices
        places = torch.empty_like(best)
        places[order] = torch.arange(1, len(order) + 1, dtype=torch.float64)
        best = torch.maximum(best, places)
    return best


def activation_mask(responses: Tensor, classes: Tensor, keep: float) -> Tensor:
    """Which filters are among the ``keep`` strongest of any class: (n,) boolean, the union over classes."""
    count = responses.shape[1]
    return best_ranks(responses, classes) > count - max(1, math.ceil(keep * count - 1e-9))


class CoresetCompression(Method):
    r"""Coreset-based compression, `Dubey et al., ECCV 2018 <https://arxiv.org/abs/1807.09810>`_.

    First the filters whose largest response in a feature map is, by its norm over the images of a class, among the
    strongest share ``keep`` for no class are removed. Then the filters of every layer with their biases, the rows of X
    (n, d + 1), are written as combinations of r basis filters,

    .. math:: X \approx C D, \qquad C = U_r \Sigma_r, \quad D = V_r^T \quad (X = U \Sigma V^T)

    and the layer becomes a convolution with D (r filters) and a 1 x 1 convolution with C. Coreset-A factorises
    diag(w) X, w being the mean response norm of a filter, and divides C by w again. Coreset-S takes the C of least
    :math:`\frac12\|X - CD\|_F^2 + \alpha\|C\|_1` with basis filters of norm at most 1, or a sparse D likewise.

    The rank is the number of singular values above :math:`\omega(b)` medians, or a share of n. Layers whose factors
    would not be smaller, :math:`r \ge n (d + 1) / (n + d + 1)`, are left whole and listed in the report, and so is the
    last layer. With a budget one ratio r / n for all layers is solved for; where removing filters is more than the
    budget asks for, the strongest of them stay and nothing is factorised.

    Deviations:
        The paper's code writes the approximated dense weights back; here the factors replace the layer. Its rule
        ``paper`` takes :math:`4/\sqrt 3` medians, which is meant for known noise. Responses are read where the next
        layer reads them, by magnitude, so groups of any kind can be masked; without labels all images are one class.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="coreset-compression",
        title="Coreset-Based Neural Network Compression",
        authors="Abhimanyu Dubey, Moitreya Chatterjee, Narendra Ahuja",
        venue="ECCV",
        year=2018,
        url="https://arxiv.org/abs/1807.09810",
    )
    kind: ClassVar[str] = "pruning"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration data"})
    budgets: ClassVar[frozenset[str]] = frozenset({"macs", "params", "bytes", "latency"})
    contract_fields: ClassVar[dict[str, Any]] = {"samples": 128}

    variant: Literal["K", "S", "A"] = "K"
    """Coreset-K: best rank; -S: sparse coefficients or basis; -A: filters weighted by their responses."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the filters of a layer that every class keeps in the first step; 1 leaves it out."""
    ratio: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    """r / n of every layer, 0 for layers left whole; 'auto' takes the rule. Solved for when the run has a budget."""
    ratios: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """Ratios of single layers by name pattern, in place of `ratio`."""
    rule: Rule = "gavish-donoho"
    """Which singular values count with 'auto'."""
    alpha: PositiveFloat = 1.0
    """Strength of the L1 penalty of Coreset-S."""
    sparse: Literal["coefficients", "basis"] = "coefficients"
    """Which factor of Coreset-S is sparse."""
    samples: PositiveInt = 2000
    """Training images whose responses are read (calibration images where the training data has no labels)."""
    skip: tuple[str, ...] = ()
    """Layers left whole by both steps, as name patterns."""
    epochs: NonNegativeInt = 0
    """Fine-tuning epochs afterwards; the paper has none."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of the fine-tuning; None takes a tenth of the session's."""

    def check_network(self, session: Session) -> None:
        layers = self.layers(session)[0]
        by_pattern(self.ratios, layers, f"{self.name}: ratios")
        if limits_of(session, self):
            require_reachable(session, self, lambda: self.smallest(session))

    def smallest(self, session: Session) -> nn.Module:
        """No network that this method can make is smaller: the fewest filters, and rank 1 everywhere."""
        branch = session.branch()
        graph, groups = self.groups(session)
        if groups and self.keep < 1:
            least = {g.name: max(1, math.ceil(self.keep * g.size - 1e-9)) for g in groups}
            branch.model = narrowed(session, graph, groups, least)
        layers = self.layers(branch)[0]
        return self.factorised(
            branch.model, {n: 1 for n, layer in layers.items() if coreset_limit(layer)}, svd_factors(layers)
        )

    def groups(self, session: Session) -> tuple[ChannelGraph, list[Group]]:
        """The groups of filters that the first step may thin out; none where surgery finds none."""
        check_patterns(self.skip, layer_names(session.model), f"{self.name}: skip")
        graph = ChannelGraph.trace(session.model, session.example_input)
        return graph, [
            g for g in graph.groups if g.size > 1 and not any(matches(p, self.skip) for p in graph.producers(g))
        ]

    def layers(self, session: Session) -> tuple[dict[str, Layer], dict[str, str]]:
        """The layers that the second step may factorise, and why the others are left whole."""
        able, kept = layers_of(session.model)
        running = weighted_layers(session.model, session.example_input, session.task.outputs)
        reasons = {name: "left alone as asked" for name in able if matches(name, self.skip)}
        reasons |= {name: "the last layer" for name in able if name == running[-1]}
        return {name: layer for name, layer in able.items() if name not in reasons}, kept | reasons

    def apply(self, session: Session) -> None:
        done = self.keep < 1 and self.remove_filters(session)
        if not done:
            self.factorise(session)
        fine_tune(session, self.epochs, self.learning_rate)

    def remove_filters(self, session: Session) -> bool:
        """The first step; returns whether it has used the budget up."""
        graph, groups = self.groups(session)
        best = self.ranked(session, groups)
        floor = {g.name: g.size - max(1, math.ceil(self.keep * g.size - 1e-9)) for g in groups}
        plan: Plan = {g.name: max(1, int((best[g.name] > floor[g.name]).sum())) for g in groups}
        done = False
        if targets := targets_of(session, self):
            done = within(costs(session, narrowed(session, graph, groups, plan), list(targets)), targets)
            if done:
                offered = [
                    Block(float(place) / g.size, g.name, 1)
                    for g in groups
                    for place in best[g.name].sort().values[: -plan[g.name]]
                ]
                widths = Widths(plan, {g.name: g.size for g in groups}, offered)
                plan = kept_widths(session, self, graph, groups, widths, 0.0)
        selection = {g.name: weakest(best[g.name], g.size - plan[g.name]) for g in groups}
        session.model = cut(session, graph, selection)
        session.report(**kept_report(graph, groups, selection))
        return done

    @torch.no_grad()
    def ranked(self, session: Session, groups: list[Group]) -> dict[str, Tensor]:
        """`best_ranks` of every group; the highest for all where its readers cannot be observed."""
        train, model = session.task.train, session.model
        labelled = train is not None and train.has_labels
        split = train if labelled else session.task.calibration
        assert split is not None
        peaks: dict[str, Tensor] = {}
        responses: dict[str, list[Tensor]] = {group.name: [] for group in groups}
        classes: list[Tensor] = []
        seen = 0

        def take(name: str, values: Tensor) -> None:
            peak = values.abs().amax(1)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        with observing(model, groups, take), evaluating(model):
            for batch in split.batches(min(128, self.samples), shuffle=True, seed=session.seed):
                peaks.clear()
                session.task.outputs(model, to_device(batch.inputs, session.device))
                for name, peak in peaks.items():
                    responses[name].append(peak.double().cpu())
                count = length(batch.inputs)
                targets = batch.targets if labelled else None
                whole = isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point()
                classes.append(targets.cpu() if whole else torch.zeros(count, dtype=torch.long))  # type: ignore[union-attr]
                seen += count
                if seen >= self.samples:
                    break
        label = torch.cat(classes)
        return {
            g.name: best_ranks(torch.cat(r), label)
            if sum(map(len, r := responses[g.name])) == len(label)
            else torch.full((g.size,), float(g.size), dtype=torch.float64)
            for g in groups
        }

    def factorise(self, session: Session) -> None:
        """The second step."""
        layers, kept = self.layers(session)
        importances = self.importances(session, list(layers)) if self.variant == "A" else {}
        factors = svd_factors(layers, importances)
        if limits_of(session, self):
            ranks = self.solve(session, layers, factors)
            kept |= {name: "whole within the budget" for name in layers if name not in ranks}
        else:
            ranks = self.ranks(layers)
            kept |= {
                name: f"rank {r} would not be smaller" for name, r in ranks.items() if r > coreset_limit(layers[name])
            }
            kept |= {name: "left alone as asked" for name in layers if name not in ranks}
            ranks = {name: rank for name, rank in ranks.items() if name not in kept}
        if self.variant == "S":
            factors = self.sparse_factors(layers)
        errors = {}
        for name, rank in ranks.items():
            coefficients, basis = factors(name, rank)
            matrix = filter_matrix(layers[name])
            errors[name] = float((coefficients @ basis - matrix).norm() / matrix.norm().clamp_min(1e-300))
        before = {name: filter_matrix(layers[name]).numel() for name in ranks}
        session.model = self.factorised(session.model, ranks, factors)
        if self.variant == "S":
            session.sparse |= {f"{name}.{1 if self.sparse == 'coefficients' else 0}.weight" for name in ranks}
        session.report(
            layers={
                name: {
                    "rank": rank,
                    "parameters": [before[name], rank * sum(_shape(layers[name]))],
                    "relative_error": errors[name],
                }
                for name, rank in ranks.items()
            },
            kept=kept,
        )

    def ranks(self, layers: Mapping[str, Layer]) -> Ranks:
        """The rank of every layer by its ratio or by the rule; layers of ratio 0 are left out."""
        own = by_pattern(self.ratios, layers, f"{self.name}: ratios")
        found = {}
        for name, layer in layers.items():
            ratio = own.get(name, self.ratio)
            if ratio == "auto":
                found[name] = rank_by_rule(filter_matrix(layer), self.rule)
            elif ratio:
                found[name] = min(max(1, int(len(layer.weight) * ratio + 1e-9)), min(_shape(layer)))
        return found

    def importances(self, session: Session, names: list[str]) -> dict[str, Tensor]:
        """Mean response norm of every filter over calibration images, relative to the layer's largest and at least 1e-3."""
        total: dict[str, Tensor] = {}
        model = session.model
        with evaluating(model), torch.no_grad(), Tap(model, names) as tap:
            for inputs in session.calibration(self.samples):
                session.task.outputs(model, inputs)
                for name in names:
                    if name in tap.values:
                        value = tap[name]
                        channels = 1 if isinstance(model.get_submodule(name), nn.Conv2d) else value.dim() - 1
                        norms = value.movedim(channels, -1).reshape(len(value), -1, value.shape[channels]).norm(dim=1)
                        total[name] = total.get(name, 0.0) + norms.double().sum(0)
        return {name: (sums / sums.max().clamp_min(1e-300)).clamp_min(1e-3) for name, sums in total.items()}

    def sparse_factors(self, layers: Mapping[str, Layer]) -> Factors:
        """Factors of Coreset-S."""

        def factors(name: str, rank: int) -> tuple[Tensor, Tensor]:
            matrix = filter_matrix(layers[name])
            if self.sparse == "coefficients":
                return sparse_coreset(matrix, rank, self.alpha)
            codes, basis = sparse_coreset(matrix.T, rank, self.alpha)
            return basis.T, codes.T

        return factors

    def factorised(self, model: nn.Module, ranks: Ranks, factors: Factors) -> nn.Module:
        """A network with two layers in place of each of these; it shares the rest with ``model``."""
        model = share(model)
        for name, rank in ranks.items():
            layer: Layer = model.get_submodule(name)  # type: ignore[assignment]
            model = replace_everywhere(model, name, coreset_layers(layer, *factors(name, rank)))
        return model

    def solve(self, session: Session, layers: Mapping[str, Layer], factors: Factors) -> Ranks:
        """The highest ratio of all layers within the budget; single layers then get what still fits."""
        model = session.model
        limits = {name: limit for name, layer in layers.items() if (limit := coreset_limit(layer))}
        # The step after the last rank that saves something is the whole layer.
        offered = [
            Block(-r / len(layers[name].weight), name, 1) for name, limit in limits.items() for r in range(2, limit + 2)
        ]
        counted = count_macs(model, session.example_input, session.task.outputs)
        sizes = {name: filter_matrix(layers[name]).numel() for name in limits}
        fixed = {
            "macs": counted.total - sum(counted.by_module.get(name, 0) for name in limits),
            "params": nonzero_parameters(model) - sum(sizes.values()),
        }

        def chosen(plan: Plan) -> Ranks:
            return {name: rank for name, rank in plan.items() if rank <= limits[name]}

        def estimate(plan: Plan) -> dict[str, float]:
            macs, params = float(fixed["macs"]), float(fixed["params"])
            for name, rank in plan.items():
                size = rank * sum(_shape(layers[name])) if rank <= limits[name] else sizes[name]
                macs, params = macs + counted.by_module.get(name, 0) * size / sizes[name], params + size
            return {"macs": macs, "params": params, "bytes": params, "latency": macs}

        least = dict.fromkeys(limits, 1)
        plan = meet(
            session,
            self,
            propose=lambda fits, enough: fill(least, offered, fits, enough),
            estimate=estimate,
            build=lambda plan: self.factorised(model, chosen(plan), factors),
            least=least,
            full={name: limit + 1 for name, limit in limits.items()},
        )
        return chosen(plan)


def _shape(layer: Layer) -> tuple[int, int]:
    """n and d + 1."""
    return len(layer.weight), layer.weight[0].numel() + (layer.bias is not None)


def svd_factors(layers: Mapping[str, Layer], importances: Mapping[str, Tensor] | None = None) -> Factors:
    """Best factors of any rank; every layer is decomposed once."""
    known: dict[str, tuple[Tensor, Tensor]] = {}

    def factors(name: str, rank: int) -> tuple[Tensor, Tensor]:
        if name not in known:
            known[name] = coreset(filter_matrix(layers[name]), (importances or {}).get(name))
        coefficients, basis = known[name]
        return coefficients[:, :rank], basis[:rank]

    return factors
