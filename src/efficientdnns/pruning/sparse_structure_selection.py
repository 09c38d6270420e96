"""Sparse structure selection: one scaling factor for every channel, group or residual block, driven to exactly zero.

An accelerated proximal gradient decides during ordinary training which structures the network needs; the rest is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from efficientdnns.budget import Block, Plan, cut_at, fill
from efficientdnns.errors import SurgeryError
from efficientdnns.measurement.macs import count_macs
from efficientdnns.method import Paper
from efficientdnns.parts.budgets import check_patterns, limits_of, matches, meet, require_reachable
from efficientdnns.parts.cardinality import cardinality_groups, without_groups
from efficientdnns.parts.channel_gates import ChannelGates, fold_gates, gateable
from efficientdnns.parts.channel_pruning import ChannelCallback, Scores
from efficientdnns.parts.learned_factors import FactorCallback, FactorOptions, adopt, left_whole, release
from efficientdnns.parts.proximal import apg_step, total_rate
from efficientdnns.parts.residual_blocks import Branch, residual_branches, scale_branch, without_branches
from efficientdnns.parts.structured import WidthCosts, holders, layer_names, weakest
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group
from efficientdnns.training import Callback, Trainer

FACTORS = "scaling_factors"


class SparseStructureSelection(FactorOptions):
    r"""Sparse structure selection, `Huang & Wang, ECCV 2018 <https://arxiv.org/abs/1707.01213>`_.

    Every structure that might go gets one scalar :math:`\lambda_i`, 1 at the start, that multiplies its output,

    .. math:: \min_{W, \lambda \ge 0} \frac{1}{N} \sum_i L(y_i, C(x_i, W, \lambda)) + R(W) + \gamma \|\lambda\|_1

    with weight decay R on W alone. Weights are trained as usual, :math:`\lambda` by an accelerated proximal gradient in
    momentum form (`efficientdnns.parts.proximal.apg_step`), which makes many of them exactly zero. At the end what is
    zero is deleted and the other factors are folded into weights, without any change of the outputs.

    ``level`` says what a structure is: ``channel`` (filters, neurons, heads: whatever surgery can remove; the factor acts
    where the channels are read, behind batch norm and activation), ``group`` (groups of grouped convolutions as in ResNeXt;
    behind their batch norm) or ``block`` (residual branches, :math:`r^{i+1} = r^i + \lambda^i F^i(r^i)`; the shortcut stays,
    so the first block of a stage can go too).

    Without a budget exactly the zeros go; with one the penalty decides what goes first (the smallest :math:`\lambda`,
    among equal ones the smallest weights) and the budget how many.

    Each step shrinks a factor by :math:`\eta\gamma`; the report has the total pull :math:`\gamma \sum_t \eta_t / (1 - \mu)`
    of the run, which has to exceed 1 by far.

    Deviations:
        Channels are scaled where they are read rather than behind their own batch norm, which is the same in front of a
        ReLU and works in residual streams too. Groups that something else than a linear layer or convolution reads
        (recurrent layers, fused attention) are left whole and named in the report. Where a layer norm averages over channels,
        its statistics change when zero ones go.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="sparse-structure-selection",
        title="Data-Driven Sparse Structure Selection for Deep Neural Networks",
        authors="Zehao Huang, Naiyan Wang",
        venue="ECCV",
        year=2018,
        url="https://arxiv.org/abs/1707.01213",
    )
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 2, "gamma": 0.05, "learning_rate": 0.02}

    epochs: Annotated[int, Field(ge=0)] = 100
    """Epochs of the run."""
    level: Literal["channel", "group", "block"] = "channel"
    """What has a factor: channels, groups of grouped convolutions, or residual branches."""
    gamma: NonNegativeFloat = 0.01
    """Strength of the L1 penalty on the factors."""
    factor_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """mu of the accelerated proximal gradient; 0 is plain iterative thresholding."""
    factor_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the factors; None: the same as the weights'."""

    def check_network(self, session: Session) -> None:
        if self.level == "channel":
            return super().check_network(session)
        if self.level == "group":
            groups = self.cardinalities(session)
            gone = {group.name: torch.arange(1, group.size) for group in groups}
            return require_reachable(session, self, lambda: without_groups(session.model, groups, gone))
        graph, branches = self.branches(session)
        return require_reachable(session, self, lambda: without_branches(session.model, graph, branches))

    def able(self, model: nn.Module, groups: Sequence[Group]) -> list[Group]:
        return gateable(model, groups)

    def branches(self, session: Session) -> tuple[ChannelGraph, list[Branch]]:
        """The residual branches that may go."""
        check_patterns(self.skip, layer_names(session.model), f"{self.name}: skip")
        graph = ChannelGraph.trace(session.model, session.example_input, verify=False)
        found = residual_branches(session.model, graph)
        branches = [b for b in found if not any(matches(name, self.skip) for name in (b.name, b.block, *b.layers))]
        if not branches:
            raise SurgeryError(
                f"{self.name}: {type(session.model).__name__} has no residual branches; write level=channel"
            )
        return graph, branches

    def cardinalities(self, session: Session) -> list[Group]:
        """The groups of grouped convolutions that may go, one `Group` for each convolution."""
        check_patterns(self.skip, layer_names(session.model), f"{self.name}: skip")
        found = cardinality_groups(session.model, ChannelGraph.trace(session.model, session.example_input))
        groups = [group for group in found if not matches(group.name, self.skip)]
        if not groups:
            raise SurgeryError(
                f"{self.name}: {type(session.model).__name__} has no grouped convolutions that can be thinned; "
                "write level=channel"
            )
        return groups

    def callback(self, session: Session) -> Callback:
        kinds = {"channel": ChannelFactors, "group": GroupFactors, "block": BlockFactors}
        return kinds[self.level](self, session)


class Factors(ChannelCallback):
    """Non-negative factors by name, moved by the accelerated proximal gradient instead of the optimizer."""

    method: SparseStructureSelection

    def add_factors(self, trainer: Trainer, sizes: Mapping[str, int]) -> None:
        """Give the network the factors, all 1."""
        values = adopt(trainer.model, FACTORS, [torch.ones(size, device=trainer.device) for size in sizes.values()])
        self.factors = dict(zip(sizes, values, strict=True))
        self.velocities = {name: torch.zeros_like(value) for name, value in self.factors.items()}
        self.zeros: list[dict[str, int]] = []

    def parameter_groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        rate = self.method.factor_learning_rate or trainer.settings.learning_rate
        return [{"params": list(self.factors.values()), "lr": rate, "weight_decay": 0.0}]

    def start(self, trainer: Trainer) -> None:
        method = self.method
        pull = method.gamma * total_rate(trainer, method.factor_learning_rate) / (1 - method.factor_momentum)
        self.session.report(pull=pull)
        if pull < 1:
            self.session.say(f"the penalty pulls factors down by {pull:.2f} in all, too little to reach zero from 1")

    @torch.no_grad()
    def after_backward(self, trainer: Trainer) -> None:
        own = next(iter(self.factors.values()))
        rate = next(g["lr"] for g in trainer.optimizer.param_groups if any(p is own for p in g["params"]))
        for name, value in self.factors.items():
            if value.grad is not None:
                moved, self.velocities[name] = apg_step(
                    value, value.grad, self.velocities[name], rate, self.method.gamma, self.method.factor_momentum
                )
                value.copy_(moved)
                value.grad = None  # the optimizer leaves it alone

    def epoch_end(self, trainer: Trainer) -> None:
        self.zeros.append({name: int((value == 0).sum()) for name, value in self.factors.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"velocities": self.velocities, "zeros": self.zeros}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.velocities = {name: value.to(self.session.device) for name, value in state["velocities"].items()}
        self.zeros = [dict(entry) for entry in state["zeros"]]

    def values(self) -> dict[str, Tensor]:
        """The factors as they are."""
        return {name: value.detach().cpu().clone() for name, value in self.factors.items()}

    def report_factors(self) -> None:
        """Zeros by structure at the end of every epoch."""
        self.session.report(
            zeros_by_epoch=self.zeros,
            zeros=sum(int((v == 0).sum()) for v in self.factors.values()),
            factors=sum(v.numel() for v in self.factors.values()),
        )


class ChannelFactors(Factors, FactorCallback):
    """Factors on channels."""

    method: SparseStructureSelection

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        self.add_factors(trainer, {group.name: group.size for group in self.groups})
        self.gates = ChannelGates(trainer.model, self.groups, self.factors).attach()

    def magnitudes(self, trainer: Trainer) -> dict[str, Tensor]:
        return self.values()

    def finish(self, trainer: Trainer) -> None:
        self.gates.detach()
        fold_gates(trainer.model, self.graph, self.groups, self.values())
        release(trainer.model, FACTORS)
        self.report_factors()
        self.session.report(no_factors=left_whole(self.graph, self.groups))
        super().finish(trainer)


class GroupFactors(Factors, FactorCallback):
    """Factors on the groups of grouped convolutions, behind their batch norm."""

    method: SparseStructureSelection

    def setup(self, trainer: Trainer) -> None:
        model = trainer.model
        self.groups = self.method.cardinalities(self.session)
        graph = ChannelGraph.trace(model, self.session.example_input, verify=False)
        norms = {group.name: graph.batch_norm_after(group.name) for group in self.groups}
        self.hosts = {name: norm or name for name, norm in norms.items()}
        self.add_factors(trainer, {group.name: group.size for group in self.groups})
        self.handles = [
            model.get_submodule(host).register_forward_hook(
                lambda _, inputs, output, name=name: output * self.repeated(name, output.shape[1], output.dim() - 2)
            )
            for name, host in self.hosts.items()
        ]

    def repeated(self, name: str, channels: int, positions: int) -> Tensor:
        """The factors of a convolution for each of its output channels."""
        factors = self.factors[name]
        return factors.repeat_interleave(channels // len(factors)).view(-1, *[1] * positions)

    def magnitudes(self, trainer: Trainer) -> dict[str, Tensor]:
        return self.values()

    def plan(self, scores: Scores) -> Plan:
        offer, model = self.method.offer(scores), self.session.model
        if not limits_of(self.session, self.method):
            return offer.at(self.method.pruning_ratio)
        return meet(
            self.session,
            self.method,
            propose=offer.propose,
            estimate=WidthCosts(self.session, model, offer.full, {g.name: holders(g) for g in self.groups}),
            build=lambda plan: without_groups(
                model, self.groups, {name: weakest(scores[name], len(scores[name]) - plan[name]) for name in scores}
            ),
            least=offer.least,
            full=offer.full,
        )

    @torch.no_grad()
    def finish(self, trainer: Trainer) -> None:
        session, model = self.session, trainer.model
        for handle in self.handles:
            handle.remove()
        for name, host in self.hosts.items():
            layer: Any = model.get_submodule(host)
            layer.weight.mul_(self.repeated(name, len(layer.weight), layer.weight.dim() - 1))
            if layer.bias is not None:
                layer.bias.mul_(self.repeated(name, len(layer.bias), 0))
        release(model, FACTORS)
        session.model = model
        selection = self.select(trainer)
        trainer.model = session.model = without_groups(model, self.groups, selection)
        self.report_factors()
        session.report(cardinality={g.name: [g.size, g.size - len(selection[g.name])] for g in self.groups})


class BlockFactors(Factors):
    """Factors on residual branches."""

    def setup(self, trainer: Trainer) -> None:
        self.graph, branches = self.method.branches(self.session)
        self.branches = {branch.name: branch for branch in branches}
        self.add_factors(trainer, dict.fromkeys(self.branches, 1))
        self.handles = [
            trainer.model.get_submodule(branch.last).register_forward_hook(
                lambda _, inputs, output, name=name: output * self.factors[name].to(output.dtype)
            )
            for name, branch in self.branches.items()
        ]

    def finish(self, trainer: Trainer) -> None:
        session = self.session
        for handle in self.handles:
            handle.remove()
        release(trainer.model, FACTORS)
        session.model = trainer.model
        values = {name: float(value) for name, value in self.values().items()}
        order = sorted(values, key=lambda name: (values[name], self.norm(trainer.model, self.branches[name])))
        for name, branch in self.branches.items():
            scale_branch(trainer.model, branch, values[name])
        plan = self.plan_of(order, values)
        gone = [name for name in self.branches if not plan[name]]
        trainer.model = session.model = without_branches(trainer.model, self.graph, [self.branches[n] for n in gone])
        self.report_factors()
        session.report(removed=gone, kept=[name for name in self.branches if plan[name]], values=values)

    @staticmethod
    def norm(model: nn.Module, branch: Branch) -> float:
        """What decides between branches of equal factor."""
        return float(model.get_parameter(f"{branch.last}.weight").detach().norm())

    def plan_of(self, order: Sequence[str], values: Mapping[str, float]) -> Plan:
        """1 for every branch that stays, 0 for every one that goes; the first of ``order`` go first."""
        least = dict.fromkeys(order, 0)
        offered = [Block((place + 1) / len(order), name, 1) for place, name in enumerate(order)]
        if not limits_of(self.session, self.method):
            plan = cut_at(least, offered, self.method.pruning_ratio)
            return {name: int(kept and values[name] > 0) for name, kept in plan.items()}
        return meet(
            self.session,
            self.method,
            propose=partial(fill, least, offered),
            estimate=BranchCosts(self.session, list(self.branches.values())),
            build=lambda plan: without_branches(
                self.session.model, self.graph, [branch for name, branch in self.branches.items() if not plan[name]]
            ),
            least=least,
            full=dict.fromkeys(order, 1),
        )


class BranchCosts:
    """Costs of a network without some of its branches, by adding up what their layers cost."""

    def __init__(self, session: Session, branches: Sequence[Branch]) -> None:
        model = session.model
        macs = count_macs(model, session.task.example_input, session.task.outputs)
        self.macs = {b.name: sum(macs.by_module.get(name, 0.0) for name in b.layers) for b in branches}
        self.params = {
            b.name: sum(p.numel() for n in b.layers for p in model.get_submodule(n).parameters(recurse=False))
            for b in branches
        }
        self.all_macs, self.all_params = float(macs.total), sum(p.numel() for p in model.parameters())

    def __call__(self, plan: Plan) -> dict[str, float]:
        gone = [name for name, kept in plan.items() if not kept]
        macs = self.all_macs - sum(self.macs[name] for name in gone)
        params = float(self.all_params - sum(self.params[name] for name in gone))
        return {"macs": macs, "params": params, "bytes": 4 * params, "latency": macs}
