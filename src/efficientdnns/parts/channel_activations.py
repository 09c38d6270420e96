"""What the channels of a group carry where they are read: after the activation, the pooling and the sums before the reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from efficientdnns.parts.tap import evaluating
from efficientdnns.session import Session
from efficientdnns.surgery import Group, Member

Take = Callable[[str, Tensor], None]
"""Gets a group's name and (samples, positions, size): its channels at one of its readers."""


@torch.no_grad()
def reader_inputs(session: Session, model: nn.Module, group: Group, samples: int, positions: int = 16) -> Tensor:
    """The channels of a group as its readers see them for calibration samples, in eval mode.

    Args:
        session: gives calibration data, task and seed.
        model: as it is now.
        group: its channels.
        samples: calibration samples.
        positions: places of a feature map (or tokens) used of each sample, the same for all; all of them if there are no
            more than that.

    Returns:
        (rows, size), a row for every sample and place at every reader; no rows where no reader can be observed (weights
        that fused kernels read without calling a module).
    """
    generator = torch.Generator().manual_seed(session.seed)
    chosen: dict[int, Tensor] = {}
    rows: list[Tensor] = []

    def take(_: str, values: Tensor) -> None:
        count = values.shape[1]
        if count > positions:
            if count not in chosen:
                chosen[count] = torch.randperm(count, generator=generator)[:positions].sort().values
            values = values[:, chosen[count].to(values.device)]
        rows.append(values.flatten(0, 1))

    with observing(model, [group], take), evaluating(model):
        for inputs in session.calibration(samples):
            session.task.outputs(model, inputs)
    return torch.cat(rows) if rows else torch.zeros(0, group.size)


@contextmanager
def observing(model: nn.Module, groups: Sequence[Group], take: Take) -> Iterator[None]:
    """Hand the channels of these groups to ``take`` at every reader in every forward pass."""
    with ExitStack() as stack:
        for group in groups:
            for member in group.members:
                if member.role == "in":
                    module = model.get_submodule(member.module)
                    hook = _hook(group, member, module, take)
                    after = member.attribute.startswith("weight_hh")  # a recurrent layer reads what it returns
                    handle = module.register_forward_hook(hook) if after else module.register_forward_pre_hook(hook)
                    stack.callback(handle.remove)
        yield


def _hook(group: Group, member: Member, module: nn.Module, take: Take) -> Callable[..., None]:
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    size = getattr(module, member.attribute).shape[member.dim]

    def hook(_: nn.Module, *flow: Any) -> None:
        value = flow[-1]
        value = value[0] if isinstance(value, tuple) and value else value
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        value = value.detach()
        value = (value.movedim(1, -1) if convolution else value).contiguous()
        if value.shape[-1] != size:
            return
        index = member.index.to(value.device)
        channels = value.reshape(value.shape[0], -1, size)[..., index]  # (samples, positions, size, k)
        take(group.name, channels.transpose(2, 3).flatten(1, 2))

    return hook
