"""A factor on every channel of a group where it is read: trained scaling factors, or masks that let gradients through.

A gate acts on the inputs of the layers that read the channels, behind batch norm and activation. A gate of zero takes the
channel out exactly as surgery would, and a gate that stays can be folded into the readers' weights without loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficientdnns.surgery import ChannelGraph, Group


class StraightThroughScale(torch.autograd.Function):
    """x * gate in the forward pass; in the backward pass x gets the gradient as if every gate were 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def gateable(model: nn.Module, groups: Sequence[Group]) -> list[Group]:
    """The groups all of whose readers are linear layers and convolutions that are called as modules."""
    layers = (nn.Linear, nn.modules.conv._ConvNd)

    def fits(group: Group) -> bool:
        readers = [member for member in group.members if member.role == "in"]
        modules = {member.module: model.get_submodule(member.module) for member in readers}
        return bool(readers) and all(
            isinstance(modules[m.module], layers)
            # Attention modules hold a linear layer whose weight they use themselves.
            and not isinstance(modules[m.module], nn.modules.linear.NonDynamicallyQuantizableLinear)
            and getattr(modules[m.module], "groups", 1) == 1
            and m.attribute == "weight"
            for m in readers
        )

    return [group for group in groups if fits(group)]


class ChannelGates:
    """Multiplies the channels of groups by ``gates`` in front of every layer that reads them.

    Attributes:
        gates: (size,) factors by group name; read at every call, so they may be parameters, or replaced.

    Args:
        model: gets forward pre-hooks while the gates are attached.
        groups: those of `gateable`.
        gates: by group name.
        straight_through: whether channels get their gradient as if all gates were 1.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], gates: Mapping[str, Tensor], straight_through: bool = False
    ) -> None:
        self.model, self.gates, self.straight_through = model, dict(gates), straight_through
        self._readers: dict[str, list[tuple[str, Tensor]]] = {}
        self._inputs: dict[str, int] = {}
        self._handles: list[Any] = []
        for group in groups:
            for member in group.members:
                if member.role == "in":
                    self._readers.setdefault(member.module, []).append((group.name, member.index))
                    self._inputs[member.module] = model.get_parameter(member.tensor).shape[member.dim]

    def attach(self) -> ChannelGates:
        """Gates act from now on."""
        for name, parts in self._readers.items():
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._hook(module, parts, self._inputs[name])))
        return self

    def detach(self) -> None:
        """The network is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, module: nn.Module, parts: list[tuple[str, Tensor]], inputs: int) -> Any:
        linear = isinstance(module, nn.Linear)
        whole = len(parts) == 1 and torch.equal(parts[0][1].flatten(), torch.arange(inputs))
        dims = 0 if linear else module.weight.dim() - 2  # type: ignore[operator]

        def scale(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            gate = self.gates[parts[0][0]]
            if whole:  # one group in its own order, which is nearly always so
                gate = gate.repeat_interleave(inputs // len(gate)) if inputs > len(gate) else gate
            else:
                everything = torch.ones(inputs, device=x.device, dtype=gate.dtype)
                for name, index in parts:
                    values = self.gates[name][:, None].expand(index.shape)
                    everything = everything.index_put((index.to(x.device).flatten(),), values.flatten())
                gate = everything
            gate = gate.to(x.dtype).view(-1, *[1] * dims)
            scaled = StraightThroughScale.apply(x, gate) if self.straight_through else x * gate
            return (scaled, *args[1:])

        return scale


@torch.no_grad()
def fold_gates(model: nn.Module, graph: ChannelGraph, groups: Sequence[Group], gates: Mapping[str, Tensor]) -> None:
    """Multiply the weights that read each channel by its gate: the network computes the same without gates."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for group in groups:
        for member in group.members:
            if member.role == "in" and member.tensor in tensors and group.name in gates:
                weight = tensors[member.tensor].movedim(member.dim, 0)
                gate = gates[group.name].to(weight.device, weight.dtype)
                for position in range(member.index.shape[1]):
                    rows = member.index[:, position].to(weight.device)
                    weight[rows] = weight[rows] * gate.view(-1, *[1] * (weight.dim() - 1))
