"""A step that makes the training data of the steps behind it smaller: what a student may see of the teacher's data."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt

from efficientdnns.data.split import Split, generator
from efficientdnns.errors import ConfigurationError, DataError
from efficientdnns.method import Method, Need
from efficientdnns.session import Session


def transfer_set(split: Split, samples: int | None = None, omit_classes: tuple[int, ...] = (), seed: int = 0) -> Split:
    """``samples`` of the split drawn at random (all for None), none of them of ``omit_classes``, in their old order."""
    rows = torch.arange(len(split))
    if omit_classes:
        labels = torch.cat([torch.as_tensor(batch.targets).cpu() for batch in split.batches(1024)])
        rows = rows[torch.isin(labels, torch.tensor(omit_classes), invert=True)]
    if samples is not None:
        rows = rows[torch.randperm(len(rows), generator=generator(seed, 0x7A5F))[:samples]].sort().values
    return split.subset(rows)


class TransferSet(Method):
    """Keep only some of the training data from here on, to study how much a student needs."""

    name: ClassVar[str] = "transfer-set"
    kind: ClassVar[str] = "training"
    needs: ClassVar[frozenset[Need]] = frozenset({"training data"})

    samples: PositiveInt | None = None
    """How many training samples stay, drawn at random; None keeps all."""
    omit_classes: tuple[NonNegativeInt, ...] = ()
    """Classes of which none stays; needs labels."""

    def check(self, session: Session) -> None:
        super().check(session)
        task = session.task
        assert task.train is not None
        if not task.train.divisible:
            raise DataError(
                f"transfer-set picks samples, which the loader of task '{task.name}' cannot; give a data set"
            )
        if self.omit_classes and not task.train.has_labels:
            raise DataError(f"omit_classes needs labels to know the classes, but task '{task.name}' has none")
        if self.samples is not None and self.samples > len(task.train):
            raise ConfigurationError(
                f"samples is {self.samples}, expected at most {len(task.train)} (the training data)"
            )

    def apply(self, session: Session) -> None:
        assert session.task.train is not None
        split = transfer_set(session.task.train, self.samples, self.omit_classes, session.seed)
        session.task = session.task.with_(train=split)
        session.report(samples=len(split))
