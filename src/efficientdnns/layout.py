"""How images lie in memory: with the channels of a pixel side by side (``channels_last``), convolutions run up to twice
as fast on a CPU, and on GPUs with tensor cores.

Code that says ``x.view(len(x), -1)`` behind a convolution does not run that way; it gets its images as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from efficientdnns.measurement.inference import with_batch

Outputs = Callable[[Any, Any], Any]
"""(network, inputs) -> outputs."""


def fitting_layout(model: nn.Module, example: Any, outputs: Outputs) -> torch.memory_format:
    """``torch.channels_last`` for networks of 2-D convolutions on images, if they train with it.

    A copy is tried on two samples, in training mode and without touching the state of the random numbers.

    Args:
        model: the network, which stays as it is.
        example: a batch of one.
        outputs: calls the network.
    """
    if not (_image(example) and convolves(model)):
        return torch.contiguous_format
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    trial = lay_out(copy.deepcopy(model).train(), torch.channels_last)
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            outputs(trial, arranged(with_batch(example, 2).to(device), torch.channels_last))
        except Exception:  # whatever it is about this network: it trains as it is
            return torch.contiguous_format
    return torch.channels_last


def fitting_outputs(outputs: Outputs) -> Outputs:
    """``outputs`` for a network in evaluation mode, with images as `torch.channels_last` unless the network refuses them."""
    layout: torch.memory_format | None = None

    def run(model: Any, inputs: Any) -> Any:
        nonlocal layout
        if layout is None:
            layout = torch.contiguous_format
            if _image(inputs) and convolves(model):
                try:
                    result = outputs(model, arranged(inputs, torch.channels_last))
                except RuntimeError:  # a view that this layout does not allow, or an error that comes again
                    return outputs(model, inputs)
                layout = torch.channels_last
                return result
        return outputs(model, arranged(inputs, layout))

    return run


def convolves(model: Any) -> bool:
    """Whether the network has 2-D convolutions."""
    return isinstance(model, nn.Module) and any(isinstance(module, nn.Conv2d) for module in model.modules())


def _image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()


def lay_out(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The network itself, with the 4-D weights of its convolutions in this layout; values and identities stay."""
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Conv2d) else None
        if weight is not None:
            weight.data = weight.data.contiguous(memory_format=layout)
    return model


def arranged(inputs: Any, layout: torch.memory_format) -> Any:
    """Inputs with every 4-D floating-point tensor in this layout."""
    return tree_map(lambda x: x.contiguous(memory_format=layout) if _image(x) else x, inputs)


def arrange_state(optimizer: Optimizer) -> None:
    """Give loaded momenta the layout of their parameters, as they had it when they were saved: same bits after resuming."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
