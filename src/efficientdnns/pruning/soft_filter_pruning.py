"""Soft filter pruning: after every epoch the weakest filters are set to zero but keep being trained.

A zeroed filter can grow back and another be chosen; what is zero at the end is removed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from efficientdnns.budget import Plan
from efficientdnns.errors import ModelError
from efficientdnns.method import Paper, Ratio, TrainingMethod
from efficientdnns.parts.budgets import check_patterns, costs, limits_of, matches, meet, require_reachable, targets_of
from efficientdnns.parts.structured import Holder, Scope, WidthCosts, Widths, holders, weakest
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group, absorb_constants, narrow_output, remove
from efficientdnns.training import Callback, Trainer
from efficientdnns.training.sparsity import apply_masks


def filter_norms(weight: Tensor, norm: int = 2) -> Tensor:
    r"""p-norm :math:`(\sum |w|^p)^{1/p}` of every filter of a kernel (out, in, ...)."""
    return weight.flatten(1).norm(p=norm, dim=1)


def pruned_flops(blocks: int, keep: float) -> float:
    """Share of a CIFAR ResNet's FLOPs that the paper counts as saved, for ``blocks`` blocks per stage.

    Counted as the official script does: stem x keep, first convolution of a block x keep, second x keep^2, and keep^2 for
    the very first as well, whose input is the stem; real-valued shares, without shortcuts and classifier.
    """
    full = saved = 0.0
    for number, (channels, inputs, size) in enumerate(_layers(blocks)):
        flops = channels * inputs * 9 * size * size
        share = keep if number == 0 or (number % 2 == 1 and number > 1) else keep**2
        full, saved = full + flops, saved + flops * (1 - share)
    return saved / full


def _layers(blocks: int) -> list[tuple[int, int, int]]:
    layers = [(16, 3, 32)]
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        for _ in range(2 * blocks):
            layers.append((channels, layers[-1][0], size))
    return layers


class SoftFilterPruning(TrainingMethod):
    r"""Soft filter pruning, `He et al., IJCAI 2018 <https://arxiv.org/abs/1808.06866>`_.

    Once before training and after every ``every`` epochs the filters of smallest norm are set to zero in every
    convolution,

    .. math:: \|W_{i,j}\|_p = \Big(\sum |w|^p\Big)^{1/p}, \qquad \lfloor N_{i+1} P \rfloor \text{ filters per layer},

    and all filters, zero or not, go on being trained. Validation sees the zeroed network. At the end zero filters are
    removed: inside a block together with the input slices of the next layer; where a residual stream must keep its width
    the convolution and its batch norm shrink and their outputs are scattered back, with the constants
    :math:`\beta - \gamma\mu/\sigma` of the removed channels in their places. The small network computes what the zeroed
    one does: constants that are read by a padded convolution are kept in one carrier channel.

    Batch-norm parameters and biases are not zeroed.

    Deviations:
        ``pruning_ratio`` is the pruned share P (the official ``rate`` is the kept share). ``linear`` is not the paper's,
        whose networks have convolutions only.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="soft-filter-pruning",
        title="Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks",
        authors="Yang He, Guoliang Kang, Xuanyi Dong, Yanwei Fu, Yi Yang",
        venue="IJCAI",
        year=2018,
        url="https://arxiv.org/abs/1808.06866",
    )
    kind: ClassVar[str] = "pruning"
    budgets: ClassVar[frozenset[str]] = frozenset({"macs", "params", "bytes", "latency"})
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 2, "learning_rate": 0.01}

    pruning_ratio: Ratio = 0.3
    """P: share of filters zeroed in each layer; solved for when the run has a budget."""
    scope: Scope = "layer"
    """One share for every layer, or one threshold for all: on norms divided by their mean in the layer, before training."""
    round_to: PositiveInt = 1
    """Every layer keeps a multiple of this many filters, or all of them."""
    norm: Literal[1, 2] = 2
    """p of the norm."""
    every: PositiveInt = 1
    """Epochs between prunings."""
    soft: bool = True
    """Whether zeroed filters go on being trained; without it those of the first pruning stay zero, as a control."""
    skip: tuple[str, ...] = ("*downsample*", "*shortcut*")
    """Convolutions left alone, as name patterns."""
    linear: tuple[str, ...] = ()
    """Linear layers whose neurons are treated as filters too, as name patterns: those inside a transformer's MLPs, say."""
    epochs: PositiveInt = 200
    """Epochs of the training run."""

    def check(self, session: Session) -> None:
        super().check(session)
        check_patterns(self.linear, _linear(session.model), f"{self.name}: linear")
        if not self.layers(session.model):
            raise ModelError(
                f"{type(session.model).__name__} has no convolution for {self.name} to prune; check skip={self.skip}, or "
                "name linear layers with linear=[...]"
            )

    def check_network(self, session: Session) -> None:
        if "skip" in self.model_fields_set:
            check_patterns(self.skip, _convolutions(session.model), f"{self.name}: skip")
        if limits_of(session, self):
            least = self.offer(session.model).least
            require_reachable(
                session, self, lambda: shrunk(session.model, self.zeroed(session.model, least), session)[0]
            )

    def offer(self, model: nn.Module) -> Widths:
        """The numbers of filters to choose from."""
        return Widths.of(self.norms(model), scope=self.scope, round_to=self.round_to)

    def norms(self, model: nn.Module) -> dict[str, Tensor]:
        """The norm of every filter by layer."""
        weights = {name: model.get_parameter(f"{name}.weight").detach() for name in self.layers(model)}
        return {name: filter_norms(weight, self.norm).cpu() for name, weight in weights.items()}

    def zeroed(self, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
        """Indices of the filters of smallest norm that go when each layer keeps as many as the plan says."""
        return {name: weakest(norms, len(norms) - plan[name]) for name, norms in self.norms(model).items()}

    def plan(self, session: Session, model: nn.Module) -> Plan:
        """How many filters each layer keeps: what the budget allows, or N - floor(N P) without one."""
        offer = self.offer(model)
        if not limits_of(session, self):
            return offer.at(self.pruning_ratio)
        return meet(
            session,
            self,
            propose=offer.propose,
            estimate=WidthCosts(session, model, offer.full, _held(model, session, list(offer.full))),
            build=lambda plan: shrunk(model, self.zeroed(model, plan), session)[0],
            least=offer.least,
            full=offer.full,
        )

    def layers(self, model: nn.Module) -> list[str]:
        """What is pruned: convolutions of more than one filter, neither depthwise nor skipped, and linear layers named."""
        convolutions = [name for name in _convolutions(model) if not matches(name, self.skip)]
        return convolutions + [name for name in _linear(model) if matches(name, self.linear)]

    def callback(self, session: Session) -> Callback:
        return SoftPruning(self, session)


class SoftPruning(Callback):
    """Zeroes filters between epochs and removes them at the end."""

    structural = True

    def __init__(self, method: SoftFilterPruning, session: Session) -> None:
        self.method, self.session = method, session
        self.masks: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer) -> None:
        self.kept = self.method.plan(self.session, trainer.model)

    def start(self, trainer: Trainer) -> None:
        self.prune(trainer.model)
        if not self.method.soft:
            weights = {f"{name}.weight": trainer.model.get_parameter(f"{name}.weight") for name in self.kept}
            self.masks = {name: weight.detach() != 0 for name, weight in weights.items()}

    def after_step(self, trainer: Trainer) -> None:
        apply_masks(trainer.model, self.masks)

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masks = {name: mask.to(self.session.device) for name, mask in state["masks"].items()}

    def epoch_end(self, trainer: Trainer) -> None:
        if (trainer.epoch + 1) % self.method.every == 0 or trainer.epoch + 1 == trainer.epochs:
            self.prune(trainer.model)

    @torch.no_grad()
    def prune(self, model: nn.Module) -> None:
        """Set the weakest filters of every layer to zero."""
        for name, filters in self.method.zeroed(model, self.kept).items():
            weight = model.get_parameter(f"{name}.weight")
            weight[filters.to(weight.device)] = 0

    def finish(self, trainer: Trainer) -> None:
        session, method, model = self.session, self.method, trainer.model.eval()
        zero = method.zeroed(model, self.kept)
        trainer.model, removed, varying = shrunk(model, zero, session)
        # Which constants have to be carried on is known only now, and so is how well the floats can be coded.
        targets = {name: value for name, value in targets_of(session, method).items() if name != "latency"}
        got = costs(session, trainer.model, list(targets))
        if any(got[name] > target for name, target in targets.items()):
            zero = method.zeroed(model, method.plan(session, model))
            trainer.model, removed, varying = shrunk(model, zero, session)
        session.report(
            zeroed={name: len(filters) for name, filters in zero.items()},
            removed={name: len(units) for name, units in removed.items()},
            constants_dropped=varying,
        )


def shrunk(
    model: nn.Module, zero: Mapping[str, Tensor], session: Session
) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    """The small network that computes what ``model`` computes with the filters ``zero`` (layer -> indices) at zero.

    Returns:
        The network, the channels that are gone with their readers, and the groups whose constants were dropped.
    """
    model, example = copy.deepcopy(model).eval(), session.example_input
    with torch.no_grad():
        for name, filters in zero.items():
            weight = model.get_parameter(f"{name}.weight")
            weight[filters.to(weight.device)] = 0
    graph = ChannelGraph.trace(model, example)
    alone = {}
    for name, group in _alone(model, graph).items():
        if name in zero:
            rows = next(m.index[:, 0] for m in group.members if m.role == "out")
            alone[name] = torch.isin(rows, zero[name]).nonzero().flatten()
    absorbed, selection, varying = absorb_constants(model, example, alone, graph)
    # Traced anew: layers that took constants over may have got a bias.
    small = remove(absorbed, example, selection) if selection else absorbed
    tied = [name for name, filters in zero.items() if name not in alone and len(filters)]
    # One graph does for all: narrowing a layer changes the name of no other.
    graph = ChannelGraph.trace(small, example, verify=False) if tied else graph
    for name in tied:
        gone = set(zero[name].tolist())
        keep = [i for i in range(model.get_parameter(f"{name}.weight").shape[0]) if i not in gone]
        small = narrow_output(small, example, name, keep, graph=graph)
    return small, selection, varying


def _convolutions(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and module.out_channels > 1
        and not (module.groups > 1 and module.groups == module.in_channels)
    ]


def _linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _alone(model: nn.Module, graph: ChannelGraph) -> dict[str, Group]:
    """The groups that are the filters of one layer, all of them and nothing else."""
    own = dict(model.named_parameters())
    groups = {group.name: group for group in graph.groups if graph.producers(group) == [group.name]}
    return {name: group for name, group in groups.items() if group.size == len(own[f"{name}.weight"])}


def _held(model: nn.Module, session: Session, layers: list[str]) -> dict[str, list[Holder]]:
    """What goes with a filter of each layer: its rows, and what reads them where nothing else is added to them."""
    graph = ChannelGraph.trace(model, session.example_input)
    alone, own = _alone(model, graph), dict(model.named_parameters())
    held: dict[str, list[Holder]] = {}
    for name in layers:
        rows = [f"{part}.{tensor}" for part in (name, graph.batch_norm_after(name)) for tensor in ("weight", "bias")]
        held[name] = holders(alone[name]) if name in alone else [(row, 0, 1) for row in rows if row in own]
    return held
