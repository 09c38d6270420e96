"""A network as the linear map of its absolute weights: the gradient of that map carries importance backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


class _Absolute(torch.autograd.Function):
    """``layer(x, |weight|)``. The absolute weights are made for the forward pass and again for the backward pass, in the
    precision of ``x``, and never kept: of a large network those of one layer exist at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return layer(x, weight.abs().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.layer(x, weight.detach().abs().to(x.dtype))
        return torch.autograd.grad(y, x, gradients)[0], None, None


class AbsoluteLinear(TorchFunctionMode):
    """Runs a network as the linear map of absolute weights, whose gradient carries importance backwards.

    What flows is float64, whatever the network's own precision; `sources` are where embeddings let it begin.

    Convolutions and linear layers use |W| without bias, batch norm is the diagonal |gamma| / sqrt(var + eps), pooling
    spreads evenly, activations, dropout and normalisation of activations are the identity, and a product of two
    activations passes each on scaled by the other's absolute value.
    """

    IDENTITY = frozenset(
        {"relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "gelu", "silu", "mish", "hardswish", "hardtanh"}
        | {"hardsigmoid", "sigmoid", "tanh", "prelu", "softplus", "layer_norm", "group_norm", "local_response_norm"}
        | {"dropout", "dropout_", "dropout1d", "dropout2d", "feature_dropout", "alpha_dropout"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.IDENTITY and args and isinstance(args[0], Tensor):
            return args[0] * 1.0
        if name in ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear"):
            rest = {k: v for k, v in kwargs.items() if k != "bias"}
            return _Absolute.apply(args[0], args[1], lambda x, weight: func(x, weight, None, *args[3:], **rest))
        if name == "embedding":
            source = args[1].new_zeros(*args[0].shape, args[1].shape[1], dtype=torch.float64, requires_grad=True)
            self.sources.append(source)
            return source
        if name == "batch_norm":
            return self._batch_norm(*args, **kwargs)
        if name.startswith("max_pool") or name.startswith("adaptive_max_pool"):
            average = getattr(F, name.replace("max", "avg").replace("_with_indices", ""))
            return average(
                *args[: 2 if "adaptive" in name else 4], **{k: v for k, v in kwargs.items() if k in _POOLING}
            )
        if name in ("mul", "mul_", "__mul__", "__rmul__", "__imul__") and all(isinstance(a, Tensor) for a in args[:2]):
            a, b = args[0], args[1]
            return (
                (a * b.detach().abs() + a.detach().abs() * b) / 2
                if a.requires_grad and b.requires_grad
                else func(a, b.abs())
            )
        if not name.endswith("_") or name.startswith("__"):  # what is written in place keeps its type
            args, kwargs = _widened((args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _batch_norm(
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Tensor:
        eps = kwargs.get("eps", rest[2] if len(rest) > 2 else 1e-5)
        var = var.to(x.dtype)
        scale = (torch.ones_like(var) if weight is None else weight.detach().abs()) / (var + eps).sqrt()
        return x * scale.view(1, -1, *[1] * (x.dim() - 2))


def _widened(arguments: Any) -> Any:
    """Tensors that meet float64 ones become float64."""
    floats = {leaf.dtype for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.is_floating_point()}
    if torch.float64 not in floats or len(floats) == 1:
        return arguments
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, arguments)


_POOLING = ("kernel_size", "stride", "padding", "ceil_mode", "output_size")
