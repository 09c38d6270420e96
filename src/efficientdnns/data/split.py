"""Splits: where batches come from. One interface over tensors in memory, torch data sets and the user's own loaders."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset, default_collate

from efficientdnns.data.collate import as_batch, collate_lists, pair
from efficientdnns.data.nested import cut, each, leaves, length, select
from efficientdnns.errors import ConfigurationError, DataError

Prepare = Callable[[Any], Any]
"""A batched function of the inputs alone, e.g. bytes to normalised floats; runs on every batch."""

Augment = Callable[[Any, torch.Generator], Any]
"""A batched random function of the inputs; runs before `Prepare`, on training batches only."""


class Batch(NamedTuple):
    """What a step sees: inputs, targets (``None`` without labels) and the samples' stable indices in their split."""

    inputs: Any
    targets: Any | None
    indices: Tensor | None


class Split(ABC):
    """A set of samples that gives batches.

    Attributes: ``name`` (as reports print it), ``has_labels``, ``divisible`` (whether `subset` and `take` work),
    ``prepare`` and ``augment`` (batched functions or ``None``). The order of samples depends on ``(seed, epoch)`` and
    nothing else; the random numbers of ``augment`` depend on ``(seed, epoch, batch, rank)``.
    """

    name: str = "data"
    has_labels: bool = True
    divisible: bool = True
    prepare: Prepare | None = None
    augment: Augment | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def subset(self, indices: Tensor | Sequence[int]) -> Split:
        """The split of these samples, in this order; its own indices count from 0 again."""

    @abstractmethod
    def _fetch(self, batches: list[Tensor]) -> Iterator[tuple[Any, Any | None]]:
        """Raw inputs and targets (``None`` without labels) of each list of indices in turn."""

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        augment: bool = False,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """The batches of one epoch.

        ``batch_size`` counts the samples of all processes together: process ``rank`` of ``world_size`` gets every
        ``world_size``-th sample of each batch, so that the same recipe means the same training on any number of
        processes. A last batch with fewer samples than processes is left out.
        """
        self.number_of_batches(batch_size, world_size=world_size)
        order = torch.randperm(len(self), generator=generator(seed, epoch)) if shuffle else torch.arange(len(self))
        full = len(order) // batch_size * batch_size
        chunks = list(order.split(batch_size)) if len(order) else []
        if chunks and full < len(order) and (drop_last or len(chunks[-1]) < world_size):
            chunks.pop()
        if world_size > 1:
            chunks = [chunk[rank::world_size] for chunk in chunks]
        change = self.augment if augment else None
        for number, (indices, (inputs, targets)) in enumerate(zip(chunks, self._fetch(chunks))):
            if change is not None:
                inputs = change(inputs, generator(seed, epoch, number, rank))
            if self.prepare is not None:
                inputs = self.prepare(inputs)
            yield Batch(inputs, targets if self.has_labels else None, indices)

    def number_of_batches(self, batch_size: int, *, world_size: int = 1, drop_last: bool = False) -> int:
        """How many batches `batches` gives each process."""
        if batch_size < world_size or batch_size < 1:
            raise ConfigurationError(
                f"batch_size is {batch_size}, expected at least {max(1, world_size)} (one sample for each process)"
            )
        return _count(len(self), batch_size, world_size, drop_last)

    def take(self, indices: Tensor | Sequence[int]) -> Batch:
        """One batch of exactly these samples, prepared and not augmented."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        inputs, targets = next(self._fetch([rows]))
        inputs = inputs if self.prepare is None else self.prepare(inputs)
        return Batch(inputs, targets if self.has_labels else None, rows)

    def without_labels(self) -> Split:
        """The same samples with their targets hidden."""
        hidden = copy.copy(self)
        hidden.has_labels = False
        return hidden

    def classes(self) -> int | None:
        """Number of classes where the data tells it, else ``None``."""
        return None

    def to(self, device: torch.device | str) -> Split:
        """This split with its tensors on ``device`` where they are in memory; other splits give themselves."""
        return self

    def __repr__(self) -> str:
        labels = "" if self.has_labels else ", no labels"
        return f"{type(self).__name__}({self.name!r}, {len(self):,} samples{labels})"


class TensorSplit(Split):
    """Samples that are tensors in memory (or a tuple of tensors); a batch costs one ``index_select`` a tensor.

    Integer targets are kept as int64 and NumPy's float64 becomes float32. ``prepare(x)`` and ``augment(x, generator)``
    work on whole batches.
    Raises `DataError` if the lengths differ.
    """

    def __init__(
        self,
        inputs: Any,
        targets: Any | None = None,
        *,
        name: str = "train",
        prepare: Prepare | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.inputs = _tensors(inputs, _as_tensor)
        self.targets = None if targets is None else _tensors(targets, _as_target)
        self.name, self.prepare, self.augment = name, prepare, augment
        self.has_labels = targets is not None
        lengths = {len(tensor) for tensor in leaves((self.inputs, self.targets))}
        if len(lengths) != 1:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in leaves((self.inputs, self.targets)))
            raise DataError(f"inputs and targets have shapes {shapes}; expected one row for each sample in all of them")
        self._length = lengths.pop()

    def __len__(self) -> int:
        return self._length

    def _fetch(self, batches: list[Tensor]) -> Iterator[tuple[Any, Any | None]]:
        device = next(leaves(self.inputs)).device
        for rows in batches:
            if device.type != "cpu":
                rows = rows.to(device, non_blocking=True)
            targets = self.targets if self.has_labels else None
            yield select(self.inputs, rows), None if targets is None else select(targets, rows)

    def subset(self, indices: Tensor | Sequence[int]) -> TensorSplit:
        device = next(leaves(self.inputs)).device
        rows = torch.as_tensor(indices, dtype=torch.long).to(device)
        return self._with(lambda tensor: tensor.index_select(0, rows))

    def with_targets(self, targets: Tensor) -> TensorSplit:
        """The same samples with these targets."""
        split = TensorSplit(self.inputs, targets, name=self.name, prepare=self.prepare, augment=self.augment)
        return split.to(next(leaves(self.inputs)).device)

    def to(self, device: torch.device | str) -> TensorSplit:
        return self._with(lambda tensor: tensor.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> TensorSplit:
        other = copy.copy(self)
        other.inputs, other.targets = each((self.inputs, self.targets), change)
        other._length = length(other.inputs)
        return other

    def classes(self) -> int | None:
        return _highest_label(self.targets)


class DatasetSplit(Split):
    """Any map-style torch ``Dataset``, read through a ``DataLoader``.

    An item is ``(inputs, target)``, ``(input, input, ..., target)``, a mapping with a key ``targets``, ``target``,
    ``labels`` or ``label``, or the input alone (no labels). Where targets are mappings with ``boxes``, a batch is a list
    of inputs and a list of targets. ``num_workers`` are loader processes; ``collate`` replaces torch's default. Raises
    `DataError` if the data set has no length.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        *,
        name: str = "train",
        num_workers: int = 0,
        prepare: Prepare | None = None,
        augment: Augment | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(f"{type(dataset).__name__} has no length or items; give a DataLoader over it instead")
        self.dataset, self.name, self.num_workers = dataset, name, num_workers
        target = pair(dataset[0])[1] if len(self) > 0 else None
        boxes = isinstance(target, Mapping) and "boxes" in target
        self.prepare, self.augment = prepare, augment
        self.collate = collate or (collate_lists if boxes else default_collate)
        self.has_labels = target is not None

    def __len__(self) -> int:
        return len(self.dataset)

    def _fetch(self, batches: list[Tensor]) -> Iterator[tuple[Any, Any | None]]:
        loader: DataLoader[Any] = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=[rows.tolist() for rows in batches],
            num_workers=self.num_workers,
            collate_fn=self.collate,
            generator=torch.Generator(),
        )
        for item in loader:
            yield as_batch(item, self.collate)

    def subset(self, indices: Tensor | Sequence[int]) -> DatasetSplit:
        other = copy.copy(self)
        other.dataset = Subset(self.dataset, torch.as_tensor(indices).tolist())  # type: ignore[arg-type]
        return other

    def classes(self) -> int | None:
        return _dataset_classes(self.dataset)


class LoaderSplit(Split):
    """The user's own ``DataLoader`` (or any re-iterable of batches) as it is.

    Its batch size, order, augmentation and dropping hold; ``batch_size``, ``shuffle`` and ``augment`` are ignored, and
    indices are unknown. A batch is read as `DatasetSplit` reads an item. Where the loader shuffles with torch's global
    generator, its order is tied to ``(seed, epoch)``; a sampler with ``set_epoch`` is told the epoch. Several processes
    take slices of each batch unless the loader has a ``DistributedSampler``.
    """

    def __init__(self, loader: Any, *, name: str = "train") -> None:
        self.loader, self.name, self.divisible = loader, name, False
        try:
            first = next(iter(loader))
        except StopIteration:
            raise DataError(f"the loader of the {name} split gives no batch") from None
        self.has_labels = pair(first)[1] is not None
        self._counted: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Of the sampler or the data set; a loader that tells neither is run through once and counted."""
        for source in (getattr(self.loader, "sampler", None), getattr(self.loader, "dataset", None)):
            if isinstance(source, Sized):
                return len(source)
        return self._count()[1]

    def _count(self) -> tuple[int, int]:
        """(batches, samples) of one pass."""
        if self._counted is None:
            sizes = [length(pair(item)[0]) for item in self.loader]
            self._counted = len(sizes), sum(sizes)
        return self._counted

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        augment: bool = False,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sliced = world_size > 1 and not isinstance(sampler, DistributedSampler)
        collate = getattr(self.loader, "collate_fn", None)
        for item in _seeded(self.loader, seed, epoch):
            inputs, targets = as_batch(item, collate)
            if sliced:
                if length(inputs) < world_size:
                    continue
                inputs, targets = cut((inputs, targets), slice(rank, None, world_size))
            yield Batch(inputs, targets if self.has_labels else None, None)

    def number_of_batches(self, batch_size: int, *, world_size: int = 1, drop_last: bool = False) -> int:
        own = getattr(self.loader, "batch_size", None)
        if world_size == 1 or own is None or isinstance(getattr(self.loader, "sampler", None), DistributedSampler):
            try:
                return len(self.loader)
            except TypeError:
                return self._count()[0]
        return _count(len(self), own, world_size, getattr(self.loader, "drop_last", False))

    def _fetch(self, batches: list[Tensor]) -> Iterator[tuple[Any, Any | None]]:
        raise self._opaque()

    def subset(self, indices: Tensor | Sequence[int]) -> Split:
        raise self._opaque()

    def _opaque(self) -> DataError:
        return DataError(
            f"the {self.name} split is a DataLoader and cannot pick samples; give its data set (Task.from_datasets)"
        )

    def classes(self) -> int | None:
        return _dataset_classes(getattr(self.loader, "dataset", None))


def generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream is a function of the integers ``key``."""
    state = np.random.SeedSequence([part & 0xFFFFFFFF for part in key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _count(samples: int, batch_size: int, world_size: int, drop_last: bool) -> int:
    full, rest = divmod(samples, batch_size)
    return full + (rest >= world_size and not drop_last)


def _seeded(loader: Any, seed: int, epoch: int) -> Iterator[Any]:
    # A DataLoader draws its shuffling seed from the global generator when its first batch is asked for.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, epoch).initial_seed())
        batches = iter(loader)
        try:
            first = next(batches)
        except StopIteration:
            return
    yield first
    yield from batches


def _tensors(value: Any, convert: Callable[[Any], Tensor]) -> Any:
    if isinstance(value, Mapping):
        return {key: _tensors(part, convert) for key, part in value.items()}
    several = isinstance(value, tuple) or (isinstance(value, list) and value and isinstance(value[0], Tensor))
    return tuple(_tensors(part, convert) for part in value) if several else convert(value)


def _as_tensor(value: Any) -> Tensor:
    tensor = torch.as_tensor(value)
    return tensor.float() if isinstance(value, np.ndarray) and tensor.dtype == torch.float64 else tensor


def _as_target(value: Any) -> Tensor:
    tensor = _as_tensor(value)
    integral = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return tensor.long() if integral else tensor


def _highest_label(targets: Any) -> int | None:
    try:
        tensor = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        return None
    if tensor.dim() == 1 and tensor.numel() and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        return int(tensor.max()) + 1
    return int(tensor.shape[1]) if tensor.dim() == 2 and tensor.is_floating_point() else None


def _dataset_classes(dataset: Any) -> int | None:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(classes := getattr(dataset, "classes", None), Sequence):
        return len(classes)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return _highest_label(dataset.tensors[-1])
    for name in ("targets", "labels"):
        if (labels := getattr(dataset, name, None)) is not None:
            return _highest_label(labels)
    return None
