"""Layers that multiply with their non-zero weights only, through compressed rows, on the CPU.

They hold the same parameters as the dense layers that they stand for, and are those while they are trained, compiled or
exported. Whether compressed rows are faster depends on the layer, the batch and the machine: `faster_sparse` measures it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.measurement.inference import Forward, call, evaluating, with_batch
from efficientdnns.measurement.latency import measure_latency
from efficientdnns.parts.winograd import WinogradConv2d, winograd_conv2d, winograd_transform
from efficientdnns.surgery import rebuildable, replace_module


class _Compressed(nn.Module):
    """The compressed rows of the weights, made on first use and again whenever they change."""

    _rows: dict[str, tuple[Any, Any]] | None = None

    def rows(self, name: str = "weight") -> Any:
        """What `compress` makes of the tensor of this name; None where the dense layer has to run."""
        weight = getattr(self, name)
        dense = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_inference(weight)
        if dense or weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return None
        made = self._rows = {} if self._rows is None else self._rows
        key = weight.data_ptr(), weight._version
        if name not in made or made[name][0] != key:
            with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch calls the layout a beta
                made[name] = key, self.compress(weight.detach())
        return made[name][1]

    def compress(self, weight: Tensor) -> Any:
        """(M, everything a filter reads) in compressed rows."""
        return weight.flatten(1).to_sparse_csr()

    def forget(self) -> None:
        """Drop the compressed rows; they are made again when needed."""
        self._rows = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_rows"}  # PyTorch cannot copy them

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


@rebuildable
class SparseWinogradConv2d(_Compressed, WinogradConv2d):
    """An ungrouped convolution that skips the zeros of the Winograd domain: compressed rows for each entry of a tile."""

    def compress(self, weight: Tensor) -> list[Tensor]:
        u = self.prune(winograd_transform(weight, self.m))
        return [matrix.to_sparse_csr() for matrix in u.flatten(2).permute(2, 0, 1).contiguous()]

    def forget(self) -> None:
        """Drop what was made of the weights; it is made again when needed."""
        _Compressed.forget(self)
        WinogradConv2d.forget(self)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows()
        if rows is None:
            return super().forward(x)
        return winograd_conv2d(x, self.weight, self.bias, self.m, (self.padding[0], self.padding[1]), transformed=rows)


@rebuildable
class SparseLSTM(_Compressed, nn.LSTM):
    """An LSTM that skips zeros, called like ``nn.LSTM``: one product for the inputs of all steps, and one a step for the
    state. Packed sequences and projections (``proj_size``) take the dense layer.
    """

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        sizes = ("input_size", "hidden_size", "num_layers", "proj_size", "dropout")
        return {name: getattr(self, name) for name in (*sizes, "bias", "batch_first", "bidirectional")}

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        ends = [f"l{n}{way}" for n in range(self.num_layers) for way in ("", "_reverse")[: 1 + self.bidirectional]]
        matrices: dict[str, Tensor] = {}
        if self._takes(input, hx):
            found = {f"{kind}_{end}": self.rows(f"weight_{kind}_{end}") for end in ends for kind in ("ih", "hh")}
            matrices = {name: rows for name, rows in found.items() if rows is not None}
        if len(matrices) < 2 * len(ends):
            return super().forward(input, hx)
        x = input[:, None] if input.dim() == 2 else input.transpose(0, 1) if self.batch_first else input
        size = len(ends), x.shape[1], self.hidden_size
        starts = zip(*(state.reshape(size) for state in hx or (x.new_zeros(size), x.new_zeros(size))), strict=True)
        states, outputs = [], []
        for end, (h, c) in zip(ends, starts, strict=True):
            names = [f"bias_ih_{end}", f"bias_hh_{end}"] if self.bias else []
            bias = sum((getattr(self, name) for name in names), x.new_zeros(4 * self.hidden_size))
            given, recurrent = matrices[f"ih_{end}"], matrices[f"hh_{end}"]
            y, *state = _recurrent(x, given, recurrent, bias, h, c, end.endswith("reverse"))
            states.append(state)
            outputs.append(y)
            if len(outputs) == 1 + self.bidirectional:
                x, outputs = torch.cat(outputs, 2), []
        h, c = (torch.stack(kind) for kind in zip(*states, strict=True))
        if input.dim() == 2:
            return x[:, 0], (h[:, 0], c[:, 0])
        return x.transpose(0, 1) if self.batch_first else x, (h, c)

    def _takes(self, x: Any, states: tuple[Tensor, Tensor] | None) -> bool:
        """Whether this is a case for compressed rows; the dense layer says what is wrong with other inputs."""
        if self.training or self.proj_size or not isinstance(x, Tensor) or x.dim() not in (2, 3) or not x.numel():
            return False
        batch = () if x.dim() == 2 else (x.shape[0 if self.batch_first else 1],)
        size = self.num_layers * (1 + self.bidirectional), *batch, self.hidden_size
        fit = all(s.shape == size and s.dtype == torch.float32 for s in states or ())
        return fit and x.shape[-1] == self.input_size and x.dtype == torch.float32


def _recurrent(
    x: Tensor, inputs: Tensor, recurrent: Tensor, bias: Tensor, h: Tensor, c: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction: x (T, B, n), rows of (4 H, n) and (4 H, H), bias (4 H), h and c (B, H) -> outputs
    (T, B, H) and the last h and c. The gates are i, f, g, o, as in ``nn.LSTM``.
    """
    (steps, batch, features), width = x.shape, h.shape[1]
    given = torch.addmm(bias[:, None], inputs, x.reshape(-1, features).T).view(4 * width, steps, batch)
    times: Callable[..., Tensor] = torch.addmm
    h, c = h.T, c.T
    if batch == 1:  # vectors are faster than matrices of one column
        times, given, h, c = torch.addmv, given[..., 0], h[:, 0], c[:, 0]
    outputs = []
    for at in reversed(range(steps)) if reverse else range(steps):
        i, f, g, o = times(given[:, at], recurrent, h).chunk(4)
        c = (f.sigmoid_() * c).addcmul_(i.sigmoid_(), g.tanh_())
        h = c.tanh().mul_(o.sigmoid_())
        outputs.append(h)
    y = torch.stack(outputs[::-1] if reverse else outputs).view(steps, width, batch).transpose(1, 2).contiguous()
    return y, h.view(width, batch).T, c.view(width, batch).T


def compressed(layer: nn.Module) -> nn.Module | None:
    """The layer with the same tensors that skips zeros; None where there is none."""
    if type(layer) is nn.Linear:
        new: nn.Module = SparseLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    elif type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
        if isinstance(layer.padding, str):
            return None
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        new = SparseConv2d(*sizes, bias=layer.bias is not None, device="meta")  # type: ignore[arg-type]
    elif type(layer) is WinogradConv2d and layer.groups == 1:
        new = SparseWinogradConv2d(**layer.config()).to("meta")
    elif type(layer) is nn.LSTM and not layer.proj_size:
        new = SparseLSTM(**SparseLSTM.config(layer), device="meta")  # type: ignore[arg-type]
    else:
        return None
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(new, name, parameter)
    return new.train(layer.training)


@torch.no_grad()
def _zeros(layer: nn.Module) -> float:
    """The share of zeros in what a layer multiplies with."""
    weights: list[Tensor] = [parameter for parameter in layer.parameters(recurse=False) if parameter.dim() > 1]
    if isinstance(layer, WinogradConv2d):
        weights = [layer.transformed()]
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def inputs_of(
    model: nn.Module, names: Sequence[str], example: Any, forward: Forward | None = None
) -> dict[str, Tensor]:
    """What the named layers are given in one call of the network; those that are not called with a tensor are left out."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
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
        if (new := compressed(module)) is not None and (share := _zeros(module)) >= sparsity:
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
