"""Activation records: class-wise statistics of a network's hidden responses, shipped in place of its training data.

Made once by whoever has the data; `efficientdnns.distillation.data_free_kd` makes images from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from efficientdnns.data.nested import leaves, to_device
from efficientdnns.errors import ConfigurationError, DataError, FileFormatError
from efficientdnns.parts.tap import Tap, evaluating, tap_once, weighted_layers
from efficientdnns.task import Task
from efficientdnns.training import load_state, save_state

Scope = Literal["top", "all", "spectral-all", "spectral-pairs"]
CovarianceKind = Literal["auto", "full", "diagonal"]

FULL_UP_TO = 256
"""Widest layer whose covariance ``auto`` keeps in full."""
LARGEST_GRAPH = 8192
"""Most units of one co-activation graph: its eigenvectors take minutes beyond that."""


class Moments:
    """Streaming mean and covariance (divided by N) of vectors, class by class, in float64."""

    def __init__(self, classes: int, width: int, full: bool) -> None:
        self.count = torch.zeros(classes, dtype=torch.float64)
        self.mean = torch.zeros(classes, width, dtype=torch.float64)
        shape = (classes, width, width) if full else (classes, width)
        self.spread = torch.zeros(shape, dtype=torch.float64)

    def add(self, values: Tensor, labels: Tensor) -> None:
        """Take in a batch (B, width) with its labels (B)."""
        values = values.double().cpu()
        for label in labels.unique().tolist():
            rows = values[labels.cpu() == label]
            delta = rows.mean(0) - self.mean[label]
            total = self.count[label] + len(rows)
            centred = rows - rows.mean(0)
            weight = self.count[label] * len(rows) / total
            # Chan, Golub and LeVeque: merging two sets moves each mean by a known amount.
            if self.spread.dim() == 3:
                self.spread[label] += centred.T @ centred + weight * torch.outer(delta, delta)
            else:
                self.spread[label] += centred.square().sum(0) + weight * delta.square()
            self.mean[label] += delta * len(rows) / total
            self.count[label] = total

    @property
    def covariance(self) -> Tensor:
        """(classes, width, width), or the variances (classes, width); zero for a class without samples."""
        count = self.count.clamp(min=1)
        return self.spread / count.view(-1, *[1] * (self.spread.dim() - 1))


@dataclass
class Statistics:
    """What is kept of one block of responses.

    ``layers`` whose responses form the block, side by side; ``basis`` (units, k) whose coefficients are kept, or None
    for the responses themselves; ``mean`` (classes, k); ``covariance`` (classes, k, k), or variances (classes, k).
    """

    layers: list[str]
    mean: Tensor
    covariance: Tensor
    basis: Tensor | None = None

    def sample(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        """``count`` targets (count, k) from the class's normal distribution."""
        noise = torch.randn(count, self.mean.shape[1], generator=generator)
        spread = self.covariance[label]
        if spread.dim() == 1:
            return self.mean[label] + noise * spread.sqrt()
        return self.mean[label] + noise @ square_root(spread).T

    def responses(self, values: dict[str, Tensor]) -> Tensor:
        """The block's responses or coefficients (B, k) from the responses of each layer (B, ...)."""
        block = torch.cat([values[name].flatten(1) for name in self.layers], 1)
        return block if self.basis is None else block @ self.basis.to(block)


def square_root(covariance: Tensor) -> Tensor:
    """L with L L^T = covariance (n, n), for any positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * values.clamp(min=0).sqrt()).to(covariance.dtype)


@dataclass
class ActivationRecord:
    """Statistics of a network's responses by class: all that is needed to make images for it.

    ``blocks`` hold a layer's pre-activation responses each (``top``: the logits alone; ``all``: every convolution and
    linear layer), or the leading coefficients of graphs of layers (``spectral-*``). The logits, named ``""``, are
    divided by ``temperature``. ``data_bytes`` is the size of the data it was made from, for comparison.
    """

    scope: Scope
    temperature: float
    classes: int
    counts: list[int]
    data_bytes: int
    blocks: list[Statistics]

    @property
    def layers(self) -> list[str]:
        """All layers that are read."""
        return list(dict.fromkeys(name for block in self.blocks for name in block.layers))

    @property
    def bytes(self) -> int:
        """Size of the record's tensors."""
        tensors = [t for block in self.blocks for t in (block.mean, block.covariance, block.basis) if t is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def read(self, tap: Tap, logits: Tensor) -> dict[str, Tensor]:
        """The responses of the last forward pass by layer, the logits divided by the temperature."""
        return {name: tap[name] if name else logits / self.temperature for name in self.layers}

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        save_state(Path(path), {"activation_record": 1, **vars(self), "blocks": [vars(b) for b in self.blocks]})

    @classmethod
    def load(cls, path: str | Path) -> ActivationRecord:
        """Read a record; raises `FileFormatError` if the file holds none."""
        if not Path(path).is_file():
            raise FileFormatError(f"there is no activation record {path}; give a file written by ActivationRecord.save")
        state = load_state(Path(path))
        if not isinstance(state, dict) or state.pop("activation_record", None) != 1:
            raise FileFormatError(f"{path} is no activation record; give a file written by ActivationRecord.save")
        return cls(**{**state, "blocks": [Statistics(**block) for block in state["blocks"]]})


@torch.no_grad()
def record_activations(
    teacher: nn.Module,
    task: Task,
    scope: Scope = "all",
    *,
    covariance: CovarianceKind = "auto",
    keep: float = 0.1,
    temperature: float = 8.0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> ActivationRecord:
    """Go over the training data and record the teacher, in evaluation mode.

    Args:
        teacher: the trained network; it is left as it was.
        task: classification with training data; without labels the teacher's own predictions take their place.
        scope: see `ActivationRecord`. The spectral scopes are inferred: the paper's text names a graph Fourier
            transform of co-activations, its released code does not contain it. Here the units of all layers
            (``spectral-all``) or of two neighbouring layers (``spectral-pairs``) are vertices, mean outer products of
            neighbouring layers' responses are edge weights, and the eigenvectors of largest absolute eigenvalue form
            the basis.
        covariance: ``full``, ``diagonal`` or ``auto`` (full up to 256 units).
        keep: share of the spectral coefficients that is kept, in (0, 1].
        temperature: T, by which logits are divided.
        batch_size: samples at a time.
        device: where to run.
        advance: called after each batch.

    Raises:
        DataError: the task has no training data or no classes. ConfigurationError: a graph of more than 8192 units.
    """
    if task.train is None or task.num_classes is None:
        raise DataError(f"task '{task.name}' has no training data with classes to record; give a record file")
    layers = [""]
    if scope != "top":
        layers = _hidden_layers(teacher, to_device(task.example_input, device), task.outputs) + layers
    record = ActivationRecord(scope, temperature, task.num_classes, [], _data_bytes(task), [])
    tap = Tap(teacher, [name for name in layers if name], "pre-activation")

    def sweep() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        assert task.train is not None
        with evaluating(teacher), tap:
            for batch in task.train.batches(batch_size):
                logits = task.outputs(teacher, to_device(batch.inputs, device))
                labels = logits.argmax(1) if batch.targets is None else batch.targets
                values = {name: tap[name] if name else logits / temperature for name in layers}
                advance()
                yield {name: value.flatten(1) for name, value in values.items()}, labels.cpu()

    groups: list[list[str]] = [[name] for name in layers]
    bases: list[Tensor | None] = [None] * len(layers)
    if scope.startswith("spectral"):
        groups = [layers] if scope == "spectral-all" else [list(pair) for pair in pairwise(layers)]
        bases = [*(graph_basis(matrix, keep) for matrix in _co_activations(sweep(), groups))]
    blocks = [Statistics(group, torch.empty(0), torch.empty(0), basis) for group, basis in zip(groups, bases)]
    moments: list[Moments] = []
    for values, labels in sweep():
        for index, block in enumerate(blocks):
            rows = block.responses(values)
            if len(moments) == index:
                full = covariance == "full" or (covariance == "auto" and rows.shape[1] <= FULL_UP_TO)
                moments.append(Moments(task.num_classes, rows.shape[1], full))
            moments[index].add(rows, labels)
    for block, moment in zip(blocks, moments):
        block.mean, block.covariance = moment.mean.float(), moment.covariance.float()
    record.blocks, record.counts = blocks, moments[0].count.int().tolist()
    return record


def graph_basis(adjacency: Tensor, keep: float) -> Tensor:
    """The eigenvectors (units, k) of a symmetric matrix with the k = keep * units largest absolute eigenvalues."""
    values, vectors = torch.linalg.eigh(adjacency)
    kept = values.abs().topk(max(1, round(keep * len(values)))).indices
    return vectors[:, kept].float().contiguous()


def _co_activations(sweep: Iterator[tuple[dict[str, Tensor], Tensor]], groups: list[list[str]]) -> list[Tensor]:
    """The adjacency matrix of each group of layers: mean outer products of neighbouring layers, zero elsewhere."""
    edges: dict[tuple[str, str], Tensor] = {}
    widths: dict[str, int] = {}
    samples = 0
    for values, labels in sweep:
        if not widths:
            widths = {name: value.shape[1] for name, value in values.items()}
            _check_size(groups, widths)
        samples += len(labels)
        for pair in {pair for group in groups for pair in pairwise(group)}:
            product = values[pair[0]].T @ values[pair[1]]
            edges[pair] = edges[pair] + product if pair in edges else product
    matrices = []
    for group in groups:
        starts = [0, *torch.tensor([widths[name] for name in group]).cumsum(0).tolist()]
        matrix = torch.zeros(starts[-1], starts[-1])
        for position, pair in enumerate(pairwise(group)):
            start, middle, end = starts[position : position + 3]
            matrix[start:middle, middle:end] = edges[pair] / samples
            matrix[middle:end, start:middle] = edges[pair].T / samples
        matrices.append(matrix)
    return matrices


def _check_size(groups: list[list[str]], widths: dict[str, int]) -> None:
    for group in groups:
        if (units := sum(widths[name] for name in group)) > LARGEST_GRAPH:
            raise ConfigurationError(
                f"the layers '{group[0]}' to '{group[-1] or 'logits'}' have {units} units together, more than "
                f"{LARGEST_GRAPH}; take scope 'all' or a smaller network"
            )


def _hidden_layers(teacher: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Any]) -> list[str]:
    """Convolutions and linear layers with responses of their own, without the one that makes the logits."""
    names = weighted_layers(teacher, example, forward)
    values = tap_once(teacher, names, example, forward)
    # Several layers may feed one activation (a block's last convolution and its shortcut).
    first = {id(value): name for name, value in reversed(values.items())}
    return [name for name in names[:-1] if first[id(values[name])] == name]


def _data_bytes(task: Task) -> int:
    assert task.train is not None
    sample = next(task.train.batches(1)).inputs
    return sum(tensor.numel() * tensor.element_size() for tensor in leaves(sample)) * len(task.train)
