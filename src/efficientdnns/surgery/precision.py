"""Running a network in another precision than its own, without a second copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Everything is computed in ``dtype``, whatever floating-point types the tensors have and the code names.

    A network's tensors are converted when they are used, one layer's at a time; they keep their own type. What is written
    into such a tensor is lost: this is for networks in evaluation mode.
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _In(dtype):
            yield
    finally:
        torch.set_default_dtype(usual)


class _In(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "__get__":  # shape, device and the like need no values
            result = function(*args)
            return self._like(result) if isinstance(result, torch.dtype) else result
        if function in _CASTS:
            function, args = Tensor.to, (*args, self.dtype)
        args, kwargs = tree_map(self._like, (args, kwargs or {}))
        return function(*args, **kwargs)

    def _like(self, x: Any) -> Any:
        if isinstance(x, torch.dtype) and x.is_floating_point:
            return self.dtype
        return x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


_CASTS = (Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16)
