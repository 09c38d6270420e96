"""NISP: importance of the final responses is carried back through the absolute weights to every channel.

The channels of lowest importance are then cut in all layers at once, and the network is fine-tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from efficientdnns.errors import ModelError
from efficientdnns.measurement.inference import evaluating
from efficientdnns.method import Need, Paper
from efficientdnns.parts.absolute_linear import AbsoluteLinear
from efficientdnns.parts.channel_pruning import ChannelPruning, Scores
from efficientdnns.parts.structured import Selection, weakest
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
    on. ``model`` is not changed, and no copy is made of it.
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
        stack.enter_context(evaluating(model))
        # Zeros run through the forward pass: only the gradient matters, and deep |W| products would overflow.
        x = example_input[:1]
        sources: list[Tensor] = []
        if x.is_floating_point():
            x = torch.zeros_like(x, dtype=torch.float64).requires_grad_()
            sources = [x]
        with AbsoluteLinear() as linear, torch.enable_grad():
            model(x)
        response = final[-1]
        shape = (
            [1, -1, *[1] * (response.dim() - 2)] if response.dim() > 2 and _is_convolution(model, classifier) else [-1]
        )
        scores = final_scores.double().reshape(shape).expand_as(response).contiguous()
        response.backward(scores, inputs=[*sources, *linear.sources])
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


class NISP(ChannelPruning):
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
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration data"})
    in_place: ClassVar[bool] = False
    contract_fields: ClassVar[dict[str, Any]] = {"samples": 64}

    ranker: Literal["inf-fs", "uniform", "outgoing"] = "inf-fs"
    """How final responses are ranked: Inf-FS, all equal, or by the classifier's absolute weights."""
    importance: Literal["propagated", "l1", "random"] = "propagated"
    """Scores of the channels; two controls take their place: the L1 norm of what makes a channel, or chance."""
    samples: PositiveInt = 512
    """Calibration inputs for the ranking; labels are not used."""

    def select(self, session: Session, graph: ChannelGraph, groups: Sequence[Group]) -> Selection:
        """Decide group by group from the output to the input, propagating past what is already pruned."""
        classifier = final_layer(session.model, graph)
        scores = self.scorer(session, graph, groups, classifier)
        # What a network costs depends on how many channels stay, not on which: one ratio needs no scores.
        plan = self.plan(session, graph, groups, scores({}) if self.scope == "global" else None)
        selection: Selection = {}
        with session.progress.task(f"{session.label}: groups", len(groups)) as bar:
            for group in reversed(groups):
                selection[group.name] = weakest(scores(selection)[group.name], group.size - plan[group.name])
                bar.advance()
        ratio = sum(len(gone) for gone in selection.values()) / sum(group.size for group in groups)
        session.report(pruned_share=ratio, final_response_layer=classifier)
        return selection

    def scorer(
        self, session: Session, graph: ChannelGraph, groups: Sequence[Group], classifier: str
    ) -> Callable[[Selection], Scores]:
        """Scores of every group given what is pruned already."""
        if self.importance != "propagated":
            fixed = self.control(session.model, groups, session.seed)
            return lambda pruned: fixed
        final = self.rank(session, classifier).to(session.device)
        return partial(propagate, session.model, session.example_input, graph, groups, final, classifier)

    def control(self, network: nn.Module, groups: Sequence[Group], seed: int) -> dict[str, Tensor]:
        """Scores that know nothing of the final responses."""
        if self.importance == "random":
            random = torch.Generator().manual_seed(seed)
            return {group.name: torch.rand(group.size, generator=random) for group in groups}
        parameters = dict(network.named_parameters())

        def size(group: Group) -> Tensor:
            names = {member.tensor for member in group.members if member.role == "out"} & parameters.keys()
            return group.reduce({name: parameters[name].detach().double().abs() for name in names})

        return {group.name: size(group) for group in groups}

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
        channels_last = not _is_convolution(session.model, classifier)
        means = [_mean_over_positions(response, channels_last) for response in responses]
        return infinite_feature_selection(torch.cat(means))


def _mean_over_positions(response: Tensor, channels_last: bool) -> Tensor:
    if response.dim() == 2:
        return response
    return response.flatten(1, -2).mean(1) if channels_last else response.flatten(2).mean(-1)


def final_layer(model: nn.Module, graph: ChannelGraph) -> str:
    """The classifier: the last linear layer or convolution that runs; its input is the final response layer."""
    layers = [n for n in graph.order if isinstance(model.get_submodule(n), nn.Linear | nn.Conv2d | nn.Conv1d)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} ends in no linear layer or convolution, so nisp finds no final response layer"
        )
    return layers[-1]
