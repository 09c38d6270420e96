"""Text as one long tensor of ids, cut into windows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from efficientdnns.data.source import Source
from efficientdnns.data.split import Split
from efficientdnns.errors import ConfigurationError, DataError


class WindowSplit(Split):
    """Language-modelling samples: window i reads ids [s_i, s_i + T) and predicts ids [s_i + 1, s_i + T + 1).

    ``ids`` is a 1-D tensor of int64; ``length`` is T; windows start every ``stride`` ids (default T, so that each id is
    predicted once). A batch has inputs (B, T) and targets (B, T). Raises `DataError` if not one window fits.
    """

    def __init__(self, ids: Tensor, length: int = 128, *, stride: int | None = None, name: str = "train") -> None:
        if length < 1 or (stride is not None and stride < 1):
            raise ConfigurationError(f"length is {length} and stride {stride}; expected integers of 1 or more")
        if len(ids) <= length:
            raise DataError(f"the {name} text has {len(ids)} tokens, expected more than one window of {length}")
        self.ids, self.length, self.name = ids.long(), length, name
        self.starts = torch.arange(0, len(ids) - length, stride or length)
        self.has_labels = True

    def __len__(self) -> int:
        return len(self.starts)

    def _fetch(self, batches: list[Tensor]) -> Iterator[tuple[Any, Any | None]]:
        offsets = torch.arange(self.length + 1)
        for rows in batches:
            windows = self.ids[(self.starts[rows, None] + offsets).to(self.ids.device)]
            yield windows[:, :-1], windows[:, 1:]

    def subset(self, indices: Tensor | Sequence[int]) -> WindowSplit:
        other = copy.copy(self)
        other.starts = self.starts[torch.as_tensor(indices, dtype=torch.long)]
        return other

    def to(self, device: torch.device | str) -> WindowSplit:
        other = copy.copy(self)
        other.ids = self.ids.to(device)
        return other

    def classes(self) -> int | None:
        return int(self.ids.max()) + 1


def character_source(text: str, name: str, *, length: int = 128) -> Source:
    """A language-modelling source over the characters of ``text``: first 90 % train, then 5 % calibration, 5 % test.

    The vocabulary is the sorted set of characters of the whole text; id i is its i-th character.
    """
    characters, vocabulary = torch.tensor([ord(c) for c in text]), sorted(set(text))
    ids = torch.searchsorted(torch.tensor([ord(c) for c in vocabulary]), characters)
    first, second = int(0.9 * len(ids)), int(0.95 * len(ids))
    return Source(
        name,
        train=WindowSplit(ids[:first], length, name="train"),
        calibration=WindowSplit(ids[first:second], length, name="calibration"),
        evaluation=WindowSplit(ids[second:], length, name="test"),
        kind="language-modelling",
        num_classes=len(vocabulary),
    )
