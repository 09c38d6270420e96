"""Atoms: every position of every tensor dimension that can carry channels has a number, and operations equate numbers.

The rules of :mod:`efficientdnns.surgery.rules` only *record* what they learn (pairs of equal atoms, atoms that must
stay); the record is resolved once, at the end, with one connected-components pass. What comes out are *units*: sets of
positions, over all parameters of the network, that can only be removed together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
"""Atom numbers along one dimension of a tensor."""

Shape = tuple[int, ...]

Split = tuple[str, Shape]
"""Where a channel dimension is split, and into what: path of the module, sizes of the pieces."""


@dataclass(frozen=True)
class KeptWhole:
    """An operation that keeps the channels it touches: nothing is removed there.

    Attributes:
        module: Path of the module in which the operation is written ("" is the network's own ``forward``).
        operation: Name of the ATen operation, or ``"forward"`` where a trial run of the whole network failed.
        reason: Why, in words.
        layers: Paths of the layers whose output channels stay whole because of it.
    """

    module: str
    operation: str
    reason: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Value:
    """What the analysis knows about one tensor of the graph.

    Attributes:
        shape: Its shape in the traced run.
        dims: Per dimension the atoms of its positions, or None where no position can ever be removed.
        origin: For a parameter or a transposed view of one: its name and, per dimension, the parameter's own dimension.
        created_in: For a tensor of constants made during the forward pass: path of the module that made it.
    """

    shape: Shape
    dims: tuple[Ids | None, ...]
    origin: tuple[str, tuple[int, ...]] | None = None
    created_in: str | None = None

    @classmethod
    def untracked(cls, shape: Iterable[int], created_in: str | None = None) -> Value:
        """A tensor none of whose dimensions carries removable channels."""
        shape = tuple(shape)
        return cls(shape, (None,) * len(shape), created_in=created_in)


@dataclass
class Atoms:
    """The record that the rules write into.

    Attributes:
        statistics: Channels over which something is averaged: without them the statistics are those of the others.
        carriers: For every way of splitting a channel dimension which piece carries the removable units: 0 the last
            (positions inside every head), 1 the one before it (whole heads), ...; 0 where it is not named.
        splits: The carrying atoms of every split.
    """

    count: int = 0
    equal: list[tuple[Ids, Ids]] = field(default_factory=list)
    pins: list[tuple[Ids, KeptWhole | None]] = field(default_factory=list)
    constants: set[int] = field(default_factory=set)
    parameters: dict[str, Value] = field(default_factory=dict)
    roles: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    gathers: dict[str, Ids] = field(default_factory=dict)
    statistics: list[Ids] = field(default_factory=list)
    carriers: dict[Split, int] = field(default_factory=dict)
    splits: dict[Split, list[Ids]] = field(default_factory=dict)

    def fresh(self, size: int) -> Ids:
        """New atoms, equal to nothing yet."""
        start, self.count = self.count, self.count + size
        return np.arange(start, self.count, dtype=np.int64)

    def constant(self, size: int) -> Ids:
        """New atoms for positions that are part of a channel dimension but can never be removed (padding, network
        inputs)."""
        ids = self.fresh(size)
        self.constants.update(ids.tolist())
        self.pin(ids)
        return ids

    def same(self, first: Ids, second: Ids) -> None:
        """Equate atoms position by position (broadcasting)."""
        first, second = np.broadcast_arrays(first, second)
        self.equal.append((first.ravel(), second.ravel()))

    def pin(self, ids: Ids | None, why: KeptWhole | None = None) -> None:
        """These positions must stay; ``why`` is listed to the user, None where it goes without saying (inputs,
        outputs)."""
        if ids is not None:
            self.pins.append((np.asarray(ids).ravel(), why))

    def pin_value(self, value: Value, why: KeptWhole | None = None) -> None:
        """Pin every dimension of a tensor."""
        for ids in value.dims:
            self.pin(ids, why)

    def meet(self, dims: Sequence[Ids | None], why: KeptWhole | None = None) -> Ids | None:
        """Equate dimensions that lie on each other; where one of them cannot change, none can."""
        known = [ids for ids in dims if ids is not None]
        if len(known) < len(dims):
            for ids in known:
                self.pin(ids, why)
        for ids in known[1:]:
            self.same(known[0], ids)
        return known[0] if known else None

    def parameter(self, name: str, shape: Shape) -> Value:
        """The value of a parameter or buffer: its dimensions get atoms when first seen and the same ones ever after."""
        if name not in self.parameters:
            self.parameters[name] = Value(shape, tuple(self.fresh(n) for n in shape), (name, tuple(range(len(shape)))))
        return self.parameters[name]

    def mark(self, value: Value, dim: int, role: str) -> None:
        """Note that dimension ``dim`` of a parameter (or of a transposed view of one) makes ("out") or reads ("in")
        channels."""
        if value.origin is not None:
            name, dims = value.origin
            roles = self.roles.setdefault((name, dims[dim]), [])
            if role not in roles:
                roles.append(role)

    def resolve(self) -> tuple[Ids, NDArray[np.bool_]]:
        """Return the unit of every atom, and for every unit whether it must stay."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        empty = np.empty(0, dtype=np.int64)
        rows = np.concatenate([a for a, _ in self.equal] or [empty])
        columns = np.concatenate([b for _, b in self.equal] or [empty])
        size = max(self.count, 1)  # SciPy has no empty matrices
        links = coo_matrix((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=(size, size))
        units, unit_of = connected_components(links, directed=False)
        pinned = np.zeros(units, dtype=bool)
        for ids, _ in self.pins:
            pinned[unit_of[ids]] = True
        return unit_of.astype(np.int64), pinned
