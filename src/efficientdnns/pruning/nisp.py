"""NISP: importance of the final responses is carried back through the absolute weights to every channel.

The channels of lowest importance are then cut in all layers at once, and the network is fine-tuned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from efficientdnns.budget import Plan
from efficientdnns.errors import ModelError
from efficientdnns.method import Method, Need, Paper, Ratio
from efficientdnns.parts.structured import (
    Scope,
    Selection,
    Widths,
    cut,
    kept_report,
    kept_widths,
    prunable,
    require_widths,
    weakest,
)
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group


def infinite_feature_selection(responses: Tensor, alpha: float = 0.5) -> Tensor:
    r"""Inf-FS scores of the columns of ``responses`` (samples, features).

    .. math:: A_{pq} = \alpha \max(\sigma_p, \sigma_q) + (1-\alpha)(1 - |\mathrm{Spearman}(p,q)|), \quad
              S = (I - rA)^{-1} - I, \quad r = 0.9 / \rho(A), \quad s = S \mathbf 1

    The matrix of standard deviations is min-max normalised (0 where all are equal). Constant features get the lowest
    score. Computed in float64: the inverse is unstable below.
    """
    x = responses.double()
    deviation = x.std(0)
    constant = deviation < 1e-12
    spread = torch.maximum(deviation[:, None], deviation[None, :])
    low, high = spread.min(), spread.max()
    spread = (spread - low) / (high - low) if high - low > 1e-9 * high else torch.zeros_like(spread)
    a = alpha * spread + (1 - alpha) * (1 - spearman(x).abs())
    r = 0.9 / torch.linalg.eigvalsh(a).abs().max().clamp_min(1e-12)
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    scores = (torch.linalg.inv(eye - r * a) - eye).sum(1)
    return torch.where(constant, scores[~constant].min() if (~constant).any() else torch.zeros_like(scores), scores)


def spearman(x: Tensor) -> Tensor:
    """Rank correlation of the columns, with mean ranks for ties; 0 for constant columns."""
    ranks = torch.stack([_mean_ranks(column) for column in x.T], 1)
    centred = ranks - ranks.mean(0)
    norm = centred.norm(dim=0).clamp_min(1e-12)
    return (centred.T @ centred) / (norm[:, None] * norm[None, :])


def _mean_ranks(column: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(column, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


class AbsoluteLinear(TorchFunctionMode):
    """Runs a network as the linear map of absolute weights, whose gradient carries importance backwards.

    Convolutions and linear layers use |W| without bias, batch norm is the diagonal |gamma| / sqrt(var + eps), pooling
    spreads evenly, activations, dropout and normalisation of activations are the identity, and a product of two
    activations passes each on scaled by the other's absolute value.
    """

    IDENTITY = frozenset(
        {"relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "gelu", "silu", "mish", "hardswish", "hardtanh"}
        | {"hardsigmoid", "sigmoid", "tanh", "prelu", "softplus", "layer_norm", "group_norm", "local_response_norm"}
        | {"dropout", "dropout_", "dropout1d", "dropout2d", "feature_dropout", "alpha_dropout"}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.IDENTITY and args and isinstance(args[0], Tensor):
            return args[0] * 1.0
        if name in ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear"):
            return func(args[0], args[1].abs(), None, *args[3:], **{k: v for k, v in kwargs.items() if k != "bias"})
        if name == "batch_norm":
            return self._batch_norm(*args, **kwargs)
        if name.startswith("max_pool") or name.startswith("adaptive_max_pool"):
            average = getattr(F, name.replace("max", "avg").replace("_with_indices", ""))
            return average(
                *args[: 2 if "adaptive" in name else 4], **{k: v for k, v in kwargs.items() if k in _POOLING}
            )
        if name in ("mul", "mul_", "__mul__", "__rmul__", "__imul__") and all(isinstance(a, Tensor) for a in args[:2]):
            a, b = args[0], args[1]
            return (
                (a * b.detach().abs() + a.detach().abs() * b) / 2
                if a.requires_grad and b.requires_grad
                else func(a, b.abs())
            )
        return func(*args, **kwargs)

    @staticmethod
    def _batch_norm(
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Tensor:
        eps = kwargs.get("eps", rest[2] if len(rest) > 2 else 1e-5)
        scale = (torch.ones_like(var) if weight is None else weight.abs()) / (var + eps).sqrt()
        return x * scale.view(1, -1, *[1] * (x.dim() - 2))


_POOLING = ("kernel_size", "stride", "padding", "ceil_mode", "output_size")


def propagate(
    model: nn.Module,
    example_input: Tensor,
    graph: ChannelGraph,
    groups: Sequence[Group],
    final_scores: Tensor,
    classifier: str,
    pruned: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    r"""Scores of all ``groups`` in one backward pass: :math:`s_k = |W^{(k+1)}|^\top s_{k+1}`.

    ``final_scores`` are those of the input of ``classifier`` (the final response layer). The score of a channel is what
    its consumers hand back, summed over positions and consumers. Channels in ``pruned`` (group -> indices) hand nothing
    on. ``model`` must be float64, in eval mode and is not changed.
    """
    handed_back: dict[str, Tensor] = {}
    consumers = {c for g in groups for c in graph.consumers(g)} | {classifier}
    blocked = _blocked_inputs(groups, pruned or {})
    final: list[Tensor] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0] * 1.0
            channels = 1 if isinstance(module, nn.modules.conv._ConvNd) else x.dim() - 1

            def collect(gradient: Tensor) -> Tensor:
                if name in blocked:
                    gradient = gradient.index_fill(channels, blocked[name].to(gradient.device), 0.0)
                rest = [d for d in range(gradient.dim()) if d != channels]
                total = gradient.sum(rest)
                handed_back[name] = handed_back[name] + total if name in handed_back else total
                return gradient

            x.register_hook(collect)
            if name == classifier:
                final.append(x)
            return (x, *inputs[1:])

        return hook

    with ExitStack() as stack:
        for name in consumers:
            handle = model.get_submodule(name).register_forward_pre_hook(watch(name))
            stack.callback(handle.remove)
        # Zeros run through the forward pass: only the gradient matters, and deep |W| products would overflow.
        x = torch.zeros_like(example_input[:1], dtype=torch.float64).requires_grad_()
        with AbsoluteLinear(), torch.enable_grad():
            model(x)
            response = final[-1]
            shape = (
                [1, -1, *[1] * (response.dim() - 2)]
                if response.dim() > 2 and _is_convolution(model, classifier)
                else [-1]
            )
            response.backward(final_scores.double().reshape(shape).expand_as(response).contiguous())
    return {group.name: _group_score(group, handed_back) for group in groups}


def _is_convolution(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.modules.conv._ConvNd)


def _blocked_inputs(groups: Sequence[Group], pruned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    blocked: dict[str, list[Tensor]] = {}
    for group in groups:
        if group.name in pruned and len(pruned[group.name]):
            for member in group.members:
                if member.role == "in":
                    blocked.setdefault(member.module, []).append(member.index[pruned[group.name]].flatten())
    return {name: torch.cat(parts).unique() for name, parts in blocked.items()}


def _group_score(group: Group, handed_back: Mapping[str, Tensor]) -> Tensor:
    score = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        if member.role == "in" and member.module in handed_back:
            score += handed_back[member.module].cpu()[member.index].sum(1)
    return score


class NISP(Method):
    r"""Neuron importance score propagation, `Yu et al., CVPR 2018 <https://arxiv.org/abs/1711.05908>`_.

    The responses of the final response layer (the input of the classifier) are ranked by Inf-FS; their scores
    :math:`s_n \ge 0` minimise a bound on the error of those responses when propagated through absolute weights,

    .. math:: s_k = |W^{(k+1)}|^\top s_{k+1}

    (transposed convolution for convolutions, :math:`|\gamma|/\sqrt{\sigma^2+\epsilon}` for batch norm, even spreading for
    pooling, sums at forks). In every group of channels the lowest share ``pruning_ratio`` is removed, group by group from
    the output to the input; removed channels hand no importance on. Channels that a residual stream ties together are one
    group and go together. Fine-tuning follows for ``epochs`` epochs.

    Deviations:
        Inf-FS constants, batch norm and residual handling are filled in from the Inf-FS literature and the linear-map
        argument (the paper has no code). Scores of channels are summed over positions. The fine-tuning schedule is not
        published: a tenth of the session's learning rate.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="nisp",
        title="NISP: Pruning Networks using Neuron Importance Score Propagation",
        authors=(
            "Ruichi Yu, Ang Li, Chun-Fu Chen, Jui-Hsin Lai, Vlad I. Morariu, Xintong Han, Mingfei Gao, Ching-Yung Lin, "
            "Larry S. Davis"
        ),
        venue="CVPR",
        year=2018,
        url="https://arxiv.org/abs/1711.05908",
    )
    kind: ClassVar[str] = "pruning"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration data"})
    budgets: ClassVar[frozenset[str]] = frozenset({"macs", "params", "bytes", "latency"})
    contract_fields: ClassVar[dict[str, Any]] = {"samples": 64}

    pruning_ratio: Ratio = 0.5
    """Share of channels removed in every group; solved for when the run has a budget."""
    scope: Scope = "layer"
    """One ratio for every group, or one threshold for all: on scores divided by the mean score of their group."""
    round_to: PositiveInt = 1
    """Every group keeps a multiple of this many channels, or all of them."""
    ratios: dict[str, Ratio] = {}
    """Ratios of single groups by name, in place of `pruning_ratio`."""
    ranker: Literal["inf-fs", "uniform", "outgoing"] = "inf-fs"
    """How final responses are ranked: Inf-FS, all equal, or by the classifier's absolute weights."""
    importance: Literal["propagated", "l1", "random"] = "propagated"
    """Scores of the channels; two controls take their place: the L1 norm of what makes a channel, or chance."""
    samples: PositiveInt = 512
    """Calibration inputs for the ranking; labels are not used."""
    skip: tuple[str, ...] = ()
    """Layers left whole, as name patterns."""
    epochs: NonNegativeInt = 0
    """Fine-tuning epochs after the cut."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate of the fine-tuning; None takes a tenth of the session's."""

    def check_network(self, session: Session) -> None:
        graph, groups = prunable(session, self.skip, f"{self.name}: skip")
        require_widths(session, self, graph, groups, self.offer({g.name: torch.zeros(g.size) for g in groups}))

    def apply(self, session: Session) -> None:
        graph, groups = prunable(session, self.skip, f"{self.name}: skip")
        classifier = final_layer(session.model, graph)
        network = copy.deepcopy(session.model).double().eval()
        scores: Callable[[Selection], Mapping[str, Tensor]]
        if self.importance == "propagated":
            final_scores = self.rank(session, classifier)
            scores = partial(
                propagate, network, session.example_input, graph, groups, final_scores.to(session.device), classifier
            )
        else:
            fixed = self.control(network, groups, session.seed)
            scores = lambda pruned: fixed  # noqa: E731
        # What a network costs depends on how many channels stay, not on which: one ratio needs no scores.
        at_first = scores({}) if self.scope == "global" else {g.name: torch.zeros(g.size) for g in groups}
        plan = kept_widths(session, self, graph, groups, self.offer(at_first), self.pruning_ratio)
        selection = self.select(groups, scores, plan)
        session.model = cut(session, graph, selection)
        ratio = sum(len(gone) for gone in selection.values()) / sum(group.size for group in groups)
        session.report(pruned_share=ratio, final_response_layer=classifier, **kept_report(graph, groups, selection))
        if self.epochs:
            rate = self.learning_rate or session.settings.learning_rate / 10
            session.train(epochs=self.epochs, learning_rate=rate)

    def offer(self, scores: Mapping[str, Tensor]) -> Widths:
        """The widths to choose from."""
        return Widths.of(scores, scope=self.scope, round_to=self.round_to, ratios=self.ratios)

    @staticmethod
    def select(groups: Sequence[Group], scores: Callable[[Selection], Mapping[str, Tensor]], plan: Plan) -> Selection:
        """Decide group by group from the output to the input, propagating past what is already pruned."""
        selection: Selection = {}
        for group in reversed(groups):
            selection[group.name] = weakest(scores(selection)[group.name], group.size - plan[group.name])
        return selection

    def control(self, network: nn.Module, groups: Sequence[Group], seed: int) -> dict[str, Tensor]:
        """Scores that know nothing of the final responses."""
        if self.importance == "random":
            random = torch.Generator().manual_seed(seed)
            return {group.name: torch.rand(group.size, generator=random) for group in groups}
        sizes = {name: parameter.detach().abs() for name, parameter in network.named_parameters()}
        return {group.name: group.reduce(sizes) for group in groups}

    def rank(self, session: Session, classifier: str) -> Tensor:
        """Scores of the final responses."""
        layer = session.model.get_submodule(classifier)
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        if self.ranker == "uniform":
            return torch.ones(weight.shape[1])
        if self.ranker == "outgoing":
            return weight.abs().flatten(2).sum(-1).sum(0) if weight.dim() > 2 else weight.abs().sum(0)
        responses: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, inputs: responses.append(inputs[0].detach()))
        with torch.no_grad():
            for inputs in session.calibration(self.samples):
                session.task.outputs(session.model.eval(), inputs)
        handle.remove()
        return infinite_feature_selection(torch.cat([r.flatten(2).mean(-1) if r.dim() > 2 else r for r in responses]))


def final_layer(model: nn.Module, graph: ChannelGraph) -> str:
    """The classifier: the last linear layer or convolution that runs; its input is the final response layer."""
    layers = [n for n in graph.order if isinstance(model.get_submodule(n), nn.Linear | nn.Conv2d | nn.Conv1d)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} ends in no linear layer or convolution, so nisp finds no final response layer"
        )
    return layers[-1]
