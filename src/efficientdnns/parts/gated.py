"""Layers whose inputs or output maps are multiplied by gates: attaching them, and folding them into the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efficientdnns.parts.gate import HardConcrete


@dataclass
class Gated:
    """A layer whose groups of weights have gates.

    Attributes:
        name: path of the linear layer (gates on its inputs) or convolution (gates on its output maps).
        layer: the layer itself.
        host: the module that carries the gates: the layer, or the batch norm behind a convolution.
        strength: what an open parameter costs, times the number of training samples.
    """

    name: str
    layer: nn.Linear | nn.modules.conv._ConvNd
    host: nn.Module
    strength: float

    @property
    def gate(self) -> HardConcrete:
        """The gates."""
        gate = self.host.gate
        assert isinstance(gate, HardConcrete)
        return gate

    @property
    def on_inputs(self) -> bool:
        """Whether the gates are on inputs."""
        return isinstance(self.layer, nn.Linear)

    def group_size(self) -> int:
        """Parameters |g| that one gate switches; a filter has its bias with it."""
        if self.on_inputs:
            return self.layer.weight.shape[0]
        return self.layer.weight[0].numel() + (self.layer.bias is not None)

    def squares(self) -> Tensor:
        """Sum of squared parameters of every group."""
        if self.on_inputs:
            return self.layer.weight.square().sum(0)
        squares = self.layer.weight.square().flatten(1).sum(1)
        return squares if self.layer.bias is None else squares + self.layer.bias.square()


def gate_inputs(module: nn.Module, inputs: tuple[Tensor, ...], per_sample: bool) -> tuple[Tensor, ...]:
    """Forward pre-hook: multiply the features (last dimension) by ``module.gate``."""
    x = inputs[0]
    z = module.gate(len(x) if per_sample else None)  # type: ignore[operator]
    return (x * (z if z.dim() == 1 else z.view(len(x), *[1] * (x.dim() - 2), -1)).to(x.dtype), *inputs[1:])


def gate_outputs(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, per_sample: bool) -> Tensor:
    """Forward hook: multiply the channels (dimension 1) by ``module.gate``, as if filters and biases were scaled."""
    z = module.gate(len(output) if per_sample else None)  # type: ignore[operator]
    return output * z.view(*z.shape[:-1], -1, *[1] * (output.dim() - 2)).to(output.dtype)


def gates_of(layer: nn.Module) -> int:
    """Number of gates: one for every input of a linear layer, for every output map of a convolution."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[return-value]


@torch.no_grad()
def folded(model: nn.Module, hosts: Mapping[str, str], values: Mapping[str, Tensor]) -> nn.Module:
    """A copy without gates whose weights are multiplied by their ``values`` (layer -> z); ``hosts`` says where they act."""
    model = copy.deepcopy(model)
    for name, host_name in hosts.items():
        layer, host = model.get_submodule(name), model.get_submodule(host_name)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        z = values[name].to(weight.device)
        parts: list[tuple[Any, Tensor]]
        host._modules.pop("gate", None)
        if isinstance(layer, nn.Linear):
            parts = [(weight, z)]
        else:
            rows = z.view(-1, *[1] * (weight.dim() - 1))
            # Filters of closed gates go too where a batch norm carries the gates: it alone would leave them.
            parts = [(weight, rows if host is layer else (rows > 0).to(z.dtype)), (host.bias, z)]
            parts += [] if host is layer else [(host.weight, z)]
        for parameter, factors in parts:
            if parameter is not None:
                parameter.mul_(factors).add_(0.0)  # no -0.0
    return model
