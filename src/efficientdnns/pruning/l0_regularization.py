"""L0 regularization: stochastic gates on neurons and filters learn, in one run, which of them the network needs.

The expected number of non-zero parameters is penalised directly; what has closed is removed at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from efficientdnns.budget import Plan, blocks, fill, widths
from efficientdnns.errors import ConfigurationError
from efficientdnns.measurement.macs import count_macs
from efficientdnns.method import Paper, TrainingMethod
from efficientdnns.parts.budgets import costs, limits_of, meet, require_reachable, targets_of
from efficientdnns.parts.dead import remove_dead_channels, remove_dead_inputs, remove_without_effect
from efficientdnns.parts.gate import HardConcrete
from efficientdnns.parts.gated import Gated, folded, gate_inputs, gate_outputs, gates_of
from efficientdnns.parts.select import by_pattern, largest_mask, layer_weights, without
from efficientdnns.parts.structured import Holder, WidthCosts, holders
from efficientdnns.surgery import ChannelGraph, Group
from efficientdnns.training import Callback, ExponentialMovingAverage, Trainer

if TYPE_CHECKING:
    from efficientdnns.session import Session

_LAYERS = nn.Linear, nn.modules.conv._ConvNd
Share = Annotated[float, Field(gt=0, lt=1)]


def expected_l0(layers: list[Gated]) -> Tensor:
    r"""Expected number of open parameters, :math:`\sum_g |g| P(z_g \neq 0)`."""
    return torch.stack([item.gate.probability_open().sum() * item.group_size() for item in layers]).sum()


def l0_penalty(layers: list[Gated], samples: int, weight_decay: float = 0.0) -> Tensor:
    r""":math:`\sum_g P(z_g \neq 0) (\lambda |g| + \frac{wd}{2} \|w_g\|^2)` plus :math:`\frac{wd}{2}\|b\|^2`.

    Args:
        layers: the gated layers; their ``strength`` is :math:`\lambda N`.
        samples: N, the size of the training set.
        weight_decay: wd, the coefficient in force (not divided by N).
    """
    terms = []
    for item in layers:
        cost: Tensor | float = item.strength / samples * item.group_size()
        if weight_decay:
            cost = cost + weight_decay / 2 * item.squares()
            if item.on_inputs and item.layer.bias is not None:
                terms.append(weight_decay / 2 * item.layer.bias.square().sum())
        terms.append((item.gate.probability_open() * cost).sum())
    return torch.stack(terms).sum()


class L0Regularization(TrainingMethod):
    r"""L0 regularization, `Louizos et al., 2018 <https://arxiv.org/abs/1712.01312>`_.

    Every group g of weights (an input of a linear layer, an output map of a convolution) is multiplied by a hard
    concrete gate :math:`z_g \in [0, 1]` (`efficientdnns.parts.gate.HardConcrete`) with a learned :math:`\log\alpha_g`:

    .. math::
        \frac{1}{N} \sum_i L(h(x_i; \theta z), y_i) + \sum_g P(z_g \neq 0)
        \Big(\lambda |g| + \frac{wd}{2} \|\theta_g\|^2\Big), \qquad
        P(z_g \neq 0) = \sigma\Big(\log\alpha_g - \beta \log\frac{-\gamma}{\zeta}\Big)

    One sample of the gates a batch; at test time :math:`\hat z`. At the end the gates are folded into the weights and
    what is closed is removed: neurons and filters with all that reads them, single inputs by a selection in front of
    the layer. The report has the open gates of each layer, the expected number of parameters and the expected FLOPs
    (:math:`2\, \mathrm{MACs} \cdot \overline{P}` of a layer).

    Which layers: all linear ones, and the convolutions whose output maps no other layer adds to (of a residual block the
    first ones), or of an expanding and a depthwise one the latter, whose gates switch both; with a mapping for ``strength``
    exactly those that it names. Behind a convolution's batch norm the gates act on its output, for it would undo a scale in
    front.

    Under a budget the penalty rests while the open gates are within it, and at the end the gates of largest
    :math:`\log\alpha` stay that it allows; if more may stay than are open, all :math:`\log\alpha` move up by one number.

    Deviations:
        Depthwise convolutions are not in the paper; their gates cost what they themselves hold. The bias of a filter is gated
        with it and costs as much as a weight (the released code drops it in training and rewards it in the penalty).
        ``weight_decay`` is the coefficient in force in every layer (the released LeNet-5 divides it by N).
        ``gate_learning_rate`` is ours; larger than the learning rate it closes gates in fewer epochs. A trained network is
        tuned as it is unless ``from_scratch``, which the paper always does.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="l0-regularization",
        title="Learning Sparse Neural Networks through L0 Regularization",
        authors="Christos Louizos, Max Welling, Diederik P. Kingma",
        venue="ICLR",
        year=2018,
        url="https://arxiv.org/abs/1712.01312",
    )
    kind: ClassVar[str] = "pruning"
    budgets: ClassVar[frozenset[str]] = frozenset({"macs", "params", "bytes", "latency"})
    contract_fields: ClassVar[dict[str, Any]] = {
        "epochs": 2, "strength": 0.002, "gate_learning_rate": 0.5, "ema_decay": 0.9, "learning_rate": 0.01
    }  # fmt: skip

    epochs: Annotated[int, Field(ge=0)] = 200
    """Epochs of the run."""
    strength: NonNegativeFloat | dict[str, NonNegativeFloat] = 0.1
    """lambda N, one number or by name pattern: the paper's 0.1 is for N = 60,000; with fewer samples take less."""
    drop_rate: Share | dict[str, Share] = 0.5
    """Initial probability p that a gate is low, one number or by name pattern (0.5 where none fits); 0.2 to 0.5."""
    skip: tuple[str, ...] = ()
    """Layers to leave alone, by name pattern such as ``fc3`` or ``layer1.*``."""
    round_to: PositiveInt = 1
    """Every layer keeps a multiple of this many gates, or all of them; for that some that closed last are opened a bit."""
    temperature: Share = 2 / 3
    """beta of the hard concrete distribution."""
    gamma: Annotated[float, Field(lt=0)] = -0.1
    """Lower end of the stretched interval."""
    zeta: Annotated[float, Field(gt=1)] = 1.1
    """Upper end of the stretched interval."""
    weight_decay: NonNegativeFloat = 5e-4
    """wd: L2 coefficient in the penalty, weighted by the gates; the optimizer itself decays nothing."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the average of all parameters that is validated and handed over; 0 takes the last ones."""
    gate_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the gates; None: the same as the weights'."""
    per_sample: bool = False
    """Draw the gates for every sample instead of for every batch."""
    from_scratch: bool = False
    """Start from fresh weights: normal with variance 2 / fan-in, biases zero."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "weight_decay": 0.0}

    def check(self, session: Session) -> None:
        super().check(session)
        self.hosts(session.model, session.example_input)

    def check_network(self, session: Session) -> None:
        if limits_of(session, self):
            model, hosts = session.model, self.hosts(session.model, session.example_input)
            names = {name: host for name, (host, _) in hosts.items()}
            sizes = {name: gates_of(model.get_submodule(name)) for name in names}
            least = {name: widths(size, self.round_to)[0] for name, size in sizes.items()}
            values = {name: (torch.arange(size) < least[name]).float() for name, size in sizes.items()}
            require_reachable(session, self, lambda: self.small(session, model, names, values))

    def prepare(self, session: Session) -> None:
        if self.from_scratch:
            for module in session.model.modules():
                if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def callback(self, session: Session) -> Callback:
        return L0(self, session)

    def small(
        self, session: Session, model: nn.Module, hosts: Mapping[str, str], values: Mapping[str, Tensor]
    ) -> nn.Module:
        """The network with these gate values folded in, without what closed gates switch off."""
        closed = {
            name: (values[name] == 0).nonzero().flatten()
            for name in hosts
            if isinstance(layer := model.get_submodule(name), nn.modules.conv._ConvNd) and layer.groups > 1
        }
        # What is made for a depthwise convolution is not zero itself, but goes with what the gates switch off.
        cut = remove_without_effect(folded(model, hosts, values), session.example_input, closed)
        cut = remove_dead_channels(cut, session.example_input, self.round_to)
        return remove_dead_inputs(cut, hosts, self.round_to)

    def hosts(self, model: nn.Module, example_input: Any) -> dict[str, tuple[str, float]]:
        """For each layer that gets gates the module that carries them and its strength.

        Raises:
            ConfigurationError: a pattern fits no layer, or no layer can be gated.
        """
        graph = ChannelGraph.trace(model, example_input)
        alone = {makers[-1] for group in graph.groups if (makers := _makers(model, graph, group))}
        hosts: dict[str, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hosts[name] = name
            elif _depthwise(module):
                if name in alone:
                    hosts[name] = graph.batch_norm_after(name) or name
            elif isinstance(module, _LAYERS[1]) and module.groups == 1 and not module.transposed:
                hosts[name] = graph.batch_norm_after(name) or name
        # A batch norm without scale and shift has nothing to fold the gates into.
        hosts = {n: h for n, h in hosts.items() if getattr(model.get_submodule(h), "weight", None) is not None}
        hosts = without(hosts, self.skip, f"{self.name}: skip")
        if isinstance(self.strength, dict):
            strengths = by_pattern(self.strength, hosts, f"{self.name}: strength")
        else:
            kept = [n for n in hosts if n in alone or isinstance(model.get_submodule(n), nn.Linear)]
            strengths = dict.fromkeys(kept, self.strength)
        if not strengths:
            raise ConfigurationError(f"{self.name}: {type(model).__name__} has no linear layer or convolution to gate")
        return {name: (hosts[name], value) for name, value in strengths.items()}


def _makers(model: nn.Module, graph: ChannelGraph, group: Group) -> list[str]:
    """What makes the channels of a group before anything is added to them: a layer by itself, or one and the depthwise
    convolutions behind it, of which the last decides; empty where there is something else. What the channels are multiplied
    with, as in squeeze-and-excitation, follows them.
    """
    held = {member.module for member in group.members if member.role != "in"}
    names = [name for name in graph.order if name in held and isinstance(model.get_submodule(name), _LAYERS)]
    deep = [name for name in names if _depthwise(model.get_submodule(name))]
    if not deep:
        return names if len(names) == 1 else []
    last = names.index(deep[-1])
    chain = names[1 : last + 1] == deep and (last == 0 or not _bypassed(graph, group, names[0], names[last]))
    return names[: last + 1] if chain else []


def _bypassed(graph: ChannelGraph, group: Group, first: str, last: str) -> bool:
    """Whether the channels that ``first`` makes are also read without passing through ``last``, as a residual stream."""
    read = {member.tensor for member in group.members if member.role == "in"}
    reached: set[str] = set()
    for node in graph.nodes:
        if f"{first}.weight" in node.parameters:
            reached.add(node.name)
        elif reached.intersection(node.inputs) and f"{last}.weight" not in node.parameters:
            if read.intersection(node.parameters):
                return True
            reached.add(node.name)
    return False


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS[1]) and 1 < module.groups == module.in_channels == module.out_channels


class L0(Callback):
    """The run: gates in the forward pass, their price in the loss, an average of everything for the hand-over."""

    structural = True

    def __init__(self, method: L0Regularization, session: Session) -> None:
        self.method, self.session = method, session
        self.layers: list[Gated] = []
        self.plain: list[nn.Parameter] = []
        self.handles: list[RemovableHandle] = []
        self.average: ExponentialMovingAverage | None = None
        self.limits: dict[str, float] = {}

    def setup(self, trainer: Trainer) -> None:
        m, model = self.method, trainer.model
        hosts = m.hosts(model, self.session.example_input)
        self.hosts = {name: host for name, (host, _) in hosts.items()}
        if limits_of(self.session, m):
            self._set_limits(model)
        given = m.drop_rate if isinstance(m.drop_rate, dict) else {"*": m.drop_rate}
        rates = by_pattern(given, hosts, f"{m.name}: drop_rate")
        for name, (host_name, strength) in hosts.items():
            layer, host = model.get_submodule(name), model.get_submodule(host_name)
            assert isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
            gate = HardConcrete(gates_of(layer), rates.get(name, 0.5), m.temperature, m.gamma, m.zeta)
            host.add_module("gate", gate.to(trainer.device))
            self.layers.append(Gated(name, layer, host, strength))
            if isinstance(layer, nn.Linear):
                self.handles.append(host.register_forward_pre_hook(partial(gate_inputs, per_sample=m.per_sample)))
            else:
                self.handles.append(host.register_forward_hook(partial(gate_outputs, per_sample=m.per_sample)))
        gated = {id(item.layer) for item in self.layers}
        self.plain = [
            p
            for module in model.modules()
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.RNNBase) and id(module) not in gated
            for p in module.parameters(recurse=False)
        ]
        if m.ema_decay:
            self.average = ExponentialMovingAverage(model.named_parameters(), m.ema_decay)

    def parameter_groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        if self.method.gate_learning_rate is None:
            return []
        return [{"params": [item.gate.log_alpha for item in self.layers], "lr": self.method.gate_learning_rate}]

    def penalty(self, trainer: Trainer) -> Tensor:
        decay = self.method.weight_decay
        layers = self.layers if self._over() else [replace(item, strength=0.0) for item in self.layers]
        penalty = l0_penalty(layers, trainer.samples, decay)
        if decay and self.plain:
            penalty = penalty + decay / 2 * torch.stack([p.square().sum() for p in self.plain]).sum()
        return penalty

    def after_step(self, trainer: Trainer) -> None:
        for item in self.layers:
            item.gate.clamp()
        if self.average is not None:
            self.average.update()

    def validation(self, trainer: Trainer) -> AbstractContextManager[None]:
        return self.average.applied() if self.average is not None else nullcontext()

    def finish(self, trainer: Trainer) -> None:
        if self.average is not None:
            self.average.copy_to_parameters()
        for handle in self.handles:
            handle.remove()
        self._report(trainer)
        values = self._values(self._plan(trainer.model) if self.limits else self._rounded())
        trainer.model = self.method.small(self.session, trainer.model, self.hosts, values)
        # Where closed groups could not be removed, and under the new names of layers that were sparse before.
        self.session.sparse.update(name for name, weight in layer_weights(trainer.model).items() if not weight.all())

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict() if self.average is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.average is not None:
            self.average.load_state_dict(state)

    def _set_limits(self, model: nn.Module) -> None:
        """The limits as shares of what the whole network costs, and an estimate of these costs from the open gates."""
        graph, layers = ChannelGraph.trace(model, self.session.example_input), dict(model.named_modules())
        held: dict[str, list[Holder]] = {name: [] for name in self.hosts}
        for name in self.hosts:
            if isinstance(layers[name], nn.Linear):
                held[name] = [(f"{name}.weight", 1, 1)]
        for group in graph.groups:
            # A unit goes with the gate of the filter that makes it, or of the one input that reads it.
            makers, readers = _makers(model, graph, group), graph.consumers(group)
            if makers and makers[-1] in held and not isinstance(layers[makers[-1]], nn.Linear):
                flattened = {f"{r}.weight" for r in readers if r in held and isinstance(layers[r], nn.Linear)}
                held[makers[-1]] = [holder for holder in holders(group) if holder[0] not in flattened]
            elif len(readers) == 1 and readers[0] in held and (f"{readers[0]}.weight", 1, 1) in holders(group):
                held[readers[0]] = holders(group)
        self.full = {name: gates_of(layers[name]) for name in self.hosts}
        self.estimate = WidthCosts(self.session, model, self.full, held)
        targets, whole = targets_of(self.session, self.method), self.estimate(self.full)
        now = costs(self.session, model, list(targets))
        self.limits = {name: target / now[name] * whole[name] for name, target in targets.items()}

    @torch.no_grad()
    def _over(self) -> bool:
        """Whether the gates that are open now cost more than the budget allows; always true without one."""
        if not self.limits:
            return True
        got = self.estimate({item.name: int(item.gate.deterministic().count_nonzero()) for item in self.layers})
        return any(got[name] > limit for name, limit in self.limits.items())

    @torch.no_grad()
    def _rounded(self) -> Plan:
        """How many gates of every layer stay without a budget: those that are open, and up to the next width."""
        opened = {item.name: int(item.gate.deterministic().count_nonzero()) for item in self.layers}
        allowed = {item.name: widths(len(item.gate.log_alpha), self.method.round_to) for item in self.layers}
        if self.method.round_to == 1:
            return opened
        return {name: next(width for width in allowed[name] if width >= count) for name, count in opened.items()}

    def _plan(self, model: nn.Module) -> Plan:
        """How many gates of every layer the budget leaves open."""
        offered = [
            block
            for item in self.layers
            for block in blocks(item.name, item.gate.log_alpha.detach().sort().values.tolist(), self.method.round_to)
        ]
        least = {name: widths(size, self.method.round_to)[0] for name, size in self.full.items()}
        return meet(
            self.session,
            self.method,
            propose=lambda fits, enough: fill(least, offered, fits, enough),
            estimate=self.estimate,
            build=lambda plan: self.method.small(self.session, model, self.hosts, self._values(plan)),
            least=least,
            full=self.full,
        )

    @torch.no_grad()
    def _values(self, plan: Plan) -> dict[str, Tensor]:
        """Test-time gates of which so many are open in each layer."""
        just_open = self.layers[0].gate.threshold + 0.1
        shift = 0.0
        if self.limits:
            # Everything moves up until the first gate of every layer's last block is open.
            first = {name: (kept - 1) // self.method.round_to * self.method.round_to for name, kept in plan.items()}
            alphas = {item.name: item.gate.log_alpha.sort(descending=True).values for item in self.layers}
            shift = max(0.0, just_open - min(float(alphas[name][at]) for name, at in first.items()))
        lowest = just_open if self.limits or self.method.round_to > 1 else -math.inf
        return {
            item.name: item.gate.deterministic(shift, lowest) * largest_mask(item.gate.log_alpha, plan[item.name])
            for item in self.layers
        }

    @torch.no_grad()
    def _report(self, trainer: Trainer) -> None:
        task = self.session.task
        # Counted with the gates in place but at work nowhere: the hooks are gone.
        macs = count_macs(trainer.model, task.example_input, task.outputs).by_module
        flops = {name: 2.0 * count for name, count in macs.items()}
        for item in self.layers:
            flops[item.name] = flops.get(item.name, 0.0) * float(item.gate.probability_open().mean())
        self.session.report(
            open={
                item.name: [int(item.gate.deterministic().count_nonzero()), len(item.gate.log_alpha)]
                for item in self.layers
            },
            expected_l0=float(expected_l0(self.layers)),
            expected_flops=sum(flops.values()),
        )
