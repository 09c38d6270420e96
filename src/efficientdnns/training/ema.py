"""An exponential moving average of parameters, with bias correction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    r"""Averages parameters: :math:`\bar w \leftarrow \beta \bar w + (1-\beta) w`, read as :math:`\bar w / (1-\beta^t)`."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.parameters = dict(named_parameters)
        self.decay = decay
        self.steps = 0
        self.average = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take one step of the average; call it after every optimizer step."""
        self.steps += 1
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - self.decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Replace the parameters by their average for good."""
        if self.steps:
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name] / (1 - self.decay**self.steps))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters are the average; afterwards they are bit-identical to before."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(kept[name])

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)
