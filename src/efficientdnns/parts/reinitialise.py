"""Fresh initial weights for a network of any shape."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """A copy with new initial weights: every module draws its own as when it was made, batch-norm statistics are reset.

    A parameter that belongs to no module that can do so (a class token, a position table) is drawn from a normal
    distribution of its own mean and deviation. The same seed gives the same network; the global random numbers are left
    alone.
    """
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in fresh.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.numel() > 1 and parameter.std() > 0:
                    parameter.normal_(float(parameter.mean()), float(parameter.std()))
    return fresh
