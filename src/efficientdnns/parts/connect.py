"""Connectors: trainable adapters from the student's width to the teacher's, thrown away after training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn

from efficientdnns.errors import ModelError

if TYPE_CHECKING:
    from accelerate import Accelerator

ConnectorKind = Literal["conv1x1-bn", "linear"]


def connector(student: Sequence[int], teacher: Sequence[int], kind: ConnectorKind = "conv1x1-bn") -> nn.Module:
    r"""A map from responses of shape ``student`` (B, C, ...) to shape ``teacher`` (B, C', ...); identity where C = C'.

    Feature maps get a 1x1 convolution without bias, with batch norm behind it for ``conv1x1-bn``; vectors get a linear
    layer without bias. Weights are He-normal, :math:`N(0, 2/C')`.

    Raises `ModelError` if the spatial sizes differ.
    """
    if tuple(student[2:]) != tuple(teacher[2:]) or len(student) != len(teacher):
        raise ModelError(
            f"the student's features {tuple(student)} and the teacher's {tuple(teacher)} differ in spatial size; "
            "pair layers of equal size"
        )
    if student[1] == teacher[1]:
        return nn.Identity()
    mapping: nn.Module
    if len(student) == 2:
        mapping = nn.Linear(student[1], teacher[1], bias=False)
    else:
        convolution = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(student)]
        mapping = convolution(student[1], teacher[1], 1, bias=False)
    nn.init.kaiming_normal_(mapping.weight, mode="fan_out")
    if kind == "linear" or len(student) == 2:
        return mapping
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(student)]
    return nn.Sequential(mapping, norm(teacher[1]))


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean gradient over all processes, for parameters that the wrapped model does not hold."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
