"""Watching every operation that a network executes, below autograd and below composite operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from efficientdnns.measurement.inference import evaluating


class Watch(TorchDispatchMode):
    """A dispatch mode that calls :meth:`seen` after each operation; a subclass says what to note.

    Tensor subclasses unwrap themselves first and a condition runs its branch inside the mode, so that their inner
    operations are seen too. Composite operations are taken apart, except those that :meth:`whole` wants in one piece.
    """

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let operations that insist on running through the compiler (flex attention) run under this mode."""
        return True

    def whole(self, operation: Any) -> bool:
        """Return whether a composite operation (an overload packet) is to be seen itself rather than its parts."""
        return False

    def seen(self, operation: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note one executed operation (an overload packet or higher-order operator) and what it returned."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types:
            return NotImplemented
        kwargs = kwargs or {}
        if func is torch.ops.higher_order.cond:
            condition, then, otherwise, operands = args
            with self:
                return (then if condition else otherwise)(*operands)
        operation = getattr(func, "_overloadpacket", func)
        if hasattr(func, "decompose") and not self.whole(operation):
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        self.seen(operation, output, args, kwargs)
        return output


@contextmanager
def watching(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Watch what is called inside: ``model`` in evaluation mode without gradients, and compiled parts run eagerly."""
    with evaluating(model), torch.compiler.set_stance("force_eager"), watch:
        yield
