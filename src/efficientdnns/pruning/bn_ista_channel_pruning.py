"""BN-ISTA: soft-thresholding drives batch-norm scales to exactly zero, so that channels become constants.

What a constant channel contributes moves into the layers that read it, and the channel goes without a trace.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from efficientdnns.method import Paper
from efficientdnns.parts.channel_gates import ChannelGates, fold_gates, gateable
from efficientdnns.parts.constant_channels import inputs_of, move_constants, noise_like, readers
from efficientdnns.parts.learned_factors import FactorCallback, FactorOptions, adopt, left_whole, release
from efficientdnns.parts.proximal import ista_step, total_rate
from efficientdnns.parts.structured import Selection
from efficientdnns.parts.tap import Forward, call, evaluating
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group
from efficientdnns.training import Callback, Trainer

FACTORS = "scaling_factors"
Positions = Mapping[str, int]
"""Module path -> positions of its output map (height x width, tokens); ``""`` for the network's input."""


@torch.no_grad()
def map_positions(model: nn.Module, example_input: Any, forward: Forward = call) -> dict[str, int]:
    """Positions of the output maps of all convolutions and linear layers, and of the network's input under ``""``."""
    found: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            convolution = isinstance(module, nn.modules.conv._ConvNd)
            found[name] = output[0, 0].numel() if convolution else output[0, ..., 0].numel()

        return hook

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    handles = [module.register_forward_hook(note(name)) for name, module in layers.items()]
    try:
        with evaluating(model):
            forward(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    first = next(x for x in tree_leaves(example_input) if isinstance(x, Tensor))
    return found | {"": first[0, 0].numel() if first.dim() > 2 else first[0].numel() if first.dim() == 2 else 1}


def memory_cost(
    group: Group,
    shapes: Mapping[str, Sequence[int]],
    positions: Positions,
    gone: Mapping[str, Mapping[int, float]] | None = None,
) -> float:
    r"""What one channel of a group costs in memory, in units of the input map.

    .. math:: \lambda_l = \frac{1}{I_w I_h} \Big( I_w^l I_h^l + k_l^2 c_{l-1} + \sum_{l'} k_{l'}^2 c_{l'} \Big)

    its maps, the weights that make it and those that read it; where several layers write the channel, all of them.

    Args:
        group: the channels.
        shapes: of parameters, by name.
        positions: see `map_positions`.
        gone: share of the entries that is switched off along each dimension of a parameter.
    """
    total = float(
        sum(positions.get(name, 1) for name in dict.fromkeys(m.module for m in group.members if m.role == "out"))
    )
    for member in group.members:
        shape = shapes.get(member.tensor, ())
        if len(shape) > 1:
            entries = float(member.index.shape[1])
            for dim, size in enumerate(shape):
                if dim != member.dim:
                    entries *= size * (1 - (gone or {}).get(member.tensor, {}).get(dim, 0.0))
            total += entries
    return total / positions[""]


class BNISTAChannelPruning(FactorOptions):
    r"""BN-ISTA channel pruning, `Ye et al., ICLR 2018 <https://arxiv.org/abs/1802.00124>`_.

    The scales :math:`\gamma_l` of batch norm are moved by proximal gradient steps, everything else as usual,

    .. math:: \gamma_l \leftarrow S_{\mu_t \lambda_l \rho}\Big(\gamma_l - \mu_t \frac{\partial L}{\partial \gamma_l}\Big),
        \qquad S_a(v) = \mathrm{sign}(v) \max(|v| - a, 0)

    with the learning rate :math:`\mu_t`, without momentum and weight decay, and with :math:`\lambda_l` the memory that one
    channel of layer l costs (`memory_cost`). A channel of :math:`\gamma = 0` is the constant :math:`\kappa = f(\beta)`; its
    readers take over :math:`\delta_j = \sum_k \kappa_k \sum_{uv} W_{jkuv}`, in the running mean of the batch norm behind
    them (minus) or in their bias (plus), and it is removed. ``alpha`` < 1 shortens the way for a trained network:
    :math:`\gamma` and :math:`\beta` are scaled by it and the readers by :math:`1 / \alpha` before training, which changes no
    output, and back at the end.

    Without a budget exactly the zeros go; with one the smallest :math:`|\gamma|` go first, as many as it demands.

    A scale of size g cannot come to zero unless :math:`\rho \lambda_l \sum_t \mu_t` (reported as ``pull``) exceeds it.

    Deviations:
        Where no batch norm alone scales the channels of a group last (none is there, or they are the sum of a residual
        stream, which the paper leaves whole), a gate on the channels in front of the layers that read them takes the place of
        :math:`\gamma`; its zero contributes nothing. Groups that are not read by linear layers and convolutions alone are
        left whole and named in the report. Behind activations that are not positively homogeneous ``alpha`` is not used.
        With zero padding the constants taken over are exact but for the border, as in the paper.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="bn-ista-channel-pruning",
        title="Rethinking the Smaller-Norm-Less-Informative Assumption in Channel Pruning of Convolution Layers",
        authors="Jianbo Ye, Xin Lu, Zhe Lin, James Z. Wang",
        venue="ICLR",
        year=2018,
        url="https://arxiv.org/abs/1802.00124",
    )
    contract_fields: ClassVar[dict[str, Any]] = {"epochs": 2, "rho": 0.05, "cost": "uniform", "learning_rate": 0.02}

    epochs: Annotated[int, Field(ge=0)] = 100
    """Epochs of the run."""
    rho: NonNegativeFloat = 0.005
    """Strength of the penalty; raise it until zeros appear."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Rescaling of a trained network's scales: 1, 0.1, 0.01, 0.001; smaller is faster."""
    cost: Literal["memory", "uniform"] = "memory"
    """lambda_l: the memory of a channel, or 1."""
    refresh_cost: bool = True
    """Whether lambda_l counts only the channels that are not at zero, anew in every epoch."""
    constants: Literal["absorbed", "dropped"] = "absorbed"
    """What becomes of the constants of removed channels; dropping them is a control."""

    def able(self, model: nn.Module, groups: Sequence[Group]) -> list[Group]:
        return gateable(model, groups)

    def callback(self, session: Session) -> Callback:
        return ThresholdedScales(self, session)


class ThresholdedScales(FactorCallback):
    """Thresholds the scales after each step, and removes what is constant."""

    method: BNISTAChannelPruning

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        model, session = trainer.model, self.session
        self.norms = scaling_norms(model, self.graph, self.groups, session.example_input, session.task.outputs)
        gated = [group for group in self.groups if group.name not in self.norms]
        gates = adopt(model, FACTORS, [torch.ones(group.size, device=trainer.device) for group in gated])
        self.gates = ChannelGates(model, gated, {g.name: p for g, p in zip(gated, gates, strict=True)})
        self.gates.attach()
        self.scales = {
            name: model.get_parameter(f"{norm}.weight") for name, norm in self.norms.items()
        } | self.gates.gates
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.positions = map_positions(model, session.example_input, session.task.outputs)
        self.costs = self.channel_costs()
        self.zeros: list[dict[str, int]] = []
        self.rescaled: list[str] = []

    def parameter_groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        return [{"params": list(self.scales.values()), "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}]

    def start(self, trainer: Trainer) -> None:
        method, session, alpha = self.method, self.session, self.method.alpha
        if alpha < 1:
            for group in self.groups:
                norm = self.norms.get(group.name)
                if norm is None or homogeneous(trainer.model, group, norm, session.example_input, session.task.outputs):
                    self.rescale(trainer.model, group, alpha)
                    self.rescaled.append(group.name)
        total = total_rate(trainer) * method.rho
        pull = {name: total * cost for name, cost in self.costs.items()}
        self.session.report(pull=pull, costs=self.costs)
        weak = [name for name, value in pull.items() if value < float(self.scales[name].detach().abs().min())]
        if weak and method.rho:
            self.session.say(
                f"the penalty is too weak to reach zero in {', '.join(weak)} unless the loss helps; raise rho"
            )

    @torch.no_grad()
    def after_backward(self, trainer: Trainer) -> None:
        own = next(iter(self.scales.values()))
        rate = next(g["lr"] for g in trainer.optimizer.param_groups if any(p is own for p in g["params"]))
        for name, scale in self.scales.items():
            if scale.grad is not None:
                # Adding zero turns -0.0 into 0.0.
                scale.copy_(ista_step(scale, scale.grad, rate, self.method.rho * self.costs[name]) + 0.0)
                scale.grad = None  # the optimizer leaves it alone

    def epoch_end(self, trainer: Trainer) -> None:
        self.zeros.append({name: int((scale == 0).sum()) for name, scale in self.scales.items()})
        if self.method.refresh_cost:
            self.costs = self.channel_costs()

    def channel_costs(self) -> dict[str, float]:
        """lambda_l of every group, with the channels that are at zero now."""
        if self.method.cost == "uniform":
            return {group.name: 1.0 for group in self.groups}
        gone: dict[str, dict[int, float]] = {}
        for group in self.groups:
            zero = int((self.scales[group.name] == 0).sum())
            for member in group.members:
                if zero and member.tensor in self.shapes:
                    dims = gone.setdefault(member.tensor, {})
                    share = zero * member.index.shape[1] / self.shapes[member.tensor][member.dim]
                    dims[member.dim] = dims.get(member.dim, 0.0) + share
        return {group.name: memory_cost(group, self.shapes, self.positions, gone) for group in self.groups}

    def magnitudes(self, trainer: Trainer) -> dict[str, Tensor]:
        return {name: scale.detach().abs().cpu() for name, scale in self.scales.items()}

    def rescale(self, model: nn.Module, group: Group, alpha: float) -> None:
        """Scales times alpha, readers divided by it."""
        rescale(model, group, self.norms.get(group.name), alpha)
        if group.name not in self.norms:
            with torch.no_grad():
                self.scales[group.name].mul_(alpha)

    def state_dict(self) -> dict[str, Any]:
        return {"zeros": self.zeros, "costs": self.costs, "rescaled": self.rescaled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.zeros = [dict(entry) for entry in state["zeros"]]
        self.costs, self.rescaled = dict(state["costs"]), list(state["rescaled"])

    def select(self, trainer: Trainer) -> Selection:
        selection, model, session = super().select(trainer), trainer.model, self.session
        constant = [group for group in self.groups if group.name in self.norms and len(selection[group.name])]
        for group in constant:
            set_scales(model, group, self.norms[group.name], selection[group.name])
        if self.method.constants == "absorbed" and constant:
            move_constants(model, self.graph, constant, selection, session.example_input, session.task.outputs)
            # Readers may have got a bias of their own, which the old graph does not know.
            self.graph = ChannelGraph.trace(model, session.example_input)
        return selection

    def finish(self, trainer: Trainer) -> None:
        for group in self.groups:
            if group.name in self.rescaled:
                self.rescale(trainer.model, group, 1 / self.method.alpha)
        self.gates.detach()
        gates = {name: gate.detach() for name, gate in self.gates.gates.items()}
        fold_gates(trainer.model, self.graph, self.groups, gates)
        release(trainer.model, FACTORS)
        values = list(self.scales.values())
        self.session.report(
            zeros_by_epoch=self.zeros,
            zeros=sum(int((v == 0).sum()) for v in values),
            factors=sum(v.numel() for v in values),
            batch_norms=self.norms,
            gated=[name for name in self.scales if name not in self.norms],
            no_factors=left_whole(self.graph, self.groups),
            rescaled=self.rescaled,
        )
        super().finish(trainer)


def scaling_norms(
    model: nn.Module, graph: ChannelGraph, groups: Sequence[Group], example_input: Any, forward: Forward = call
) -> dict[str, str]:
    """For each group the batch norm whose scale alone decides whether its channels vary where they are read.

    It is the last one on the way. Left out are groups whose channels still vary at some reader when that scale is zero (a
    residual stream, several norms side by side), norms that scale other channels too, and groups that a layer norm
    averages over.
    """
    found: dict[str, str] = {}
    for group in groups:
        norms = [
            m.module
            for m in group.members
            if m.attribute == "weight" and isinstance(model.get_submodule(m.module), nn.modules.batchnorm._BatchNorm)
        ]
        last = max(norms, key=graph.order.index, default=None)
        if last is None or group.in_statistics or len(model.get_parameter(f"{last}.weight")) != group.size:
            continue
        weight = model.get_parameter(f"{last}.weight")
        before = weight.detach().clone()
        set_scales(model, group, last, torch.arange(group.size))
        seen = inputs_of(model, readers([group]), example_input, forward)
        spreads = [seen[m.module][1].cpu()[m.index] for m in group.members if m.role == "in"]
        with torch.no_grad():
            weight.copy_(before)
        if all(float(spread.max()) < 1e-6 for spread in spreads):
            found[group.name] = last
    return found


def norm_entries(group: Group, norm: str) -> Tensor:
    """(size,) positions of the channels of a group in the vectors of a batch norm."""
    return next(m.index[:, 0] for m in group.members if m.module == norm and m.attribute == "weight")


@torch.no_grad()
def set_scales(model: nn.Module, group: Group, norm: str, units: Tensor) -> None:
    """Set the scales of these channels to zero: they become constants."""
    weight = model.get_parameter(f"{norm}.weight")
    weight.index_fill_(0, norm_entries(group, norm)[units].to(weight.device), 0.0)


@torch.no_grad()
def rescale(model: nn.Module, group: Group, norm: str | None, alpha: float) -> None:
    r""":math:`\gamma \leftarrow \alpha\gamma, \beta \leftarrow \alpha\beta, W_{l'} \leftarrow W_{l'} / \alpha`.

    The outputs stay as they are where all between the batch norm and the readers is positively homogeneous (ReLU,
    pooling); ``1 / alpha`` undoes it. Without ``norm`` only the readers are divided.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if norm is not None:
        entries = norm_entries(group, norm)
        for name in (f"{norm}.weight", f"{norm}.bias"):
            if name in parameters:
                parameters[name][entries.to(parameters[name].device)] *= alpha
    for member in group.members:
        if member.role == "in":
            weight = parameters[member.tensor].movedim(member.dim, 0)
            weight[member.index.flatten().to(weight.device)] /= alpha


@torch.no_grad()
def homogeneous(model: nn.Module, group: Group, norm: str, example_input: Any, forward: Forward = call) -> bool:
    """Whether `rescale` leaves the outputs as they are."""
    inputs, scaled = noise_like(example_input), copy.deepcopy(model)
    rescale(scaled, group, norm, 16.0)  # far enough for ReLU6 to show
    with evaluating(model), evaluating(scaled):
        pairs = zip(tree_leaves(forward(model, inputs)), tree_leaves(forward(scaled, inputs)), strict=True)
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max())) for a, b in pairs)
