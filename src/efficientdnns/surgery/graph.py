"""Which channels of a network can be removed, and what has to be removed with them.

:meth:`ChannelGraph.trace` runs ``torch.export`` on the network in eval mode, follows every channel through the
operations and collects the channels into *groups* of interchangeable *units*. Removing one unit takes rows, columns and
vector entries out of all tensors that hold the channel, whatever lies between them: residual additions, concatenations,
constant padding, flattening, depthwise convolutions, recurrent gates, tied weights.

>>> graph = ChannelGraph.trace(model, torch.zeros(1, 3, 32, 32))        # doctest: +SKIP
>>> [(group.name, group.size) for group in graph.groups]                # doctest: +SKIP
[('conv1', 16), ('layer1.0.conv1', 16), ...]
>>> smaller = remove(model, example, {"conv1": [3, 7]}, graph)          # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from efficientdnns.errors import SurgeryError, suggest
from efficientdnns.storage import trim
from efficientdnns.surgery.atoms import Atoms, Ids, KeptWhole
from efficientdnns.surgery.trace import Inputs, Node, Record
from efficientdnns.surgery.trace_network import trace_network

Role = Literal["out", "in", "vector"]


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer that holds channels of a group.

    Attributes:
        tensor: Its name in the state dict, e.g. ``"layer1.0.conv1.weight"``.
        module: Path of the module that owns it, e.g. ``"layer1.0.conv1"``.
        attribute: Its name inside that module, e.g. ``"weight"``.
        dim: The dimension along which channels lie.
        role: ``"out"`` for rows that make the channels, ``"in"`` for columns that read them, ``"vector"`` for entries
            that act on them (bias, batch norm, depthwise filters, index buffers).
        index: LongTensor (size, k): the k positions along ``dim`` that belong to each unit; k is 1 except after
            flattening (height * width features a channel) and in recurrent gates (4 for LSTM, 3 for GRU).
    """

    tensor: str
    module: str
    attribute: str
    dim: int
    role: Role
    index: Tensor


@dataclass(frozen=True)
class Group:
    """Interchangeable removable units: any of them, but not all, can go.

    Attributes:
        name: The first module that makes these channels, e.g. ``"layer1.0.conv1"``; with ``#2``, ``#3`` ... where the
            channels of one module belong to several groups (option-A residual networks).
        size: Number of units.
        members: Everything that loses an entry when a unit goes.
        units: Internal number of every unit.
        in_statistics: Whether something is averaged over these channels (a layer norm, say), so that removing even a
            channel of zeros changes what is left.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    units: NDArray[np.int64] = field(repr=False)
    in_statistics: bool = False

    def reduce(self, values: Mapping[str, Tensor], roles: Iterable[str] = ("out",), reduction: str = "sum") -> Tensor:
        """Add up elementwise values (say, squared weights) over everything that belongs to each unit.

        Args:
            values: Tensors by state-dict name, shaped like the parameters; missing ones are left out.
            roles: Which members count.
            reduction: ``"sum"`` or ``"mean"`` (sum divided by the number of elements of a unit).

        Returns:
            Tensor (size,); zeros where no value applies.
        """
        if reduction not in ("sum", "mean"):
            raise SurgeryError(f"unknown reduction {reduction!r}: write 'sum' or 'mean'")
        chosen = [m for m in self.members if m.role in tuple(roles) and m.tensor in values]
        total = torch.zeros(self.size)
        elements = 0
        for member in chosen:
            value = values[member.tensor].movedim(member.dim, 0)
            rows = value.reshape(value.shape[0], -1)
            total = total.to(rows) + rows.sum(1)[member.index.to(rows.device)].sum(1)
            elements += member.index.shape[1] * rows.shape[1]
        return total / max(elements, 1) if reduction == "mean" else total


@dataclass
class ChannelGraph:
    """The channel groups of a network; see the module's documentation.

    Attributes:
        groups: In the order of execution of their first producers.
        kept_whole: Operations that keep channels whole, with the reason.
        nodes: The operations in execution order.
        outputs: Names of the nodes that make the network's outputs.
        exported: The exported program, or None where the module-hook fallback was used.
        source: ``"export"`` or ``"hooks"``.
        gathers: For every index buffer the unit of each position that it can point to (-1: never removed).
        unit_of: Unit of every atom.
        values: What the analysis knows about every node of :attr:`exported`.
        example: The inputs of the traced run.
        recorded: Modules whose code has sizes written into it and is replaced by its recorded graph after a removal.
        calls: How every module was called in the traced run, once somebody asked.
    """

    groups: list[Group]
    kept_whole: list[KeptWhole]
    nodes: list[Node]
    outputs: tuple[str, ...] = ()
    exported: ExportedProgram | None = None
    source: str = "export"
    gathers: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    unit_of: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    values: dict[torch.fx.Node, Any] = field(default_factory=dict, repr=False)
    example: tuple[Any, ...] = field(default=(), repr=False)
    recorded: set[str] = field(default_factory=set)
    calls: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def trace(cls, model: nn.Module, example_inputs: Inputs, verify: bool = True) -> ChannelGraph:
        """Analyse a network.

        Args:
            model: Left as it is (its train/eval flags too).
            example_inputs: One input tensor, or a tuple of the positional arguments, of any batch size.
            verify: Also try the removal of half the units of every group, and keep whole the groups for which the smaller
                network fails or computes something else (for instance because the code says ``view(-1, 256)``).

        Raises:
            SurgeryError: Where the network does not run on the example.
        """
        record = trace_network(model, example_inputs)
        graph = _collect(record)
        if verify:
            from efficientdnns.surgery.verify import failing_groups  # it removes, and removing needs a graph

            failures = failing_groups(model, example_inputs, graph)
            graph.groups = [group for group in graph.groups if group.name not in failures]
            for name, reason in failures.items():
                graph.kept_whole.append(KeptWhole(name.split("#")[0], "forward", reason, (name.split("#")[0],)))
            trim(garbage_of=model)  # the networks of the trial, before the next one is made
        return graph

    @property
    def order(self) -> list[str]:
        """Paths of the modules in the order in which they are first called."""
        return list(dict.fromkeys(node.module for node in self.nodes))

    def group(self, name: str) -> Group:
        """The group of this name; raises SurgeryError naming similar ones."""
        for group in self.groups:
            if group.name == name:
                return group
        kept = [entry for entry in self.kept_whole if name.split("#")[0] in entry.layers]
        if kept:
            where = f"{kept[0].operation} in {kept[0].module or 'forward'!r}"
            raise SurgeryError(f"the channels of {name!r} are kept whole: {where} {kept[0].reason}")
        raise SurgeryError(f"no channel group is called {name!r}{suggest(name, [group.name for group in self.groups])}")

    def groups_of(self, module: str) -> list[Group]:
        """The groups whose channels the module makes."""
        return [group for group in self.groups if module in self.producers(group)]

    def producers(self, group: Group) -> list[str]:
        """Paths of the modules that make the group's channels."""
        return list(dict.fromkeys(member.module for member in group.members if member.role == "out"))

    def consumers(self, group: Group) -> list[str]:
        """Paths of the modules that read the group's channels."""
        return list(dict.fromkeys(member.module for member in group.members if member.role == "in"))

    def parameter_of(self, node: str | torch.fx.Node) -> tuple[str, ...]:
        """Names of the parameters and buffers that an operation reads; for a placeholder of :attr:`exported` its own
        name."""
        if isinstance(node, torch.fx.Node) and node.op == "placeholder" and self.exported is not None:
            specs = self.exported.graph_signature.input_specs
            return tuple(spec.target for spec in specs if spec.arg.name == node.name and spec.target is not None)
        name = node if isinstance(node, str) else node.name
        return next((n.parameters for n in self.nodes if n.name == name), ())

    def batch_norm_after(self, module: str) -> str | None:
        """Path of the batch normalisation that alone reads the output of a convolution or linear layer, or None."""
        made = [node for node in self.nodes if node.module == module and f"{module}.weight" in node.parameters]
        if len(made) != 1 or made[0].name in self.outputs:
            return None
        readers = [node for node in self.nodes if made[0].name in node.inputs]
        return readers[0].module if len(readers) == 1 and readers[0].operation == "batch_norm" else None


def _collect(record: Record) -> ChannelGraph:
    atoms = record.atoms
    unit_of, pinned = atoms.resolve()
    entries = _entries(atoms)
    offsets = np.cumsum([0, *[len(ids) for *_, ids in entries]])
    units = np.concatenate([unit_of[ids] for *_, ids in entries] or [np.empty(0, np.int64)])
    which = np.repeat(np.arange(len(entries)), np.diff(offsets))
    active = np.zeros(len(pinned), dtype=bool)  # something makes, reads or selects these channels
    for name, dim, ids in entries:
        if (name, dim) in atoms.roles or name in atoms.gathers:
            active[unit_of[ids]] = True
    removable = active & ~pinned
    pairs, counts = np.unique((units * len(entries) + which)[removable[units]], return_counts=True)
    signatures: dict[int, list[tuple[int, int]]] = {}
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        unit, entry = divmod(pair, len(entries))
        signatures.setdefault(unit, []).append((entry, count))
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for unit, signature in signatures.items():
        alike.setdefault(tuple(signature), []).append(unit)
    counted = np.zeros(len(pinned), dtype=bool)
    for ids in atoms.statistics:
        counted[unit_of[ids]] = True
    groups = [_group(atoms, entries, unit_of, np.array(members), signature) for signature, members in alike.items()]
    groups = [(replace(group, in_statistics=bool(counted[group.units].any())), at) for group, at in groups]
    in_group = np.isin(np.arange(len(pinned)), np.concatenate([g.units for g, _ in groups] or [np.empty(0, np.int64)]))
    gathers = {name: np.where(in_group[unit_of[ids]], unit_of[ids], -1) for name, ids in atoms.gathers.items()}
    return ChannelGraph(
        groups=_named(groups),
        kept_whole=_kept_whole(atoms, unit_of, entries),
        nodes=record.nodes,
        outputs=record.outputs,
        exported=record.exported,
        source=record.source,
        gathers=gathers,
        unit_of=unit_of,
        values=record.values,
        example=record.example,
    )


def _entries(atoms: Atoms) -> list[tuple[str, int, Ids]]:
    """(tensor, dimension, atoms) of every dimension of every parameter, in execution order."""
    return [
        (name, d, ids)
        for name, value in atoms.parameters.items()
        for d, ids in enumerate(value.dims)
        if ids is not None
    ]


def _group(
    atoms: Atoms, entries: list[tuple[str, int, Ids]], unit_of: Ids, units: Ids, signature: tuple[tuple[int, int], ...]
) -> tuple[Group, tuple[int, int]]:
    """Build one group; also return (entry, position) of its first producer, by which groups are ordered."""
    first = next((e for e, _ in signature if "out" in atoms.roles.get(entries[e][:2], [])), signature[0][0])
    made = unit_of[entries[first][2]]
    made = made[np.isin(made, units)]
    _, seen = np.unique(made, return_index=True)
    units = made[np.sort(seen)]
    rank = np.full(len(unit_of), len(units), dtype=np.int64)
    rank[units] = np.arange(len(units))
    members: list[Member] = []
    for entry, count in signature:
        name, dim, ids = entries[entry]
        order = np.argsort(rank[unit_of[ids]], kind="stable")[: count * len(units)]
        module, _, attribute = name.rpartition(".")
        index = torch.from_numpy(order.reshape(len(units), count))
        for role in atoms.roles.get((name, dim), ["vector"]):
            members.append(Member(name, module, attribute, dim, role, index))  # type: ignore[arg-type]
    position = int(np.flatnonzero(unit_of[entries[first][2]] == units[0])[0])
    module = entries[first][0].rpartition(".")[0] or entries[first][0]
    return Group(module, len(units), tuple(members), units), (first, position)


def _named(groups: list[tuple[Group, tuple[int, int]]]) -> list[Group]:
    result: list[Group] = []
    times: dict[str, int] = {}
    for group, _ in sorted(groups, key=lambda pair: pair[1]):
        times[group.name] = times.get(group.name, 0) + 1
        result.append(replace(group, name=f"{group.name}#{times[group.name]}") if times[group.name] > 1 else group)
    return result


def _kept_whole(atoms: Atoms, unit_of: Ids, entries: list[tuple[str, int, Ids]]) -> list[KeptWhole]:
    """The listed reasons, each with the layers it concerns; reasons that concern no layer are dropped."""
    silent = np.zeros(int(unit_of.max(initial=-1)) + 1, dtype=bool)  # inputs, outputs: they stay anyway
    by_reason: dict[KeptWhole, list[Ids]] = {}
    for ids, why in atoms.pins:
        if why is None:
            silent[unit_of[ids]] = True
        else:
            by_reason.setdefault(why, []).append(unit_of[ids])
    made = [(name, np.unique(unit_of[ids])) for name, dim, ids in entries if "out" in atoms.roles.get((name, dim), [])]
    listed: list[KeptWhole] = []
    for why, arrays in by_reason.items():
        concerned = np.setdiff1d(np.concatenate(arrays), np.flatnonzero(silent))
        layers = [name.rpartition(".")[0] or name for name, units in made if np.isin(units, concerned).any()]
        if layers:
            listed.append(replace(why, layers=tuple(dict.fromkeys(layers))))
    return listed
