"""Structural changes that are exact: removing channels, narrowing layers, folding batch norm, describing a structure
as data."""

from efficientdnns.surgery.atoms import KeptWhole
from efficientdnns.surgery.constants import absorb_constants
from efficientdnns.surgery.fold import fold_batch_norm
from efficientdnns.surgery.graph import ChannelGraph, Group, Member
from efficientdnns.surgery.modules import (
    ScatterChannels,
    SelectChannels,
    get_module,
    narrow_input,
    narrow_output,
    replace_module,
)
from efficientdnns.surgery.remove import remove, zero_contributions
from efficientdnns.surgery.structure import apply_difference, describe, difference, rebuildable
from efficientdnns.surgery.trace import Node

__all__ = [
    "ChannelGraph",
    "Group",
    "KeptWhole",
    "Member",
    "Node",
    "ScatterChannels",
    "SelectChannels",
    "absorb_constants",
    "apply_difference",
    "describe",
    "difference",
    "fold_batch_norm",
    "get_module",
    "narrow_input",
    "narrow_output",
    "rebuildable",
    "remove",
    "replace_module",
    "zero_contributions",
]
