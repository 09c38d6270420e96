"""What every method that removes whole channels shares: which ones may go, how many of each group, and the budget.

A method gives scores; `Widths` turns them into an order in which channels are given back, and `kept_widths` finds how
many of every group stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from efficientdnns.budget import Block, Plan, blocks, cut_at, fill, widths
from efficientdnns.errors import SurgeryError
from efficientdnns.measurement.macs import count_macs
from efficientdnns.method import Method
from efficientdnns.parts.budgets import check_patterns, limits_of, matches, meet, require_reachable
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group, remove

Selection = dict[str, Tensor]
"""Group name -> indices of the channels that go."""
Scope = Literal["layer", "global"]
"""One ratio for every layer, or one threshold on normalised scores for all of them."""
Holder = tuple[str, int, int]
"""A tensor's state-dict name, a dimension of it, and how many entries along it belong to each channel of a group."""


def lowest(scores: Tensor, ratio: float) -> Tensor:
    """Indices of the floor(ratio * n) lowest scores, at most n - 1; ties go to the lower index.

    The tiny addend keeps floor(10 * 0.1) at 1 in floating point.
    """
    return weakest(scores, min(int(len(scores) * ratio + 1e-9), len(scores) - 1))


def weakest(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` lowest scores, ascending; ties go to the lower index."""
    return torch.sort(scores, stable=True).indices[:count].sort().values


def layer_names(model: nn.Module) -> list[str]:
    """Modules that hold parameters of their own, which name patterns may fit."""
    return [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]


def prunable(session: Session, skip: Sequence[str] = (), field: str = "skip") -> tuple[ChannelGraph, list[Group]]:
    """Trace the session's network and return the groups that may be pruned.

    Raises:
        ConfigurationError: a pattern of ``skip`` fits no layer; ``field`` says where it was written.
        SurgeryError: nothing can be removed; the message says why.
    """
    check_patterns(skip, layer_names(session.model), field)
    graph = ChannelGraph.trace(session.model, session.example_input)
    groups = [g for g in graph.groups if g.size > 1 and not any(matches(p, skip) for p in graph.producers(g))]
    if not groups:
        reasons = "; ".join(f"{k.operation} in '{k.module}' {k.reason}" for k in graph.kept_whole[:2])
        raise SurgeryError(
            f"no channels of {type(session.model).__name__} can be removed" + (f" ({reasons})" if reasons else "")
        )
    return graph, groups


@dataclass
class Widths:
    """The widths that groups of channels may have, and the order in which channels are given back.

    Attributes:
        least: the smallest width of every group.
        full: all of every group.
        offered: the steps between the two, each with the share of channels that goes before it does (its key).
    """

    least: Plan
    full: Plan
    offered: list[Block]

    @classmethod
    def of(
        cls,
        scores: Mapping[str, Tensor],
        *,
        scope: Scope = "layer",
        round_to: int = 1,
        ratios: Mapping[str, float] | None = None,
        comparable: bool = False,
    ) -> Widths:
        """Order the channels of all groups.

        Args:
            scores: (size,) importance by group.
            scope: with "layer" the key of a channel is its relative rank in its group, so that all groups are cut at one
                ratio; with "global" its relative rank among all channels, by score divided by the group's mean score.
            round_to: every group keeps a multiple of it, or everything.
            ratios: groups whose ratio is fixed; they are not part of the order.
            comparable: scores of different groups are compared as they are, not divided by their means first.
        """
        ratios = ratios or {}
        free = {name: score for name, score in scores.items() if name not in ratios}
        keys = _layer_keys(free) if scope == "layer" else _global_keys(free, comparable)
        least = {name: widths(len(score), round_to)[0] for name, score in scores.items()}
        full = {name: len(score) for name, score in scores.items()}
        for name in ratios.keys() & scores.keys():
            size = len(scores[name])
            at_least = size - len(lowest(scores[name], ratios[name]))
            least[name] = full[name] = next(width for width in widths(size, round_to) if width >= at_least)
        return cls(least, full, [block for name in free for block in blocks(name, keys[name], round_to)])

    def at(self, ratio: float) -> Plan:
        """Widths when the share ``ratio`` of the channels goes, rounded up to the next width that is allowed."""
        return cut_at(self.least, self.offered, ratio)

    def propose(self, fits: Callable[[Plan], bool], enough: Callable[[Plan], bool]) -> Plan:
        """The widest plan in this order that fits."""
        return fill(self.least, self.offered, fits, enough)


def _layer_keys(scores: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: [(rank + 1) / len(score) for rank in range(len(score))] for name, score in scores.items()}


def _global_keys(scores: Mapping[str, Tensor], comparable: bool = False) -> dict[str, list[float]]:
    normal = {name: score.double().cpu() for name, score in scores.items()}
    if not comparable:
        normal = {name: score / score.abs().mean().clamp_min(1e-300) for name, score in normal.items()}
    ordered = [score.sort().values for score in normal.values()] or [torch.zeros(0, dtype=torch.float64)]
    everything = torch.cat(ordered)
    # Equal scores (zeros above all) are taken from all groups alike.
    ranks = torch.cat([torch.arange(1, len(score) + 1) / len(score) for score in ordered])
    order = ranks.argsort(stable=True)
    order = order[everything[order].argsort(stable=True)]
    keys = torch.empty_like(everything)
    keys[order] = torch.arange(1, len(everything) + 1, dtype=keys.dtype) / max(1, len(everything))
    return {name: key.tolist() for name, key in zip(normal, keys.split([len(score) for score in ordered]))}


def holders(group: Group) -> list[Holder]:
    """What loses entries when a channel of the group goes."""
    return sorted({(m.tensor, m.dim, m.index.shape[1]) for m in group.members})


class WidthCosts:
    """Costs of a network at given widths, by arithmetic on the shapes of its tensors.

    Exact for what convolutions, linear and recurrent layers compute and hold; what has no weights, such as attention
    between positions, is taken as constant. Latency is estimated by MACs, and bytes by those of the dense tensors: both
    only serve to find what is then measured.

    Args:
        session: gives the task.
        model: the network at full width.
        sizes: channels of every group.
        held: what loses entries with a channel of the group.
    """

    def __init__(
        self, session: Session, model: nn.Module, sizes: Mapping[str, int], held: Mapping[str, Sequence[Holder]]
    ) -> None:
        self.sizes = dict(sizes)
        state = model.state_dict(keep_vars=True)
        self.touched: dict[str, dict[int, list[tuple[str, int]]]] = {}
        for group, entries in held.items():
            for tensor, dim, count in entries:
                self.touched.setdefault(tensor, {}).setdefault(dim, []).append((group, count))
        tensors = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
        # A parameter that an earlier method pruned keeps its density.
        self.weights = {name: float(p.detach().count_nonzero()) for name, p in model.named_parameters()}
        self.sizes_in_bytes = {name: float(t.numel() * t.element_size()) for name, t in state.items()}
        counted = count_macs(model, session.task.example_input, session.task.outputs).by_module
        self.macs: dict[str, float] = {}
        for module, macs in counted.items():
            own = model.get_submodule(module).named_parameters(module, recurse=False)
            matrices = {name.lstrip("."): p.numel() for name, p in own if p.dim() > 1}
            for name, numel in matrices.items():
                self.macs[name] = self.macs.get(name, 0.0) + macs * numel / sum(matrices.values())
        self.fixed_macs = sum(counted.values()) - sum(self.macs.values())

    def __call__(self, plan: Plan) -> dict[str, float]:
        shares = {name: self._share(name, plan) for name in self.touched}
        macs = self.fixed_macs + sum(value * shares.get(name, 1.0) for name, value in self.macs.items())
        return {
            "macs": macs,
            "params": sum(value * shares.get(name, 1.0) for name, value in self.weights.items()),
            "bytes": sum(value * shares.get(name, 1.0) for name, value in self.sizes_in_bytes.items()),
            "latency": macs,
        }

    def _share(self, tensor: str, plan: Plan) -> float:
        """The share of a tensor's entries that stays."""
        share = 1.0
        for dim, groups in self.touched[tensor].items():
            gone = sum((self.sizes[group] - plan[group]) * count for group, count in groups)
            share *= max(0.0, 1 - gone / max(1, self.shapes[tensor][dim]))
        return share


def kept_widths(
    session: Session, method: Method, graph: ChannelGraph, groups: Sequence[Group], offer: Widths, ratio: float
) -> Plan:
    """How many channels every group keeps: what the budget allows, or all but the share ``ratio`` without one.

    Raises:
        BudgetError: the narrowest network is not within the budget.
    """
    if not limits_of(session, method):
        return offer.at(ratio)
    by_name = {group.name: group for group in groups}
    sizes = {name: group.size for name, group in by_name.items()}
    estimate = WidthCosts(session, session.model, sizes, {name: holders(group) for name, group in by_name.items()})
    return meet(
        session,
        method,
        propose=offer.propose,
        estimate=estimate,
        build=lambda plan: narrowed(session, graph, groups, plan),
        least=offer.least,
        full=offer.full,
    )


def require_widths(
    session: Session, method: Method, graph: ChannelGraph, groups: Sequence[Group], offer: Widths
) -> None:
    """Raise BudgetError if the narrowest network is not within the budget."""
    require_reachable(session, method, lambda: narrowed(session, graph, groups, offer.least))


def narrowed(session: Session, graph: ChannelGraph, groups: Sequence[Group], plan: Plan) -> nn.Module:
    """The session's network at these widths, without regard to scores: what it costs depends on how many channels stay."""
    return cut(session, graph, {g.name: torch.arange(g.size - plan[g.name]) for g in groups}, verify=False)


def cut(session: Session, graph: ChannelGraph, selection: Mapping[str, Tensor], verify: bool = True) -> nn.Module:
    """The session's network without the selected channels; groups with an empty selection are left alone."""
    chosen = {name: indices for name, indices in selection.items() if len(indices)}
    return remove(session.model, session.example_input, chosen, graph, verify) if chosen else session.model


def kept_report(graph: ChannelGraph, groups: Sequence[Group], selection: Mapping[str, Tensor]) -> dict[str, object]:
    """What a structured method reports: widths before and after, and what was kept whole and why."""
    return {
        "widths": {g.name: [g.size, g.size - len(selection.get(g.name, ()))] for g in groups},
        "kept_whole": [f"{k.module or 'forward'}: {k.operation} {k.reason}" for k in graph.kept_whole],
    }
