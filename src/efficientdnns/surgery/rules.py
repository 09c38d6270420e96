"""One small function per ATen operation: how the channels of its result relate to the channels of its inputs.

A rule gets a :class:`Call` and returns a :class:`~efficientdnns.surgery.atoms.Value` (or a tuple of them). To teach the
engine an operation, write one function here and decorate it with ``@rule("name", ...)``. Layers with parameters are in
:mod:`~efficientdnns.surgery.layer_rules`, those that move channels in :mod:`~efficientdnns.surgery.shape_rules` and
:mod:`~efficientdnns.surgery.block_rules`; an operation without a rule keeps its channels whole and is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from efficientdnns.surgery.atoms import Atoms, Ids, KeptWhole, Shape, Value

Result = Value | tuple[Value, ...]
Rule = Callable[["Call"], Result]

RULES: dict[str, Rule] = {}
UNREMOVABLE = "is combined with values whose channels cannot be removed"


@dataclass(frozen=True)
class Call:
    """One operation of the traced graph.

    Attributes:
        operation: ATen name without overload and in-place mark, e.g. ``"conv2d"``.
        module: Path of the module it was called in.
        arguments: Its arguments by schema name, tensors as :class:`Value`.
        shapes: Shape of every tensor that it returns.
        atoms: The record to write into.
        tensors: The network's parameters and buffers by name.
        several: Whether it returns a tuple or list.
    """

    operation: str
    module: str
    arguments: dict[str, Any]
    shapes: tuple[Shape, ...]
    atoms: Atoms
    tensors: Mapping[str, Tensor]
    several: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument ``name``, or ``default`` where the operation has none of that name."""
        return self.arguments.get(name, default)

    @property
    def shape(self) -> Shape:
        """Shape of the (first) result."""
        return self.shapes[0]

    def values(self) -> list[Value]:
        """All tensor arguments, those inside lists too."""
        found: list[Value] = []
        for argument in self.arguments.values():
            items = argument if isinstance(argument, (list, tuple)) else (argument,)
            found += [item for item in items if isinstance(item, Value)]
        return found

    def why(self, reason: str) -> KeptWhole:
        """The entry that tells the user why this operation keeps its channels whole."""
        return KeptWhole(self.module, self.operation, reason)

    def keep(self, ids: Ids | None, reason: str) -> None:
        """Keep these channels whole."""
        self.atoms.pin(ids, self.why(reason))

    def output(self, dims: Iterable[Ids | None]) -> Value:
        """The (first) result with these dimensions."""
        return Value(self.shape, tuple(dims))

    def untracked(self) -> Result:
        """Results without removable channels."""
        values = tuple(Value.untracked(shape) for shape in self.shapes)
        return values if self.several else values[0]


def rule(*operations: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these ATen operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operations, function))
        return function

    return register


def unknown(call: Call, reason: str = "there is no rule for this operation") -> Result:
    """Everything that goes in stays whole."""
    for value in call.values():
        call.atoms.pin_value(value, call.why(reason))
    return call.untracked()


def axes(dim: int | Sequence[int] | None, rank: int) -> list[int]:
    """Normalised dimensions; None or an empty list means all."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(rank))
    return [d % rank for d in ([dim] if isinstance(dim, int) else dim)]


@rule(
    *("dropout", "feature_dropout", "alpha_dropout", "contiguous", "_to_copy", "hardswish", "log_sigmoid"),
    *("copy", "detach", "alias", "lift_fresh_copy", "bernoulli", "zeros_like", "ones_like", "full_like", "rand_like"),
    *("randn_like", "positive", "fill", "zero", "hardsigmoid", "softsign", "clone"),
)
def pointwise(call: Call) -> Result:
    """Element by element with broadcasting: what lies on each other belongs together."""
    return call.output(overlay(call, [(value.shape, value.dims) for value in call.values()], call.shape))


def overlay(call: Call, operands: list[tuple[Shape, tuple[Ids | None, ...]]], shape: Shape) -> list[Ids | None]:
    """Broadcast several operands to ``shape``, equating what lies on each other."""
    dims: list[Ids | None] = []
    for d in range(len(shape)):
        lying: list[Ids | None] = []
        for own_shape, own_dims in operands:
            own = d - (len(shape) - len(own_shape))
            if own < 0:
                continue
            if own_shape[own] == shape[d]:
                lying.append(own_dims[own])
            else:
                call.atoms.pin(own_dims[own])  # a single channel that serves all: it cannot go
        dims.append(call.atoms.meet(lying, call.why(UNREMOVABLE)))
    return dims


@rule(
    "zeros",
    "ones",
    "full",
    "new_zeros",
    "new_ones",
    "new_full",
    "arange",
    "scalar_tensor",
    "empty",
    "new_empty",
    "rand",
    "randn",
)
def creation(call: Call) -> Result:
    """Constants: their size is written in the code."""
    return Value.untracked(call.shape, created_in=call.module)


def spatial(call: Call, value: Value, count: int) -> Value:
    """The last ``count`` dimensions are resampled, the others pass."""
    for ids in value.dims[len(value.dims) - count :]:
        call.keep(ids, "positions along this dimension are mixed")
    return call.output([*value.dims[: len(value.dims) - count], *[None] * count])


def resample(call: Call) -> Result:
    """Pooling and interpolation over the spatial dimensions (``..._pool2d``, ``upsample_nearest2d``)."""
    digits = [int(c) for c in call.operation if c in "123"]
    result = spatial(call, call.values()[0], digits[-1])
    return (result, *[Value.untracked(s) for s in call.shapes[1:]]) if call.several else result


RULES.update(
    {f"{kind}_pool{n}d": resample for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)}
)
RULES.update({f"max_pool{n}d_with_indices": resample for n in (1, 2, 3)})
INTERPOLATIONS = (
    *("nearest1d", "nearest2d", "nearest3d", "nearest_exact1d", "nearest_exact2d", "nearest_exact3d"),
    *("linear1d", "bilinear2d", "trilinear3d", "bicubic2d", "bilinear2d_aa", "bicubic2d_aa"),
)
RULES.update({f"{mark}upsample_{how}": resample for mark in ("", "_") for how in INTERPOLATIONS})


@rule(
    *("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"),
    *("flip", "roll", "sort", "argsort", "topk"),
)
def along(call: Call) -> Result:
    """Operations that mix or reorder positions of some dimensions and pass the others."""
    value: Value = call.values()[0]
    mixed = axes(call.get("dim", call.get("dims")), len(value.shape))
    for d in mixed:
        call.keep(value.dims[d], "it mixes or reorders the channels")
    dims = tuple(None if d in mixed else ids for d, ids in enumerate(value.dims))
    results = tuple(Value(shape, dims) for shape in call.shapes)
    return results if call.several else results[0]


@rule("einsum")
def einsum(call: Call) -> Result:
    """A sum of products over one letter of two tensors is a matrix product; an equation for one tensor reorders it."""
    left, _, right = call["equation"].replace(" ", "").partition("->")
    tensors: list[Value] = list(call["tensors"])
    labels = left.split(",")
    if "." in left or any(len(set(own)) < len(own) for own in labels) or len(labels) > 2 or not right:
        return unknown(call)
    if len(labels) == 1:
        value = tensors[0]
        for letter in set(left) - set(right):
            call.keep(value.dims[left.index(letter)], "it reduces over the channels")
        return call.output([value.dims[left.index(letter)] for letter in right])
    first, second = labels
    summed = (set(first) & set(second)) - set(right)
    if len(summed) != 1 or (set(first) | set(second)) - summed != set(right):
        return unknown(call)
    rows = [letter for letter in first if letter not in second] or ["."]  # "." is a dimension of size 1
    columns = [letter for letter in second if letter not in first] or ["."]
    batch = [letter for letter in first if letter in second and letter in right]
    outer = [*batch, *rows[:-1], *columns[:-1]]
    one = _arranged(tensors[0], first, [*outer, rows[-1], *summed])
    other = _arranged(tensors[1], second, [*outer, *summed, columns[-1]])
    result = [*outer, rows[-1], columns[-1]]
    sizes = dict(zip(right, call.shape)) | {".": 1}
    inner = replace(
        call,
        operation="matmul",
        arguments={"self": one, "other": other},
        shapes=(tuple(sizes[letter] for letter in result),),
    )
    product = RULES["matmul"](inner)
    if not isinstance(product, Value):
        return unknown(call)
    return call.output([product.dims[result.index(letter)] for letter in right])


def _arranged(value: Value, letters: str, order: list[str]) -> Value:
    """A view of a tensor with its dimensions in this order; those that it does not have are of size 1."""
    places = [letters.index(letter) if letter in letters else None for letter in order]
    shape = tuple(1 if d is None else value.shape[d] for d in places)
    dims = tuple(None if d is None else value.dims[d] for d in places)
    if value.origin is None:
        return Value(shape, dims)
    own = tuple(-1 if d is None else value.origin[1][d] for d in places)
    return Value(shape, dims, (value.origin[0], own))


@rule("outer", "ger")
def outer(call: Call) -> Result:
    """Every channel of one vector beside every channel of the other."""
    return call.output([value.dims[0] for value in call.values()[:2]])


@rule("to", "type_as")
def cast(call: Call) -> Result:
    """Only the first argument passes; the other lends its type."""
    return call.output(call["self"].dims)
