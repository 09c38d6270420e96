"""One-shot channel methods that find out by themselves how many channels a layer needs, unless they are told."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from efficientdnns.budget import Plan, widths
from efficientdnns.method import Ratio
from efficientdnns.parts.budgets import limits_of
from efficientdnns.parts.channel_pruning import ChannelPruning, Scores
from efficientdnns.parts.structured import kept_widths
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group


class OwnWidth(ChannelPruning):
    """A method whose own rule says how many channels stay where neither a ratio nor a budget does."""

    pruning_ratio: Ratio | None = None  # type: ignore[assignment]
    """Share of channels removed; None leaves it to the method's own rule. Solved for when the run has a budget."""

    def decides(self, session: Session, group: Group) -> bool:
        """Whether the method's own rule says how many channels of this group stay."""
        return self.pruning_ratio is None and group.name not in self.ratios and not limits_of(session, self)

    def plan(
        self, session: Session, graph: ChannelGraph, groups: Sequence[Group], scores: Scores | None = None
    ) -> Plan:
        """How many channels every group keeps; 0 stands for what the method's own rule says."""
        scores = scores or {group.name: torch.zeros(group.size) for group in groups}
        plan = kept_widths(session, self, graph, groups, self.offer(scores), self.pruning_ratio or 0.0)
        return {g.name: 0 if self.decides(session, g) else plan[g.name] for g in groups}

    def rounded(self, kept: int, size: int) -> int:
        """The least width of at least ``kept`` channels, and at least one, that ``round_to`` allows."""
        return next(width for width in widths(size, self.round_to) if width >= max(1, kept))
