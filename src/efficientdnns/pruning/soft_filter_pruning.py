"""Soft filter pruning: after every epoch the weakest filters are set to zero but keep being trained.

A zeroed filter can grow back and another be chosen; what is zero at the end is removed.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from efficientdnns.errors import ModelError
from efficientdnns.method import Paper, Ratio, TrainingMethod
from efficientdnns.parts.structured import lowest, matches
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, absorb_constants, narrow_output, remove
from efficientdnns.training import Callback, Trainer


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
        ``pruning_ratio`` is the pruned share P (the official ``rate`` is the kept share).
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
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 2, "learning_rate": 0.01}

    pruning_ratio: Ratio = 0.3
    """P: share of filters zeroed in each layer."""
    norm: Literal[1, 2] = 2
    """p of the norm."""
    every: PositiveInt = 1
    """Epochs between prunings."""
    skip: tuple[str, ...] = ("*downsample*", "*shortcut*")
    """Convolutions left alone, as name patterns."""
    epochs: PositiveInt = 200
    """Epochs of the training run."""

    def check(self, session: Session) -> None:
        super().check(session)
        if not self.layers(session.model):
            raise ModelError(
                f"{type(session.model).__name__} has no convolution for {self.name} to prune; check skip={self.skip}"
            )

    def layers(self, model: nn.Module) -> list[str]:
        """The convolutions that are pruned: all of more than one filter that are neither depthwise nor skipped."""
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            and module.out_channels > 1
            and not (module.groups > 1 and module.groups == module.in_channels)
            and not matches(name, self.skip)
        ]

    def callback(self, session: Session) -> Callback:
        return SoftPruning(self, session)


class SoftPruning(Callback):
    """Zeroes filters between epochs and removes them at the end."""

    structural = True

    def __init__(self, method: SoftFilterPruning, session: Session) -> None:
        self.method, self.session = method, session

    def setup(self, trainer: Trainer) -> None:
        self.layers = self.method.layers(trainer.model)

    def start(self, trainer: Trainer) -> None:
        self.prune(trainer.model)

    def epoch_end(self, trainer: Trainer) -> None:
        if (trainer.epoch + 1) % self.method.every == 0 or trainer.epoch + 1 == trainer.epochs:
            self.prune(trainer.model)

    @torch.no_grad()
    def prune(self, model: nn.Module) -> None:
        """Set the weakest filters of every layer to zero."""
        for name in self.layers:
            weight = model.get_parameter(f"{name}.weight")
            weight[self.weakest(weight).to(weight.device)] = 0

    def weakest(self, weight: Tensor) -> Tensor:
        """Indices of the floor(N P) filters of smallest norm."""
        return lowest(filter_norms(weight.detach(), self.method.norm).cpu(), self.method.pruning_ratio)

    def finish(self, trainer: Trainer) -> None:
        model, example = trainer.model.eval(), self.session.example_input
        zero = {name: self.weakest(model.get_parameter(f"{name}.weight")) for name in self.layers}
        graph = ChannelGraph.trace(model, example)
        alone = {}
        for group in graph.groups:
            if graph.producers(group) == [group.name] and group.name in zero:
                rows = next(m.index[:, 0] for m in group.members if m.role == "out")
                alone[group.name] = torch.isin(rows, zero[group.name]).nonzero().flatten()
        absorbed, selection, varying = absorb_constants(model, example, alone, graph)
        # Traced anew: layers that took constants over may have got a bias.
        small = remove(absorbed, example, selection) if selection else absorbed
        for name, filters in zero.items():
            if name not in alone and len(filters):
                gone = set(filters.tolist())
                keep = [i for i in range(model.get_parameter(f"{name}.weight").shape[0]) if i not in gone]
                small = narrow_output(small, example, name, keep)
        trainer.model = small
        self.session.report(
            zeroed={name: len(filters) for name, filters in zero.items()},
            removed={name: len(units) for name, units in selection.items()},
            constants_dropped=varying,
        )
