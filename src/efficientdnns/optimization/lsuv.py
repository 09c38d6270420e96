"""LSUV initialisation: orthonormal weights, then every layer's output scaled to variance 1 on one batch, front to back.

It makes thin and deep networks without batch normalisation trainable, whatever their activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from efficientdnns.errors import ModelError
from efficientdnns.measurement.inference import evaluating
from efficientdnns.method import Method, Need, Paper
from efficientdnns.session import Session

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""The layers that are initialised."""


class Scaled(NamedTuple):
    """What LSUV did to one layer."""

    name: str
    before: float
    """Variance of the output with orthonormal weights."""
    after: float
    """Variance of the output in the end."""
    trials: int
    """Rescalings."""
    converged: bool


@torch.no_grad()
def orthonormal_(weight: Tensor) -> Tensor:
    r"""Fill a weight in place with an orthonormal matrix: of a Gaussian :math:`A = U S V^T` the factor of A's shape.

    ``weight`` is seen as (outputs, everything else). Its rows are orthonormal where there are no more outputs than
    inputs, else its columns.
    """
    gaussian = torch.randn(weight.shape[0], weight[0].numel(), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(gaussian, full_matrices=False)
    return weight.copy_((u if u.shape == gaussian.shape else vh).view(weight.shape))


@torch.no_grad()
def orthonormal_init_(model: nn.Module) -> nn.Module:
    """Pre-initialise every layer of the network: orthonormal weights, zero biases."""
    for layer in model.modules():
        if isinstance(layer, LAYERS):
            orthonormal_(layer.weight)
            if layer.bias is not None:
                layer.bias.zero_()
    return model


def lsuv_init_(
    model: nn.Module,
    batch: Any,
    *,
    target_variance: float = 1.0,
    tolerance: float = 0.1,
    max_trials: int = 10,
    orthonormal: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> list[Scaled]:
    r"""Initialise ``model`` in place on one batch of inputs and report every layer in the order in which it ran.

    Layer by layer, the later ones on what the earlier ones have become:
    :math:`W_l \leftarrow W_l \sqrt{v^* / \mathrm{Var}(o_l)}` until :math:`|\mathrm{Var}(o_l) - v^*| <` ``tolerance``.

    Args:
        model: network on the device of the batch; training flags and random state are restored.
        batch: inputs, as the model is called with them.
        target_variance: v*.
        tolerance: on the variance, in units of v*.
        max_trials: most rescalings of a layer.
        orthonormal: draw orthonormal weights and clear biases first; False only rescales what is there.
        forward: ``forward(model, batch)`` where calling the model is not enough.

    Raises:
        ModelError: the network runs no layer that could be initialised.
    """
    forward = forward or (lambda network, inputs: network(inputs))
    if orthonormal:
        orthonormal_init_(model)
    with evaluating(model):
        order = execution_order(model, batch, forward)
        if not order:
            raise ModelError("lsuv found no convolution or linear layer that runs; give a network that has some")
        return [_scale(*item, model, batch, forward, target_variance, tolerance, max_trials) for item in order]


def execution_order(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any]
) -> list[tuple[str, nn.Module]]:
    """Names and modules of the layers in the order of their first call; shared ones once, unused ones not at all."""
    order: dict[nn.Module, None] = {}
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules() if isinstance(module, LAYERS)}
    handles = [layer.register_forward_hook(lambda layer, *_: order.setdefault(layer)) for layer in names]
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [(names[layer], layer) for layer in order]


def _scale(
    name: str,
    layer: nn.Module,
    model: nn.Module,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any],
    target: float,
    tolerance: float,
    max_trials: int,
) -> Scaled:
    assert isinstance(layer.weight, Tensor)
    with _variance_of(layer) as variances:
        before = variance = _measure(variances, model, batch, forward)
        trials = 0
        # A dead output (variance 0, infinity or nan) cannot be scaled; it is reported as not converged.
        while abs(variance - target) >= tolerance * target and trials < max_trials and 1e-20 < variance < 1e20:
            layer.weight.mul_((target / variance) ** 0.5)
            trials += 1
            variance = _measure(variances, model, batch, forward)
    return Scaled(name, before, variance, trials, abs(variance - target) < tolerance * target)


class _Reached(Exception):
    """The layer has run; the rest of the network need not."""


@contextmanager
def _variance_of(layer: nn.Module) -> Iterator[list[float]]:
    """Collect the variance of a layer's output, over all its elements, each time the network runs up to it."""
    variances: list[float] = []

    def measure(module: nn.Module, inputs: Any, output: Tensor) -> None:
        variances.append(float(output.double().var(correction=0)))
        raise _Reached

    handle = layer.register_forward_hook(measure)
    try:
        yield variances
    finally:
        handle.remove()


def _measure(variances: list[float], model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any]) -> float:
    with suppress(_Reached):
        forward(model, batch)
    return variances[-1]


class LSUV(Method):
    r"""Layer-sequential unit-variance initialisation, `Mishkin and Matas, ICLR 2016 <https://arxiv.org/abs/1511.06422>`_.

    Every convolution and linear layer gets orthonormal weights and a zero bias. Then, from input to output, layer l is
    divided by the standard deviation of its output :math:`o_l` on one batch, before the non-linearity and over all
    elements:

    .. math:: W_l \leftarrow W_l / \sqrt{\mathrm{Var}(o_l)} \quad\text{until}\quad |\mathrm{Var}(o_l) - 1| < tol

    It replaces the weights of the network, so it stands before the training: ``[lsuv, fit]``.

    Deviations:
        The batch comes from the calibration split. Layers are taken in the order in which they run, shared ones once; a
        layer whose output is constant is left and reported. The official PyTorch code applies the tolerance to the
        standard deviation and shifts biases; the paper does neither.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="lsuv",
        title="All you need is a good init",
        authors="Dmytro Mishkin, Jiri Matas",
        venue="ICLR",
        year=2016,
        url="https://arxiv.org/abs/1511.06422",
    )
    kind: ClassVar[str] = "optimization"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration data"})

    samples: PositiveInt = 256
    """Size of the batch."""
    target_variance: PositiveFloat = 1.0
    """Variance that each layer's output gets."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Accepted relative distance from it."""
    max_trials: PositiveInt = 10
    """Most rescalings of a layer."""
    orthonormal: bool = True
    """Draw orthonormal weights first; False rescales the weights that are there."""

    def apply(self, session: Session) -> None:
        batch = next(session.calibration(self.samples, batch_size=self.samples))
        scaled = lsuv_init_(
            session.model,
            batch,
            target_variance=self.target_variance,
            tolerance=self.tolerance,
            max_trials=self.max_trials,
            orthonormal=self.orthonormal,
            forward=session.task.outputs,
        )
        session.report(layers=[layer._asdict() for layer in scaled])
        failed = [layer.name for layer in scaled if not layer.converged]
        session.say(f"{len(scaled) - len(failed)} of {len(scaled)} layers have variance {self.target_variance:g}")
