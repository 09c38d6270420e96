"""Task: data, loss, metric and how to feed a model: everything a method needs to know about what the network is for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efficientdnns.data.convert import as_split, carve
from efficientdnns.data.images import folder_source, image_source, parquet_source
from efficientdnns.data.metric import DEFAULTS, METRICS, Loss, Metric, MetricValue, as_metric
from efficientdnns.data.named import named_source, names
from efficientdnns.data.nested import first, length, to_device
from efficientdnns.data.outputs import read
from efficientdnns.data.source import Source, check_options
from efficientdnns.data.split import Augment, LoaderSplit, Prepare, Split, TensorSplit
from efficientdnns.data.targets import check_targets, count_classes
from efficientdnns.errors import ConfigurationError, DataError, suggest
from efficientdnns.layout import fitting_outputs
from efficientdnns.models.user_code import call_factory
from efficientdnns.storage import keeping_memory

__all__ = ["KINDS", "METRICS", "Loss", "Metric", "MetricValue", "Task", "device_of"]

KINDS = (
    "classification",
    "regression",
    "language-modelling",
    "segmentation",
    "detection",
    "feature-extraction",
    "custom",
)
PARTS = ("train", "calibration", "evaluation")

BATCH_SIZE = {"segmentation": 8, "detection": 8}
"""Samples in a batch of an evaluation, by kind of task, where it is not 512."""

_ORDER = ("train", "evaluation", "calibration")
_OPTIONS = ("kind", "loss", "metric", "forward", "example_input", "num_classes", "calibration_share", "name", "seed")


class Task:
    """Data in three disjoint splits, a loss, a metric and a forward adaptor.

    ``train`` is what training sees. ``calibration`` is for choices and statistics (thresholds, ranges, searches); where
    it is not given, ``min(calibration_share, 5000 samples)`` are carved out of the training data, the same ones for the
    same ``seed``, and never trained on. ``evaluation`` is for the report and nothing else. A part that is a
    ``DataLoader`` cannot be carved; then ``calibration`` stays ``None`` unless given.

    Args:
        train, evaluation, calibration: splits, or anything `efficientdnns.data.as_split` takes; ``None`` where there is
            no such data.
        kind: what the network is for; see below.
        loss: ``(outputs, targets) -> scalar`` in place of the kind's own.
        metric: a `Metric`, the name of one of `METRICS`, or a function ``(outputs, targets) -> mean over the batch``
            (higher is better).
        forward: ``(model, inputs) -> outputs`` in place of `outputs`.
        example_input: a batch of one; by default the first sample. A list of samples is kept as ``(list,)``: the
            arguments of one call.
        num_classes: classes, or size of the vocabulary; by default the labels tell the least number, and the network that
            the task is used with, which may know more, the number. A detector's count the background, label 0, as
            torchvision's do.

    Kinds:
        ``classification``: targets (B,); cross-entropy, accuracy in percent.
        ``regression``: mean squared error, mse.
        ``language-modelling``: outputs (B, T, V), targets (B, T); mean cross-entropy over all tokens, perplexity. Tokens
        whose target is -100 count for nothing, as in masked language modelling.
        ``segmentation``: outputs (B, C, h, w), targets (B, H, W); `data.segmentation.segmentation_loss` (an auxiliary
        output of torchvision's networks counts half, pixels of class 255 not at all), mean-iou in percent.
        ``detection``: inputs are a list of images (C, H, W), targets a list of ``{"boxes": (n, 4), "labels": (n,)}``;
        a detector in training mode is called as ``model(images, targets)`` and returns a dictionary of losses, whose
        sum is the loss, in evaluation mode a list of ``{"boxes", "labels", "scores"}``; metric map in percent (or
        ap50).
        ``feature-extraction``: outputs are embeddings (B, D), by default the mean over the tokens of an encoder; targets
        (B, D) are those of another network (`labelled_by`); 1 - cosine similarity, cosine-similarity in percent.
        ``custom``: your own loss and metric.
    Of output objects with ``logits`` (Hugging Face) the first four kinds take these.

    Raises:
        ConfigurationError: an unknown kind or metric, or a custom task without loss or metric.
        DataError: data that cannot be read, targets that do not fit the kind, no data and no example input.
    """

    def __init__(
        self,
        train: Any,
        evaluation: Any = None,
        calibration: Any = None,
        *,
        kind: str = "classification",
        loss: Loss | None = None,
        metric: Metric | str | Callable[[Any, Any], Any] | None = None,
        forward: Callable[[Any, Any], Any] | None = None,
        example_input: Any = None,
        num_classes: int | None = None,
        calibration_share: float = 0.1,
        name: str = "custom",
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise ConfigurationError(f"kind is '{kind}'{suggest(kind, KINDS)}")
        if not 0 <= calibration_share < 1:
            raise ConfigurationError(f"calibration_share is {calibration_share}, expected 0 <= share < 1")
        default_loss, default_metric = DEFAULTS.get(kind, (None, None))
        if (loss or default_loss) is None or (metric or default_metric) is None:
            raise ConfigurationError(f"a custom task needs {'loss=' if loss is None else 'metric='}; give a function")
        self.name, self.kind = name, kind
        self.train: Split | None = None if train is None else as_split(train, "train")
        self.evaluation: Split | None = None if evaluation is None else as_split(evaluation, "evaluation")
        self.calibration: Split | None = None if calibration is None else as_split(calibration, "calibration")
        self.loss: Loss = loss or default_loss  # type: ignore[assignment]
        self.metric: Metric = as_metric(metric or default_metric)
        self.forward = forward
        splits = [split for split in (self.train, self.evaluation, self.calibration) if split is not None]
        for split in splits:
            check_targets(kind, split, num_classes)
        counts = [classes for split in splits if (classes := count_classes(kind, split)) is not None]
        self.num_classes = max(counts, default=None) if num_classes is None else num_classes
        self.least_classes = self.num_classes if num_classes is None else None
        """What the labels tell where `num_classes` was not given: a few images need not show every class."""
        if self.train is not None and self.calibration is None and calibration_share > 0:
            self._carve(calibration_share, seed)
        example = self._first_input() if example_input is None else example_input
        self.example_input: Any = (example,) if isinstance(example, list) else example

    @classmethod
    def from_name(cls, name: str, **options: Any) -> Task:
        """A named data set: ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10`` or ``tinyshakespeare``.

        ``options``: those of `efficientdnns.data.named.named_source` (``limit``, ``evaluation_limit``, ...) and of
        `Task`.
        """
        return cls._from_source(named_source, name, options)

    @classmethod
    def from_folder(cls, folder: Path | str, **options: Any) -> Task:
        """Images in one directory a class; ``options``: see `efficientdnns.data.images.folder_source` and `Task`."""
        return cls._from_source(folder_source, folder, options)

    @classmethod
    def from_parquet(cls, path: Path | str, **options: Any) -> Task:
        """Images in parquet; ``options``: see `efficientdnns.data.images.parquet_source` and `Task`."""
        return cls._from_source(parquet_source, path, options)

    @classmethod
    def from_tensors(
        cls,
        train: Any,
        evaluation: Any = None,
        calibration: Any = None,
        *,
        prepare: Prepare | None = None,
        augment: Augment | None = None,
        **options: Any,
    ) -> Task:
        """Tensors or arrays: each part is ``(inputs, targets)``, or inputs alone where there are no labels.

        ``prepare`` works on the batches of every part, ``augment`` on training batches only; ``options`` are `Task`'s.
        """
        return cls._from_parts((train, evaluation, calibration), options, prepare=prepare, augment=augment)

    @classmethod
    def from_datasets(
        cls,
        train: Any,
        evaluation: Any = None,
        calibration: Any = None,
        *,
        num_workers: int = 0,
        prepare: Prepare | None = None,
        augment: Augment | None = None,
        **options: Any,
    ) -> Task:
        """Map-style torch data sets whose items are (input, target); ``num_workers`` processes read them."""
        parts = (train, evaluation, calibration)
        return cls._from_parts(parts, options, num_workers=num_workers, prepare=prepare, augment=augment)

    @classmethod
    def from_loaders(cls, train: Any, evaluation: Any = None, calibration: Any = None, **options: Any) -> Task:
        """The user's own loaders (anything that can be iterated again and again) as they are.

        See `efficientdnns.data.LoaderSplit` for what a batch may be. Give a calibration loader too where a method needs
        one, because nothing can be carved out of a loader.
        """
        loaders = zip((train, evaluation, calibration), _ORDER)
        parts = [
            data if data is None or isinstance(data, Split) else LoaderSplit(data, name=name) for data, name in loaders
        ]
        return cls._from_parts(parts, options)

    @classmethod
    def from_spec(cls, text: str, **options: Any) -> Task:
        """What the command line takes: a data set name, a folder, a parquet file, or ``file.py:factory``.

        The factory gets ``options`` and returns a `Task`, or its parts (train, evaluation[, calibration]) as loaders or
        data sets. Raises `DataError` for anything else.
        """
        if text in names():
            return cls.from_name(text, **options)
        if ":" in text and text.rpartition(":")[0].endswith(".py"):
            return cls._from_factory(text, options)
        path = Path(text).expanduser()
        if path.is_dir():
            parquet = next(path.rglob("*.parquet"), None) is not None
            return cls.from_parquet(path, **options) if parquet else cls.from_folder(path, **options)
        if path.is_file() and path.suffix == ".parquet":
            return cls.from_parquet(path, **options)
        what = "no data set, folder or parquet file" if not path.exists() else "a file that is not parquet"
        raise DataError(f"task '{text}' is {what}; give one of {', '.join(names())}, a path, or file.py:factory")

    @property
    def has_labels(self) -> bool:
        """Whether the training data (the evaluation data where there is no training data) has targets."""
        split = self.evaluation if self.train is None else self.train
        return split is not None and split.has_labels

    def outputs(self, model: Any, inputs: Any, targets: Any = None) -> Any:
        """The model's outputs for a batch of inputs: through the forward adaptor, or else as the kind of task reads them.

        A tuple of inputs is unpacked and a mapping passed by name. ``targets`` are for a detector in training mode,
        whose inputs become ``(inputs, targets)``.
        """
        training = bool(getattr(model, "training", False))
        if self.kind == "detection" and training and targets is not None:
            inputs = (inputs, targets)
        if self.forward is not None:
            return self.forward(model, inputs)
        if isinstance(inputs, tuple):
            outputs = model(*inputs)
        else:
            outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        return read(self.kind, outputs, inputs, training)

    def evaluate(
        self,
        model: Any,
        split: str | Split = "evaluation",
        *,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        limit: int | None = None,
    ) -> MetricValue:
        """The metric of ``model`` on a split (``evaluation``, ``calibration``, ``train`` or one of your own).

        Runs in evaluation mode without gradients and leaves every module's training flag as it was. ``device`` is where
        to run (the model is moved there and stays); by default where the model is. ``limit`` keeps the first samples.
        ``batch_size`` is 512 by default (128 on a CPU), 8 for segmentation and detection.
        Raises `DataError` if the task has no such split or the split no labels.
        """
        data = self._split(split)
        if not data.has_labels:
            raise DataError(
                f"the {data.name} split of task '{self.name}' has no labels; {self.metric.name} needs targets"
            )
        modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
        if isinstance(model, nn.Module):
            model.eval()
            if device is not None:
                model.to(device)
        place = torch.device(device) if device is not None else device_of(model)
        # On a CPU larger batches run out of its caches.
        usual = BATCH_SIZE.get(self.kind, 128 if place.type == "cpu" else 512)
        samples = 0

        def parts() -> Iterator[tuple[Any, int]]:
            nonlocal samples
            outputs = fitting_outputs(self.outputs)
            for inputs, targets, _ in data.batches(batch_size or usual):
                if limit is not None:
                    inputs, targets = first((inputs, targets), limit - samples)
                inputs, targets = to_device((inputs, targets), place)
                samples += length(targets)
                yield self.metric.function(outputs(model, inputs), targets)
                if samples == limit:
                    return

        try:
            with keeping_memory(), torch.inference_mode():
                value, count = self.metric.over(parts())
        finally:
            for module, mode in modes:
                module.training = mode
        if count == 0:
            raise DataError(f"the {data.name} split of task '{self.name}' is empty; {self.metric.name} needs samples")
        return MetricValue(self.metric.name, value, data.name, samples, self.metric.higher_is_better, self.metric.unit)

    def with_(self, **changes: Any) -> Task:
        """A copy with another ``train``, ``evaluation``, ``calibration``, ``loss``, ``metric``, ``forward``, ``name``.

        Nothing is carved anew: a changed training split leaves the calibration split as it is.
        """
        known = ("name", "kind", *PARTS, "loss", "metric", "num_classes", "example_input", "forward")
        other = copy.copy(self)
        for key, value in changes.items():
            if key not in known:
                raise ConfigurationError(f"a task has no '{key}'{suggest(key, known)}")
            if key in PARTS and value is not None:
                value = as_split(value, key)
            setattr(other, key, as_metric(value) if key == "metric" else value)
        if "num_classes" in changes:
            other.least_classes = None
        return other

    def without_labels(self) -> Task:
        """A copy whose splits hide their targets."""
        return self.with_(
            **{part: split.without_labels() for part in PARTS if (split := getattr(self, part)) is not None}
        )

    def labelled_by(self, model: nn.Module, *, batch_size: int = 128) -> Task:
        """A copy whose targets are what ``model`` gives now: its embeddings (or logits) become what is to be matched.

        Only for data in memory (`from_tensors`); raises `DataError` for other splits. The outputs are computed once, from
        inputs without augmentation.
        """
        labelled = {part: split for part in PARTS if (split := getattr(self, part)) is not None}
        model.eval()
        for part, split in labelled.items():
            if not isinstance(split, TensorSplit):
                raise DataError(f"the {split.name} split is not in memory; give tensors (Task.from_tensors)")
            with torch.no_grad():
                batches = (to_device(batch.inputs, device_of(model)) for batch in split.batches(batch_size))
                outputs = torch.cat([self.outputs(model, inputs).cpu() for inputs in batches])
            labelled[part] = split.with_targets(outputs)
        return self.with_(**labelled)

    def to(self, device: torch.device | str) -> Task:
        """A copy whose in-memory splits lie on ``device``, so that batches are cut there."""
        return self.with_(**{part: split.to(device) for part in PARTS if (split := getattr(self, part)) is not None})

    def __repr__(self) -> str:
        parts = ", ".join(f"{part} {len(split):,}" for part in PARTS if (split := getattr(self, part)) is not None)
        return f"Task({self.name!r}, {self.kind}, {parts or 'no data'}, metric {self.metric.name})"

    @classmethod
    def _from_source(cls, read: Callable[..., Source], what: Any, options: dict[str, Any]) -> Task:
        own = {key: options.pop(key) for key in _OPTIONS if key in options}
        if read is not named_source:
            check_options(f"task '{what}'", options, read, image_source)
            options["seed"] = own.get("seed", 0)
        source = read(what, **options)
        facts = {key: value for key, value in vars(source).items() if value is not None}
        return cls(**(facts | own))

    @classmethod
    def _from_parts(cls, parts: Sequence[Any], options: dict[str, Any], **split_options: Any) -> Task:
        splits = (None if data is None else as_split(data, name, **split_options) for data, name in zip(parts, _ORDER))
        return cls(*splits, **options)

    @classmethod
    def _from_factory(cls, text: str, options: dict[str, Any]) -> Task:
        made = call_factory(text, options, DataError)
        if isinstance(made, tuple | list) and 2 <= len(made) <= 3:
            made = cls(*made, name=text)
        if not isinstance(made, Task):
            raise DataError(f"{text} returned a {type(made).__name__}; expected a Task or (train, evaluation) data")
        return made

    def _split(self, split: str | Split) -> Split:
        if isinstance(split, Split):
            return split
        if split not in PARTS:
            raise ConfigurationError(f"split is '{split}'{suggest(split, PARTS)}")
        found: Split | None = getattr(self, split)
        if found is None:
            raise DataError(f"task '{self.name}' has no {split} split; give {split}= when making the task")
        return found

    def _carve(self, share: float, seed: int) -> None:
        assert self.train is not None
        if not self.train.divisible or int(share * len(self.train)) == 0:
            return
        self.train, self.calibration = carve(self.train, share, seed=seed)

    def _first_input(self) -> Any:
        for split in (self.evaluation, self.train, self.calibration):
            if split is not None and len(split) > 0:
                start = split.take([0]) if split.divisible else next(split.batches(1))
                return first(start.inputs, 1)
        raise DataError(f"task '{self.name}' has no data; give example_input= (a batch of one) so that models can run")


def device_of(model: Any) -> torch.device:
    """Where the model's first parameter (or buffer) lies; the CPU for anything that has none."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")
