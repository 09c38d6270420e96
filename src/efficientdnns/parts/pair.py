"""Pairs: which layer of a student learns from which layer of its teacher."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from efficientdnns.errors import ConfigurationError
from efficientdnns.parts.tap import Forward, call, stage_ends, tap_once


class Pair(NamedTuple):
    """Two layers and the shapes (1, channels, ...) of what is read at them."""

    teacher: str
    student: str
    teacher_shape: torch.Size
    student_shape: torch.Size


def pair_stages(teacher: nn.Module, student: nn.Module, example: Any, forward: Forward = call) -> list[Pair]:
    """The stage ends of both networks that have the same spatial size, from input to output.

    Where several stages have one size (hidden layers of vectors), they are matched from the output backwards.

    Raises `ConfigurationError` if no two stages match.
    """
    groups: list[dict[tuple[int, ...], list[tuple[str, torch.Size]]]] = []
    for model in (teacher, student):
        names = stage_ends(model, example, forward)
        group: dict[tuple[int, ...], list[tuple[str, torch.Size]]] = {}
        for name, value in tap_once(model, names, example, forward).items():
            group.setdefault(tuple(value.shape[2:]), []).append((name, value.shape))
        groups.append(group)
    pairs = []
    for size, layers in groups[0].items():
        matched = list(zip(reversed(layers), reversed(groups[1].get(size, []))))
        pairs += [Pair(t, s, t_shape, s_shape) for (t, t_shape), (s, s_shape) in reversed(matched)]
    if not pairs:
        sizes = [", ".join("x".join(map(str, size)) or "vector" for size in group) for group in groups]
        raise ConfigurationError(f"no stage sizes match: teacher {sizes[0]}, student {sizes[1]}; name pairs of layers")
    return pairs


def pair_layers(
    teacher: nn.Module, student: nn.Module, names: list[tuple[str, str]], example: Any, forward: Forward = call
) -> list[Pair]:
    """The named (teacher layer, student layer) pairs with the shapes of their pre-activation responses."""
    shapes = [
        {name: value.shape for name, value in tap_once(model, layers, example, forward).items()}
        for model, layers in ((teacher, [t for t, _ in names]), (student, [s for _, s in names]))
    ]
    return [Pair(t, s, shapes[0][t], shapes[1][s]) for t, s in names]
