"""Reading and writing part of a wide stream, and swapping modules by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficientdnns.errors import SurgeryError, suggest
from efficientdnns.surgery.graph import ChannelGraph
from efficientdnns.surgery.remove import clone
from efficientdnns.surgery.structure import rebuildable
from efficientdnns.surgery.trace import Inputs
from efficientdnns.surgery.verify import differing, rounding

Indices = Sequence[int] | Tensor


@rebuildable
class SelectChannels(nn.Module):
    """Passes the channels ``index`` of its input, in that order.

    Args:
        index: Positions along ``dim``.
        dim: Channel dimension (-1 for features that come last).

    Shape:
        (..., C, ...) -> (..., len(index), ...).
    """

    index: Tensor

    def __init__(self, index: Indices, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", _positions(index), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.index)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"index": self.index.tolist(), "dim": self.dim}

    def extra_repr(self) -> str:
        return f"{len(self.index)} channels, dim={self.dim}"


@rebuildable
class ScatterChannels(nn.Module):
    """Writes a narrow tensor into a wide one; absent channels are constants.

    Args:
        index: Position of every narrow channel in the wide tensor.
        size: Number of wide channels.
        fill: (size - len(index),) values of the absent channels in ascending order of position; zeros where None.
        dim: Channel dimension.

    Shape:
        (..., len(index), ...) -> (..., size, ...).
    """

    fill: Tensor
    source: Tensor

    def __init__(self, index: Indices, size: int, fill: Sequence[float] | Tensor | None = None, dim: int = 1) -> None:
        super().__init__()
        present = _positions(index)
        if len(present.unique()) != len(present) or (
            len(present) and not 0 <= int(present.min()) <= int(present.max()) < size
        ):
            raise SurgeryError(f"positions must be distinct and lie in 0..{size - 1}, got {present.tolist()}")
        absent = sorted(set(range(size)) - set(present.tolist()))
        values = torch.zeros(len(absent)) if fill is None else torch.as_tensor(fill).detach().clone()
        if values.shape != (len(absent),):
            raise SurgeryError(
                f"fill must hold one constant for each of {len(absent)} absent channels, got {tuple(values.shape)}"
            )
        self.dim = dim
        self.register_buffer("fill", values)
        self.register_buffer(
            "source", torch.cat([present, torch.tensor(absent, dtype=torch.long)]).argsort(), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        dim = self.dim % x.dim()
        constants = self.fill.to(x.dtype).reshape([-1 if d == dim else 1 for d in range(x.dim())])
        constants = constants.expand([-1 if d == dim else n for d, n in enumerate(x.shape)])
        return torch.cat([x, constants], dim).index_select(dim, self.source)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments but for the constants, which are in the state dict."""
        order = self.source.argsort()
        return {"index": order[: len(order) - len(self.fill)].tolist(), "size": len(self.source), "dim": self.dim}

    def extra_repr(self) -> str:
        return f"{len(self.source) - len(self.fill)} into {len(self.source)} channels, dim={self.dim}"


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module at a dotted path ("" is the network itself); raises SurgeryError naming similar paths."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise SurgeryError(f"the network has no module {name!r}{suggest(name, [n for n in modules if n])}")
    return modules[name]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` at a dotted path, in place."""
    get_module(model, name)
    if not name:
        raise SurgeryError("the network itself cannot be replaced inside itself: name one of its modules")
    parent, _, child = name.rpartition(".")
    get_module(model, parent)._modules[child] = new


def narrow_output(
    model: nn.Module,
    example_inputs: Inputs,
    name: str,
    keep: Indices,
    fill: Sequence[float] | Tensor | None = None,
    graph: ChannelGraph | None = None,
) -> nn.Module:
    """Make a layer compute only some of its output channels, while what follows still sees all of them.

    Used where a residual stream must keep its width. The layer and the batch norm that alone reads it become narrow; a
    :class:`ScatterChannels` behind them puts the channels back in their places, with constants for the absent ones.

    Args:
        model: Left untouched.
        example_inputs: One input tensor or a tuple of positional arguments.
        name: Path of an ungrouped convolution or linear layer.
        keep: Output channels that are still computed.
        fill: (out - len(keep),) constants of the others, in ascending order, as they leave the batch norm (the layer
            where there is none). None: what an all-zero filter gives, that is the layer's bias through the batch norm.
        graph: The channel graph of ``model`` if at hand.

    Returns:
        A new network; the last narrowed module is now ``nn.Sequential(module, ScatterChannels)``.

    Raises:
        SurgeryError: Where the new network does not run, changes its output shapes or, for ``fill=None``, does not
            compute what the network with zero filters computes.
    """
    default = fill is None
    graph = graph or ChannelGraph.trace(model, example_inputs, verify=False)
    copied, reference = clone(model), clone(model)
    layer = _layer(copied, name)
    convolution = isinstance(layer, nn.modules.conv._ConvNd)
    row = 1 if convolution and layer.transposed else 0
    size = layer.weight.shape[row]
    kept = _checked(keep, size, name)
    absent = torch.tensor(sorted(set(range(size)) - set(kept.tolist())), dtype=torch.long)
    norm = _norm_after(copied, graph, name, size)
    if fill is None:
        fill = _zero_filter_output(layer, norm)[absent.to(layer.weight.device)]
    _layer(reference, name).weight.data.index_fill_(row, absent.to(layer.weight.device), 0.0)
    _keep(layer, "weight", kept, row)
    _keep(layer, "bias", kept)
    _resize(layer, outputs=len(kept))
    last: Any = layer
    if norm is not None:
        last = norm
        for attribute in ("weight", "bias", "running_mean", "running_var"):
            _keep(norm, attribute, kept)
        norm.num_features = len(kept)
    scatter = ScatterChannels(kept, size, fill, 1 if convolution or norm is not None else -1)
    scatter = scatter.to(layer.weight.device, layer.weight.dtype)
    last_name = (graph.batch_norm_after(name) or name) if norm is not None else name
    replace_module(copied, last_name, nn.Sequential(last, scatter).train(last.training))
    _check(reference, copied, example_inputs, name, exact=default)
    return copied


def _norm_after(model: nn.Module, graph: ChannelGraph, name: str, size: int) -> Any:
    """The batch norm that alone reads the layer, or None."""
    found = graph.batch_norm_after(name)
    norm = get_module(model, found) if found is not None else None
    return norm if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.num_features == size else None


def _zero_filter_output(layer: Any, norm: Any) -> Tensor:
    """(out,) values of channels whose filter is zero, behind the batch norm in eval mode."""
    rows = layer.weight.shape[1 if getattr(layer, "transposed", False) else 0]
    value = layer.weight.new_zeros(rows) if layer.bias is None else layer.bias.detach()
    if norm is None:
        return value
    if norm.running_mean is None:
        raise SurgeryError("the batch norm keeps no running statistics, so absent channels have no constant: give fill")
    value = (value - norm.running_mean) * torch.rsqrt(norm.running_var + norm.eps)
    return value if norm.weight is None else (value * norm.weight + norm.bias).detach()


def _check(reference: nn.Module, new: nn.Module, example_inputs: Inputs, name: str, exact: bool) -> None:
    reason = differing(reference, new, example_inputs, exact, rounding(new))
    if reason is not None:
        raise SurgeryError(f"narrowing {name!r} breaks the network: {reason}; leave this layer as it is")


def narrow_input(model: nn.Module, name: str, keep: Indices) -> nn.Module:
    """Make a layer read only some of its input channels.

    Args:
        model: Left untouched.
        name: Path of a linear layer or ungrouped convolution.
        keep: Input channels (features) that it still reads.

    Returns:
        A new network, in which the layer is ``nn.Sequential(SelectChannels, layer)``.
    """
    copied = clone(model)
    layer = _layer(copied, name)
    convolution = isinstance(layer, nn.modules.conv._ConvNd)
    dim = 0 if convolution and layer.transposed else 1
    kept = _checked(keep, layer.weight.shape[dim], name)
    _keep(layer, "weight", kept, dim)
    _resize(layer, inputs=len(kept))
    select = SelectChannels(kept, 1 if convolution else -1).to(layer.weight.device)
    replace_module(copied, name, nn.Sequential(select, layer).train(layer.training))
    return copied


def _layer(model: nn.Module, name: str) -> Any:
    layer = get_module(model, name)
    if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) or getattr(layer, "groups", 1) != 1:
        raise SurgeryError(f"{name!r} is a {type(layer).__name__}: name a linear layer or a convolution with groups=1")
    return layer


def _keep(module: nn.Module, attribute: str, kept: Tensor, dim: int = 0) -> None:
    tensor = getattr(module, attribute, None)
    if isinstance(tensor, Tensor):
        gradient, tensor.grad = tensor.grad, None
        tensor.data = tensor.data.index_select(dim, kept.to(tensor.device))
        tensor.grad = None if gradient is None else gradient.index_select(dim, kept.to(tensor.device))


def _resize(layer: Any, inputs: int | None = None, outputs: int | None = None) -> None:
    kind = "features" if isinstance(layer, nn.Linear) else "channels"
    for side, size in (("in", inputs), ("out", outputs)):
        if size is not None:
            setattr(layer, f"{side}_{kind}", size)


def _positions(index: Indices) -> Tensor:
    return torch.as_tensor(index, dtype=torch.long).detach().clone().reshape(-1)


def _checked(keep: Indices, size: int, name: str) -> Tensor:
    kept = _positions(keep).cpu()
    if len(kept) == 0 or int(kept.min()) < 0 or int(kept.max()) >= size or len(kept.unique()) != len(kept):
        raise SurgeryError(
            f"channels to keep of {name!r} must be distinct, at least one, in 0..{size - 1}; got {kept.tolist()}"
        )
    return kept
