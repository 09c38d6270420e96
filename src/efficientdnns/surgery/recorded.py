"""Modules whose code has channel numbers written into it run their recorded graph instead.

Code such as ``x.view(n, 12, 64)`` or ``qkv.reshape(b, n, 3, self.num_heads, c // self.num_heads)`` breaks when heads or
channels are gone. The module then keeps its class, parameters, attributes and children, but its ``forward`` carries out
the operations that were recorded when it was traced, with the new sizes; children are called as modules, so hooks on
them and replacements of them still work. The recording is plain data and is saved with the structure.

What the code decided while it was traced is fixed: image size, branches, dropout written as a function (off). The batch
size stays free wherever the network left it free.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from efficientdnns.errors import FileFormatError

Program = dict[str, Any]
"""``{"inputs": [leaf], "steps": [[result, kind, target, args, kwargs]], "output": template}``."""

NAMESPACES = ("aten", "torchvision")
NUMBER_OPERATIONS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem", "pow")
    },
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")},
    **{name: getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    "sym_max": max,
    "sym_min": min,
    "sym_float": float,
    "sym_int": int,
    "sym_sqrt": math.sqrt,
}


class RecordedForward:
    """Mixed into the class of a module whose recorded graph runs; see the module's documentation."""

    program: Program
    steps: list[tuple[str, Any, Any, Any]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        known: dict[str, Any] = {f"input{n}": leaves[at] for n, at in enumerate(self.program["inputs"])}
        device = next((x.device for x in known.values() if isinstance(x, Tensor)), None)
        for result, function, arguments, keywords in self.steps:
            call = self.get_submodule(function) if isinstance(function, str) else function  # type: ignore[attr-defined]
            known[result] = call(
                *[self._value(a, known, device) for a in arguments],
                **{name: self._value(a, known, device) for name, a in keywords.items()},
            )
        return self._value(self.program["output"], known, device)

    def _value(self, item: Any, known: dict[str, Any], device: torch.device | None) -> Any:
        if isinstance(item, list):
            return [self._value(x, known, device) for x in item]
        if not isinstance(item, dict):
            return item
        if "ref" in item:
            value = known[item["ref"]]
            return value * item["times"] // item["over"] if "times" in item else value
        if "tensor" in item:
            owner, _, name = item["tensor"].rpartition(".")
            return getattr(self.get_submodule(owner), name)  # type: ignore[attr-defined]
        if "tuple" in item:
            return tuple(self._value(x, known, device) for x in item["tuple"])
        if "dict" in item:
            return {name: self._value(x, known, device) for name, x in item["dict"].items()}
        if "dtype" in item:
            return getattr(torch, item["dtype"])
        if "torch" in item:  # a layout or memory format
            return getattr(torch, item["torch"])
        if "constant" in item:
            return torch.tensor(item["constant"], dtype=getattr(torch, item["of"]), device=device)
        return device


def play(module: nn.Module, program: Program) -> None:
    """Make a module run ``program``, in place; its class becomes a subclass of what it was.

    Raises:
        FileFormatError: Something in the program is not an operation that may be carried out.
    """
    steps = []
    for result, kind, target, arguments, keywords in program["steps"]:
        steps.append((result, function_of(kind, target), arguments, keywords))
    kind = kind_of(module)
    module.__class__ = type(kind.__name__, (RecordedForward, kind), {"program": program, "steps": steps})


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, also where its recorded graph runs."""
    return type(module).__bases__[1] if isinstance(module, RecordedForward) else type(module)


def function_of(kind: str, target: str) -> Any:
    """What a recorded step calls: a module, by its path, or a function of numbers or tensors."""
    if kind == "module" and re.fullmatch(r"[\w.]+", target):
        return target
    if kind == "number" and target in NUMBER_OPERATIONS:
        return NUMBER_OPERATIONS[target]
    match = re.fullmatch(r"(\w+)::(\w+)\.(\w+)", target) if kind == "operator" else None
    if match and match[1] in NAMESPACES:
        if match[1] == "torchvision":
            import torchvision  # noqa: F401  (it registers its operators)
        packet = getattr(getattr(torch.ops, match[1]), match[2], None)
        if packet is not None and hasattr(packet, match[3]):
            return getattr(packet, match[3])
    raise FileFormatError(f"a recorded step names {target!r}, which is no operation: the structure file is damaged")
