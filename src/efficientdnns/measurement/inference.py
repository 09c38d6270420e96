"""What every measurement shares: calling a network on an example, and leaving it as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from efficientdnns.errors import DataError

Forward = Callable[[nn.Module, Any], Any]
"""How to call a network: ``forward(model, inputs)`` returns its outputs; ``Task.outputs`` is one."""


def call(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with ``inputs``: a tuple or list is spread over the arguments, a mapping over the keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def batch_size(inputs: Any) -> int:
    """Return the first dimension of the first tensor in ``inputs`` (nested tuples, lists and mappings are searched).

    For a detector, called with a list of images, it is the number of images; see :func:`_samples`.

    Raises:
        DataError: ``inputs`` holds no tensor, or its first tensor has no dimension or no sample.
    """
    if (images := _samples(inputs)) is not None:
        return len(images)
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            if leaf.dim() == 0 or leaf.size(0) == 0:
                raise DataError(f"the example input has shape {tuple(leaf.shape)}; give it at least one sample")
            return leaf.size(0)
    raise DataError("the example input holds no tensor; give the tensors that the network is called with")


def _samples(inputs: Any) -> list[Tensor] | None:
    """The samples of a batch ``([tensor, ...], ...)``, whose first argument is a list of samples of different sizes."""
    if isinstance(inputs, tuple) and inputs and isinstance(inputs[0], list) and inputs[0]:
        return inputs[0]
    return None


def with_batch(inputs: Any, samples: int) -> Any:
    """Return ``inputs`` with ``samples`` samples: tensors of the batch's first dimension are cut or repeated."""
    size = batch_size(inputs)
    if (images := _samples(inputs)) is not None:
        return ([images[number % size] for number in range(samples)], *inputs[1:])

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.size(0) != size:
            return leaf
        return leaf[torch.arange(samples, device=leaf.device) % size]

    return tree_map(resize, inputs)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer, the CPU for a network without any."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def to_device(inputs: Any, device: torch.device) -> Any:
    """Return ``inputs`` with every tensor on ``device``."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode without gradients; restore every module's training flag and the random state.

    Gradients are off through ``no_grad``, also where the caller is in inference mode: inside inference mode PyTorch
    shows composite operations undecomposed, and tensors that a network keeps would be unusable for training later.
    """
    training = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with suppress(NotImplementedError):  # what torch.export wrote has its mode built in and refuses
        model.eval()
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
