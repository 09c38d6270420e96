"""Reconstruction: what each layer that reads a group of channels made of them before, and what it makes of fewer.

`gather` samples, for every reader, the patches of each channel in the network as it is now and the responses of the network as
it was. On these a method chooses channels and weights, layer by layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.parts.channel_gates import gateable
from efficientdnns.parts.tap import evaluating
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, Group, Member

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "hardtanh": F.relu6, "relu6": F.relu6, "leaky_relu": F.leaky_relu, "elu": F.elu, "silu": F.silu,
    "gelu": F.gelu, "hardswish": F.hardswish, "sigmoid": F.sigmoid, "tanh": torch.tanh, "softplus": F.softplus,
}  # fmt: skip
"""By the name of the operation, with its default options."""
PASSED = frozenset({"dropout", "max_pool2d", "max_pool1d", "flatten", "view", "reshape", "clone", "contiguous"})
"""Operations between a layer and its activation that commute with it or change nothing."""


@dataclass(frozen=True)
class Response:
    """What follows a layer: a frozen batch norm as scale and shift (out,), and an activation."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.scale is not None and self.shift is not None:
            x = x * self.scale + self.shift
        return self.activation(x) if self.activation is not None else x


@dataclass
class Reading:
    """How one layer reads a group of channels, at n sampled places.

    Attributes:
        member: the layer and where it holds the channels.
        inputs: (n, size, k) X: what it sees of each channel, k values (a patch; several features after flattening).
        weight: (size, k, out) W.
        rest: (n, out): what everything else contributes before the response, the bias too.
        bias: (out,) change of the bias; stays zero where the layer has none.
        has_bias: whether it has one.
        before: (n, out): the linear response of the network as it was, at the same places.
        response: what follows the layer.
    """

    member: Member
    inputs: Tensor
    weight: Tensor
    rest: Tensor
    bias: Tensor
    has_bias: bool
    before: Tensor
    response: Response

    def linear(self, kept: Tensor, rows: slice = slice(None)) -> Tensor:
        """(n, out) linear response A to the channels ``kept``."""
        x = self.inputs[rows][:, kept].flatten(1)
        return x @ self.weight[kept].flatten(0, 1) + self.rest[rows] + self.bias

    def target(self, rows: slice = slice(None)) -> Tensor:
        """(n, out) Y*."""
        return self.response(self.before[rows])

    def error(self, linear: Tensor, rows: slice = slice(None)) -> Tensor:
        r"""(...) E = 1/(2n) ||Y* - f(A)||_F^2 of linear responses (..., n, out)."""
        return (self.target(rows) - self.response(linear)).square().sum((-2, -1)) / (2 * linear.shape[-2])

    def without_activation(self) -> Reading:
        """The same with the linear response alone."""
        return replace(self, response=Response())


def readable(model: nn.Module, groups: Sequence[Group]) -> list[Group]:
    """The groups all of whose readers are linear layers and ungrouped, untransposed convolutions over one or two dimensions."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return [
        group
        for group in gateable(model, groups)
        if all(isinstance(model.get_submodule(m.module), kinds) for m in group.members if m.role == "in")
    ]


@torch.no_grad()
def gather(
    session: Session,
    before: nn.Module,
    now: nn.Module,
    graph: ChannelGraph,
    group: Group,
    samples: int,
    points: int = 10,
    rows: int = 50_000,
) -> list[Reading]:
    """Readings of a group: inputs from the network as it is now, responses from the network as it was.

    Args:
        session: gives calibration inputs (no labels), task and seed.
        before: the network before anything was pruned, of the same shapes.
        now: the network with what was decided so far.
        graph: of either.
        group: one of `readable`.
        samples: calibration inputs.
        points: places of a map (or tokens) that are used of each, others in every batch; all if there are no more.
        rows: most places used in all.
    """
    members = [member for member in group.members if member.role == "in"]
    samplers = {m.module: Sampler(m, points, session.seed) for m in members}
    old = {m.module: Sampler(m, points, session.seed) for m in members}
    for model, hooks in ((now, samplers), (before, old)):
        handles = [model.get_submodule(n).register_forward_hook(s.take, with_kwargs=True) for n, s in hooks.items()]
        try:
            with evaluating(model):
                for inputs in session.calibration(samples):
                    session.task.outputs(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    return [reading(now, graph, m, samplers[m.module], old[m.module], rows) for m in members]


def reading(
    model: nn.Module, graph: ChannelGraph, member: Member, now: Sampler, before: Sampler, rows: int = 50_000
) -> Reading:
    """Put together what two samplers saw of one layer."""
    layer: Any = model.get_submodule(member.module)
    x, seen, was = (torch.cat(parts)[:rows].float() for parts in (now.inputs, now.outputs, before.outputs))
    weight = layer.weight.detach().flatten(2) if layer.weight.dim() > 2 else layer.weight.detach()[..., None]
    weight = weight[:, member.index.to(weight.device)].flatten(2).permute(1, 2, 0).float().contiguous()
    rest = seen - x.flatten(1) @ weight.flatten(0, 1)
    return Reading(
        member,
        x,
        weight,
        rest,
        torch.zeros_like(rest[0]),
        layer.bias is not None,
        was,
        response_after(model, graph, member.module),
    )


class Sampler:
    """A forward hook that keeps what one layer reads of a group and what it makes, at a few places of every sample."""

    def __init__(self, member: Member, points: int, seed: int) -> None:
        self.member, self.points = member, points
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def take(self, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        index = self.member.index.to(x.device)
        if isinstance(module, nn.Linear):
            x, made = x.reshape(len(x), -1, x.shape[-1]), output.reshape(len(output), -1, output.shape[-1])
            places = self._places(x.shape[1]).to(x.device)
            self.inputs.append(x[:, places][..., index].flatten(0, 1))
            self.outputs.append(made[:, places].flatten(0, 1))
            return
        places = self._places(output[0, 0].numel()).to(x.device)
        self.outputs.append(output.flatten(2)[:, :, places].transpose(1, 2).flatten(0, 1))
        self.inputs.append(patches(module, x[:, index[:, 0]], output.shape[2:], places).flatten(0, 1))

    def _places(self, count: int) -> Tensor:
        if count <= self.points:
            return torch.arange(count)
        return torch.randperm(count, generator=self.generator)[: self.points].sort().values


def patches(convolution: Any, x: Tensor, out: Sequence[int], places: Tensor) -> Tensor:
    """What a convolution (1d or 2d) sees at the given flat output positions: (n, places, channels, kernel).

    Args:
        convolution: gives kernel size, stride, dilation and padding.
        x: (n, channels, ...) its input, some of its channels.
        out: size of its output map.
        places: flat indices into that map.
    """
    mode = convolution.padding_mode
    padded = F.pad(x, convolution._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else mode)
    stride, dilation, kernel = (list(getattr(convolution, name)) for name in ("stride", "dilation", "kernel_size"))
    if padded.dim() == 3:  # one dimension is two of which the first has length one
        padded, out = padded[:, :, None], (1, *out)
        stride, dilation, kernel = [1, *stride], [1, *dilation], [1, *kernel]
    rows, columns = (
        (at * stride[d])[:, None] + torch.arange(kernel[d], device=x.device) * dilation[d]
        for d, at in enumerate((places // out[1], places % out[1]))
    )
    return padded[:, :, rows[:, :, None], columns[:, None, :]].permute(0, 2, 1, 3, 4).flatten(3)


def response_after(model: nn.Module, graph: ChannelGraph, module: str) -> Response:
    """What follows a layer: its batch norm, frozen, and the activation, as far as each follows alone; else nothing."""
    made = [node for node in graph.nodes if node.module == module and f"{module}.weight" in node.parameters]
    response, node = Response(), made[0] if len(made) == 1 else None
    while node is not None and node.name not in graph.outputs:
        readers = [other for other in graph.nodes if node.name in other.inputs]
        node = readers[0] if len(readers) == 1 else None
        operation = node.operation.rstrip("_") if node is not None else ""
        if node is not None and operation == "batch_norm" and response.scale is None:
            norm: Any = model.get_submodule(node.module)
            scale = torch.rsqrt(norm.running_var + norm.eps) * (1.0 if norm.weight is None else norm.weight.detach())
            shift = (0.0 if norm.bias is None else norm.bias.detach()) - norm.running_mean * scale
            response = Response(scale, shift)
        elif operation in ACTIVATIONS:
            return replace(response, activation=ACTIVATIONS[operation])
        elif operation not in PASSED:
            break
    return response


def total_error(readings: Sequence[Reading], kept: Tensor) -> float:
    """Sum of the errors over the readers."""
    return float(sum(r.error(r.linear(kept)) for r in readings))


def removal_errors(readings: Sequence[Reading], kept: Tensor, rows: int = 1024, entries: int = 2**24) -> Tensor:
    r"""Error without each channel of ``kept`` and with all others, weights as they are: (len(kept),).

    The response is elementwise, so one costs one subtraction: :math:`\Delta_j = E(A - X_j W_j)`.

    Args:
        readings: of all readers.
        kept: indices of the channels that are left.
        rows: places that are looked at.
        entries: numbers held at once.
    """
    total = torch.zeros(len(kept), dtype=torch.float64)
    for r in readings:
        few = slice(0, rows)
        linear = r.linear(kept, few)
        step = max(1, entries // max(1, linear.numel()))
        for start in range(0, len(kept), step):
            part = kept[start : start + step]
            contributions = torch.einsum("nsk,sko->sno", r.inputs[few][:, part], r.weight[part])
            total[start : start + step] += r.error(linear - contributions, few).double().cpu()
    return total


def least_squares(r: Reading, kept: Tensor, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Weights (kept, k, out) and change of the bias (out,) whose linear response is nearest to that before, in float64.

    Args:
        r: the reading.
        kept: indices of the channels that are left.
        ridge: added to the diagonal of the normal equations, times its mean.
    """
    x = r.inputs[:, kept].flatten(1).double()
    wanted = (r.before - r.rest).double()
    if r.has_bias:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-12))
    solution = torch.linalg.solve(gram, x.T @ wanted)
    bias = solution[-1] if r.has_bias else torch.zeros_like(r.bias)
    weight = solution[:-1] if r.has_bias else solution
    return weight.view(len(kept), *r.weight.shape[1:]).to(r.weight), bias.to(r.bias)


def start_from_least_squares(readings: Sequence[Reading], kept: Tensor) -> None:
    """Take the least-squares fit where it has the smaller error than the weights as they are."""
    for r in readings:
        weight, bias = least_squares(r, kept)
        fitted = replace(r, weight=r.weight.clone(), bias=bias)
        fitted.weight[kept] = weight
        if r.error(fitted.linear(kept)) <= r.error(r.linear(kept)):
            r.weight, r.bias = fitted.weight, fitted.bias


def descend(r: Reading, kept: Tensor, steps: int, tolerance: float = 0.0, rate: float | None = None) -> list[float]:
    """Full-batch gradient descent on the error of one reader, with backtracking: a step that raises it is not taken.

    Args:
        r: the reading; its weight and bias are changed.
        kept: indices of the channels that are left.
        steps: most steps.
        tolerance: stop when the error falls by less than this share of itself.
        rate: first step size; by default the inverse of a bound on the curvature of the linear error.

    Returns:
        The error before the first step and after every one; it never rises.
    """
    x = r.inputs[:, kept].flatten(1)
    rate = rate or 1.0 / max(1e-12, _curvature(r, x))
    weight, bias = r.weight[kept].flatten(0, 1).requires_grad_(), r.bias.clone().requires_grad_(r.has_bias)
    errors, target = [], r.target()

    def error() -> Tensor:
        return (target - r.response(x @ weight + r.rest + bias)).square().sum() / (2 * len(x))

    with torch.enable_grad():
        value = error()
        errors.append(float(value.detach()))
        for _ in range(steps):
            variables = [weight, bias] if r.has_bias else [weight]
            gradients = torch.autograd.grad(value, variables)
            for _ in range(20):
                with torch.no_grad():
                    for variable, gradient in zip(variables, gradients, strict=True):
                        variable -= rate * gradient
                tried = error()
                if float(tried.detach()) <= errors[-1]:
                    value, rate = tried, rate * 1.3
                    break
                with torch.no_grad():
                    for variable, gradient in zip(variables, gradients, strict=True):
                        variable += rate * gradient
                rate /= 2
            else:
                break
            errors.append(float(value.detach()))
            if errors[-2] - errors[-1] < tolerance * errors[-2]:
                break
    r.weight = r.weight.clone()
    r.weight[kept] = weight.detach().view(len(kept), *r.weight.shape[1:])
    r.bias = bias.detach()
    return errors


def _curvature(r: Reading, x: Tensor) -> float:
    """Largest eigenvalue of X^T X / n by power iteration, times the largest squared slope of the batch norm."""
    v = torch.ones(x.shape[1], device=x.device, dtype=x.dtype)
    for _ in range(8):
        v = x.T @ (x @ v) / len(x)
        v = v / v.norm().clamp_min(1e-30)
    largest = float((x @ v).square().sum() / len(x))
    scale = r.response.scale
    return (largest + r.has_bias) * (1.0 if scale is None else float(scale.square().max()))


@torch.no_grad()
def write_back(model: nn.Module, readings: Sequence[Reading]) -> None:
    """Put the weights and biases of the readings into the network."""
    for r in readings:
        layer: Any = model.get_submodule(r.member.module)
        size, positions = r.member.index.shape
        values = r.weight.permute(2, 0, 1).reshape(-1, size, positions, *layer.weight.shape[2:])
        layer.weight[:, r.member.index.to(layer.weight.device)] = values.to(layer.weight.dtype)
        if r.has_bias:
            layer.bias.add_(r.bias.to(layer.bias.dtype))


def frozen_copy(model: nn.Module) -> nn.Module:
    """The network as it is now, to compare with."""
    return copy.deepcopy(model).eval().requires_grad_(False)
