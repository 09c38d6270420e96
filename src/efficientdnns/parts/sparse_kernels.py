"""Layers that multiply with their non-zero weights only, through compressed rows, on the CPU.

They hold the same parameters as the dense layers that they stand for, and are those while they are trained, compiled or
exported. Whether compressed rows are faster depends on the layer, the batch and the machine: `faster_sparse` measures it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.measurement.inference import Forward, call, evaluating, with_batch
from efficientdnns.measurement.latency import measure_latency
from efficientdnns.surgery import rebuildable, replace_module


class _Compressed(nn.Module):
    """The compressed rows of ``weight``, made on first use and again whenever it changes."""

    weight: Tensor
    _rows: tuple[Any, Tensor] | None = None

    def rows(self) -> Tensor | None:
        """(M, everything a filter reads) in compressed rows; None where the dense layer has to run."""
        weight = self.weight
        dense = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_inference(weight)
        if dense or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return None
        key = weight.data_ptr(), weight._version
        if self._rows is None or self._rows[0] != key:
            with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch calls the layout a beta
                self._rows = key, weight.detach().flatten(1).to_sparse_csr()
        return self._rows[1]

    def forget(self) -> None:
        """Drop the compressed rows; they are made again when needed."""
        self._rows = None

    def train(self, mode: bool = True) -> Self:
        self.forget()
        return super().train(mode)


@rebuildable
class SparseLinear(_Compressed, nn.Linear):
    """A linear layer that skips zeros, (..., in_features) -> (..., out_features)."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows()
        if rows is None:
            return super().forward(x)
        y = (rows @ x.reshape(-1, self.in_features).T).T
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)


@rebuildable
class SparseConv2d(_Compressed, nn.Conv2d):
    """An ungrouped, zero-padded convolution that skips zeros: patches side by side, times compressed rows."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        values = {name: getattr(self, name) for name in names} | {"bias": self.bias is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows()
        if rows is None:
            return super().forward(x)
        (tall, wide), (down, across), (apart, beside) = self.kernel_size, self.stride, self.dilation
        padding = self.padding if isinstance(self.padding, tuple) else (0, 0)
        height = (x.shape[2] + 2 * padding[0] - apart * (tall - 1) - 1) // down + 1
        width = (x.shape[3] + 2 * padding[1] - beside * (wide - 1) - 1) // across + 1
        plain = self.kernel_size == self.stride == (1, 1) and padding == (0, 0)
        patches = x.flatten(2) if plain else F.unfold(x, self.kernel_size, self.dilation, padding, self.stride)
        batch = x.shape[0]
        columns = patches[0] if batch == 1 else patches.transpose(0, 1).reshape(patches.shape[1], -1)
        y = rows @ columns
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.view(self.out_channels, batch, height, width).transpose(0, 1)


def compressed(layer: nn.Module) -> nn.Module | None:
    """The layer with the same tensors that skips zeros; None where there is none."""
    if type(layer) is nn.Linear:
        new: nn.Module = SparseLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    elif type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
        if isinstance(layer.padding, str):
            return None
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        new = SparseConv2d(*sizes, bias=layer.bias is not None, device="meta")  # type: ignore[arg-type]
    else:
        return None
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(new, name, parameter)
    return new.train(layer.training)


def inputs_of(
    model: nn.Module, names: Sequence[str], example: Any, forward: Forward | None = None
) -> dict[str, Tensor]:
    """What the named layers are given in one call of the network; those that are not called are left out."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, args[0].detach().clone())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        with evaluating(model):
            (forward or call)(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def faster_sparse(
    model: nn.Module,
    example: Any,
    *,
    batch: int = 1,
    sparsity: float = 0.9,
    gain: float = 1.1,
    forward: Forward | None = None,
    repeats: int = 30,
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """A copy whose sparse layers skip zeros where that was measured to be faster.

    Args:
        example: inputs of the network.
        batch: samples at a time; the answer depends on it.
        sparsity: share of zeros from which on a layer is tried.
        gain: least ratio of the dense to the sparse time with which it is replaced.
        repeats: samples of either, taken in turn.

    Returns:
        The network, and for each layer tried {"sparsity", "dense_ms", "sparse_ms", "used"}.
    """
    result = copy.deepcopy(model)
    tried = {}
    for name, module in result.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1 and (new := compressed(module)) is not None:
            share = 1 - int(weight.count_nonzero()) / weight.numel()
            if share >= sparsity:
                tried[name] = module, new, share
    seen = inputs_of(result, list(tried), with_batch(example, batch), forward)
    found: dict[str, dict[str, Any]] = {}
    for name, (dense, new, share) in tried.items():
        if name not in seen:
            continue
        times = measure_latency([dense, new], seen[name], repeats=repeats, seconds=1.0)
        used = times[0].p10 > gain * times[1].p10
        found[name] = {"sparsity": share, "dense_ms": times[0].p10, "sparse_ms": times[1].p10, "used": used}
        if used:
            replace_module(result, name, new)
    return result, found
