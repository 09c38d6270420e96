"""Tucker-2 decomposition of a whole network: three small convolutions in place of each convolution.

The ranks come from variational Bayes without a user knob, and the network is fine-tuned once, as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.budget import Block, Plan, fill
from efficientdnns.measurement import count_macs
from efficientdnns.measurement.size import nonzero_parameters
from efficientdnns.method import Method, Need, Paper
from efficientdnns.parts.budgets import check_patterns, limits_of, matches, meet, require_reachable
from efficientdnns.parts.evbmf import evbmf
from efficientdnns.parts.factorable import layers_of
from efficientdnns.parts.low_rank import (
    Layer,
    replace_everywhere,
    round_rank,
    three_convs,
    truncated_svd,
    two_layers,
    unfold,
)
from efficientdnns.session import Session
from efficientdnns.storage import share


def tucker2(
    kernel: Tensor, rank_in: int, rank_out: int, sweeps: int = 20
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    r"""Tucker-2 :math:`K \approx C \times_{in} U_{in} \times_{out} U_{out}` with orthonormal factors: HOSVD, then HOOI.

    Args:
        kernel: (outputs T, inputs S, height, width); the spatial modes are not reduced.
        rank_in: R3, at most S.
        rank_out: R4, at most T.
        sweeps: alternating updates after the HOSVD; it ends earlier once they no longer help.

    Returns:
        The core (R4, R3, height, width), U_in (S, R3), U_out (T, R4), and the relative Frobenius error after HOSVD and
        after each sweep, which never rises.
    """
    weight = kernel.double()
    u_in, u_out = _leading(unfold(weight, 1), rank_in), _leading(unfold(weight, 0), rank_out)
    total = float(weight.square().sum())

    def core() -> Tensor:
        return torch.einsum("tsij,sa,tb->baij", weight, u_in, u_out)

    def error() -> float:
        # The factors are orthonormal, so what the core does not hold is the error.
        return math.sqrt(max(0.0, 1 - float(core().square().sum()) / total)) if total else 0.0

    errors = [error()]
    for _ in range(sweeps):
        u_out = _leading(unfold(torch.einsum("tsij,sa->taij", weight, u_in), 0), rank_out)
        u_in = _leading(unfold(torch.einsum("tsij,tb->bsij", weight, u_out), 1), rank_in)
        errors.append(error())
        if errors[-2] - errors[-1] < 1e-7:
            break
    return core().to(kernel.dtype), u_in.to(kernel.dtype), u_out.to(kernel.dtype), errors


def _leading(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


def full_ranks(layer: Layer) -> tuple[int, ...]:
    """(S, T) for a convolution that gets Tucker-2; the rank of the matrix for what gets an SVD."""
    if isinstance(layer, nn.Conv2d) and layer.in_channels > 4 and layer.kernel_size != (1, 1):
        return min(unfold(layer.weight, 1).shape), min(unfold(layer.weight, 0).shape)
    return (min(layer.weight.flatten(1).shape),)


def base_ranks(layer: Layer, ranks: str | float | tuple[int, int]) -> tuple[int, ...]:
    """The ranks that the field ``ranks`` gives a layer, in the order of `full_ranks`; EVBMF may say 0."""
    full = full_ranks(layer)
    if isinstance(ranks, str):
        weight = layer.weight.detach()
        return tuple(evbmf(unfold(weight, mode)).rank for mode in ((1, 0) if len(full) == 2 else (0,)))
    if isinstance(ranks, float):
        return tuple(round(ranks * rank) for rank in full)
    return tuple(min(rank, limit) for rank, limit in zip(ranks[-len(full) :], full))


def saves(layer: Layer, ranks: tuple[int, ...]) -> bool:
    """Whether the factors need fewer weights and fewer multiply-accumulates than the layer."""
    return max(factor_weights(layer, ranks)) < layer.weight.numel()


def factor_weights(layer: Layer, ranks: tuple[int, ...]) -> tuple[int, int]:
    """Weights of the factors; and the same, each counted as often as it is used for one use of a weight of the layer."""
    outputs, inputs = layer.weight.shape[:2]
    area = layer.weight[0, 0].numel()
    if len(ranks) == 1:
        return (weights := ranks[0] * (inputs * area + outputs)), weights
    assert isinstance(layer, nn.Conv2d)
    first, rest = inputs * ranks[0], area * ranks[0] * ranks[1] + outputs * ranks[1]
    # The first 1 x 1 runs before the stride, on that many times more pixels than the rest.
    return first + rest, layer.stride[0] * layer.stride[1] * first + rest


def decompose(layer: Layer, ranks: tuple[int, ...], sweeps: int = 20) -> tuple[nn.Sequential, float]:
    """The chain of layers for ``layer`` and the relative error of its weights."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Conv2d) and len(ranks) == 2:
        core, u_in, u_out, errors = tucker2(weight, *ranks, sweeps)
        return three_convs(layer, *ranks, (core, u_in, u_out)), errors[-1]
    left, right = truncated_svd(weight.flatten(1), ranks[0])
    error = (weight.flatten(1) - left @ right).norm() / weight.norm().clamp_min(1e-30)
    return two_layers(layer, ranks[0], (left, right)), float(error)


def outline(layer: Layer, ranks: tuple[int, ...]) -> nn.Sequential:
    """The chain of layers with open values, to count its costs."""
    if isinstance(layer, nn.Conv2d) and len(ranks) == 2:
        return three_convs(layer, *ranks, None)
    return two_layers(layer, ranks[0], None)


class TuckerDecomposition(Method):
    r"""Whole-network compression by Tucker-2, `Kim et al., ICLR 2016 <https://arxiv.org/abs/1511.06530>`_.

    A kernel K (D x D x S x T: S inputs, T outputs) becomes

    .. math:: K(i,j,s,t) \approx \sum_{r_3,r_4} C(i,j,r_3,r_4)\, U_3(s,r_3)\, U_4(t,r_4)

    that is a 1 x 1 convolution S -> R3, a D x D convolution R3 -> R4 with the old stride and padding, and a 1 x 1
    convolution R4 -> T with the bias: :math:`S R_3 + D^2 R_3 R_4 + T R_4` weights for :math:`D^2 S T`. R3 and R4 are
    the `evbmf` ranks of the kernel's two channel unfoldings. The first convolution, 1 x 1 convolutions and linear
    layers become two layers by SVD. The network is useless until it is fine-tuned, which ``finetune_epochs`` does
    at the paper's learning rate of 0.001, divided by 10 on the way.

    A budget is met by the mildest ``rank_scale`` whose network is within it, and then single layers get back ranks that
    still fit.

    Deviations:
        A layer whose factors would need no fewer weights or multiply-accumulates is left as it is and listed in the
        report, and so are grouped and transposed convolutions. The first convolution is known by its
        inputs (at most 4 channels).
        ``rank_scale`` is the weakening of later work (MUSCO); the paper has no knob. Momentum and weight decay of the
        fine-tuning are not given in the paper and taken from the training settings.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="tucker-decomposition",
        title="Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications",
        authors="Yong-Deok Kim, Eunhyeok Park, Sungjoo Yoo, Taelim Choi, Lu Yang, Dongjun Shin",
        venue="ICLR",
        year=2016,
        url="https://arxiv.org/abs/1511.06530",
    )
    kind: ClassVar[str] = "decomposition"
    needs: ClassVar[frozenset[Need]] = frozenset({"training data", "labels"})
    budgets: ClassVar[frozenset[str]] = frozenset({"macs", "params", "bytes", "latency"})
    in_place: ClassVar[bool] = False
    contract_fields: ClassVar[dict[str, Any]] = {"finetune_epochs": 1}

    ranks: Literal["evbmf"] | Annotated[float, Field(gt=0, le=1)] | tuple[PositiveInt, PositiveInt] = "evbmf"
    """'evbmf', a share of the full ranks, or (R3, R4) for every convolution (R4 where there is one rank)."""
    rank_scale: Annotated[float, Field(ge=0)] = 1.0
    """w in r = R_max - w (R_max - R): 1 takes the ranks R as they are, less weakens the compression."""
    min_rank: PositiveInt = 1
    """No rank falls below it."""
    multiple_of: PositiveInt = 1
    """Ranks are rounded up to a multiple, which some hardware likes."""
    hooi_sweeps: NonNegativeInt = 20
    """Most sweeps of the alternating refinement; 0 keeps the HOSVD."""
    linear: bool = True
    """Decompose linear layers too."""
    skip: tuple[str, ...] = ()
    """Layers to leave alone, as name patterns."""
    finetune_epochs: NonNegativeInt = 10
    """Epochs of training afterwards; 0 leaves the fine-tuning to a later step."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of the fine-tuning."""
    schedule: Literal["constant", "cosine", "linear", "step"] = "step"
    """Schedule of the fine-tuning."""

    def check(self, session: Session) -> None:
        if self.finetune_epochs:
            super().check(session)

    def check_network(self, session: Session) -> None:
        layers, _ = self._layers(session.model)
        if limits_of(session, self):
            # The least ranks do not depend on what the weights will be, but for those that EVBMF leaves whole.
            least = {
                name: self._ranks(layer, tuple(0 for _ in full_ranks(layer)), 1.0) for name, layer in layers.items()
            }
            small = {name: ranks for name, ranks in least.items() if saves(layers[name], ranks)}
            require_reachable(session, self, lambda: outlined(session.model, small))

    def _layers(self, model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
        """The layers that are decomposed, and why the others are not."""
        able, kept = layers_of(model)
        check_patterns(self.skip, [*able, *kept], f"{self.name}: skip")
        for name, layer in list(able.items()):
            if matches(name, self.skip) or (isinstance(layer, nn.Linear) and not self.linear):
                kept[name] = "left alone as asked"
                del able[name]
        return able, kept

    def apply(self, session: Session) -> None:
        layers, kept = self._layers(session.model)
        bases: dict[str, tuple[int, ...]] = {}
        with session.progress.task(f"{session.label}: ranks", len(layers)) as bar:
            for name, layer in layers.items():
                bases[name] = base_ranks(layer, self.ranks)
                bar.advance()
        if limits_of(session, self):
            planned = self._solve(session, layers, bases)
        else:
            planned = self._plan(layers, bases, self.rank_scale)
        kept |= {name: "nothing to gain at these ranks" for name in layers if name not in planned}
        found: dict[str, Any] = {}
        with session.progress.task(f"{session.label}: factors", len(planned)) as bar:
            for name, ranks in planned.items():
                layer = layers.pop(name)  # the network's is the last reference
                chain, error = decompose(layer, ranks, self.hooi_sweeps)
                weights = sum(
                    parameter.numel() for key, parameter in chain.named_parameters() if key.endswith("weight")
                )
                found[name] = {
                    "ranks": ranks,
                    "weights": (layer.weight.numel(), weights),
                    "relative_error": error,
                }
                session.model = replace_everywhere(session.model, name, chain)
                bar.advance()
        session.report(layers=found, kept=kept)
        session.say(f"{len(found)} of {len(found) + len(kept)} layers decomposed")
        if self.finetune_epochs:
            session.train(epochs=self.finetune_epochs, learning_rate=self.learning_rate, schedule=self.schedule)

    def _plan(
        self, layers: Mapping[str, Layer], bases: Mapping[str, tuple[int, ...]], scale: float
    ) -> dict[str, tuple[int, ...]]:
        """The final ranks of every layer that gains by its factors."""
        planned = {name: self._ranks(layer, bases[name], scale) for name, layer in layers.items()}
        return {name: ranks for name, ranks in planned.items() if saves(layers[name], ranks)}

    def _ranks(self, layer: Layer, base: tuple[int, ...], scale: float) -> tuple[int, ...]:
        return tuple(
            round_rank(full - scale * (full - rank), full, lowest=self.min_rank, multiple_of=self.multiple_of)
            for full, rank in zip(full_ranks(layer), base)
        )

    def levels(self, layer: Layer, base: tuple[int, ...]) -> list[tuple[float, tuple[int, ...] | None]]:
        """The ranks that a layer can have, ascending, each with the scale at which it gets them; None is the whole layer."""
        ends = [(full, rank) for full, rank in zip(full_ranks(layer), base) if rank < full]
        scales = sorted({(full - r) / (full - rank) for full, rank in ends for r in range(1, full + 1)}, reverse=True)
        found: list[tuple[float, tuple[int, ...] | None]] = []
        for scale in scales:
            ranks = self._ranks(layer, base, scale)
            if not saves(layer, ranks):
                return [*found, (scale, None)]
            if not found or found[-1][1] != ranks:
                found.append((scale, ranks))
        return [*found, (0.0, None)]

    def _solve(
        self, session: Session, layers: Mapping[str, Layer], bases: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """The mildest ranks that meet the budget."""
        levels = {name: self.levels(layer, bases[name]) for name, layer in layers.items()}
        offered = [Block(scale, name, 1) for name, steps in levels.items() for scale, _ in steps[1:]]
        counted = count_macs(session.model, session.example_input, session.task.outputs)
        weights = {name: layer.weight.numel() for name, layer in layers.items()}
        fixed = {
            "macs": counted.total - sum(counted.by_module.get(name, 0) for name in layers),
            "params": nonzero_parameters(session.model) - sum(weights.values()),
        }

        def ranks(plan: Plan) -> dict[str, tuple[int, ...]]:
            chosen = {name: levels[name][level][1] for name, level in plan.items()}
            return {name: value for name, value in chosen.items() if value is not None}

        def estimate(plan: Plan) -> dict[str, float]:
            chosen = ranks(plan)
            macs, params = float(fixed["macs"]), float(fixed["params"])
            for name, layer in layers.items():
                kept = factor_weights(layer, chosen[name]) if name in chosen else (weights[name], weights[name])
                macs += counted.by_module.get(name, 0) * kept[1] / weights[name]
                params += kept[0]
            return {"macs": macs, "params": params, "bytes": params, "latency": macs}

        plan = meet(
            session,
            self,
            propose=lambda fits, enough: fill(dict.fromkeys(layers, 0), offered, fits, enough),
            estimate=estimate,
            build=lambda plan: outlined(session.model, ranks(plan)),
            least=dict.fromkeys(layers, 0),
            full={name: len(steps) - 1 for name, steps in levels.items()},
        )
        return ranks(plan)


def outlined(model: nn.Module, ranks: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A copy with random factors of these ranks, to see what it costs."""
    model = share(model)
    generator = torch.Generator().manual_seed(0)
    for name, chosen in ranks.items():
        layer: Layer = model.get_submodule(name)  # type: ignore[assignment]
        chain = outline(layer, chosen)
        for parameter in chain.parameters():
            # Floats of the usual size, since zeros and denormal numbers are coded and multiplied at another cost.
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model = replace_everywhere(model, name, chain)
    return model
