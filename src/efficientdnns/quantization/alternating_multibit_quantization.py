"""Multi-bit binary codes for recurrent networks: every row of a matrix, and each hidden state as it is made, is a
sum of k scaled sign vectors. Codes and coefficients are found in turn; training goes on through them
straight-through."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import nn

from efficientdnns.errors import ModelError
from efficientdnns.method import Paper, TrainingMethod
from efficientdnns.parts.binary_codes import CodeMethod
from efficientdnns.quantization.multibit_layers import LatentMultiBit, coded_layer
from efficientdnns.session import Session
from efficientdnns.surgery import replace_module
from efficientdnns.training import Callback, Trainer


class AlternatingMultibitQuantization(TrainingMethod):
    r"""Alternating multi-bit quantization, `Xu et al., ICLR 2018 <https://arxiv.org/abs/1802.00150>`_.

    Each row w of n weights becomes k sign vectors and k coefficients,

    .. math:: \min_{\alpha, b} \|w - \sum_{i=1}^k \alpha_i b_i\|^2, \quad b_i \in \{-1, +1\}^n

    from a greedy start by ``iterations`` turns of :math:`\alpha = (B^T B)^{-1} B^T w` and, for each entry, the nearest
    of the 2^k sums by binary search. With ``activation_bits`` the hidden state h_t of every step and sample is coded
    the same way before it is used, so that :math:`W h \approx \sum_{ij} \alpha^w_i \alpha^h_j (B^w_i b^h_j)`.
    Embedding, Linear, LSTM and GRU are coded; biases, gates and cell states stay real, and the rows of the coded
    embedding need no further coding.

    With ``epochs`` 0 the weights are coded as they are (no data needed). Otherwise the float weights are kept while
    training: every batch runs on their codes, gradients pass straight through, and the weights are clipped to [-1, 1].
    The learning rate is divided by ``decay`` after each epoch whose calibration metric is worse than the best so far.

    Deviations:
        Batches are independent windows with a zero initial state; the paper carries the state from window to window.
        The run lasts its epochs and does not stop where the learning rate falls below 0.001. Linear layers code their
        own input; a hidden state that alternation coded already comes out as it went in. Convolutions stay real. Zeros
        of earlier pruning do not survive: a sum of signs is hardly ever 0. The layers multiply decoded matrices: they
        are smaller, not faster (`parts.binary_codes.binary_product` is the product on the codes).
    """

    paper: ClassVar[Paper | None] = Paper(
        id="alternating-multibit-quantization",
        title="Alternating Multi-bit Quantization for Recurrent Neural Networks",
        authors="Chen Xu, Jianqiang Yao, Zhouchen Lin, Wenwu Ou, Yuanbin Cao, Zhirong Wang, Hongbin Zha",
        venue="ICLR",
        year=2018,
        url="https://arxiv.org/abs/1802.00150",
    )
    kind: ClassVar[str] = "quantization"
    in_place: ClassVar[bool] = False
    contract_fields: ClassVar[dict[str, Any]] = {"weight_bits": 3, "epochs": 0}

    weight_bits: Annotated[int, Field(ge=1, le=8)] = 2
    """k_w, signs a weight."""
    activation_bits: Annotated[int, Field(ge=1, le=8)] | None = None
    """k_h, signs an entry of a hidden state or of a linear layer's input; None leaves them real."""
    method: CodeMethod = "alternating"
    """The quantizer: alternating, or one of the paper's baselines."""
    iterations: NonNegativeInt = 2
    """Alternations T."""
    final_refit: bool = False
    """A last least squares for the coefficients of weights, which the paper's order leaves half a step old."""
    epochs: NonNegativeInt = 80
    """Epochs of training through the codes; 0 codes the trained weights and is done."""
    learning_rate: PositiveFloat | None = 20.0
    """Start of the learning rate (plain SGD; about 1e-3 for Adam)."""
    optimizer: Literal["sgd", "nesterov", "adam", "adamw", "rmsprop"] | None = "sgd"
    """Optimizer; the paper's SGD has no momentum."""
    weight_decay: Annotated[float, Field(ge=0)] | None = 0.0
    """L2 coefficient."""
    decay: Annotated[float, Field(ge=1)] = 1.2
    """What the learning rate is divided by after an epoch that was worse than the best."""
    clip: PositiveFloat = 1.0
    """Largest magnitude of a latent weight."""
    clip_norm: PositiveFloat = 0.25
    """Largest norm of the gradient."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "schedule": "constant", "clip_norm": self.clip_norm, "momentum": 0.0}

    def check(self, session: Session) -> None:
        if self.epochs:
            super().check(session)

    def apply(self, session: Session) -> None:
        if self.epochs:
            super().apply(session)
        else:
            self.code(session, session.model)

    def callback(self, session: Session) -> Callback:
        return TrainingThroughCodes(self, session) if self.epochs else CodingAtTheEnd(self, session)

    def insert(self, session: Session, model: nn.Module) -> dict[str, LatentMultiBit]:
        """Put a latent twin in the place of every layer that is coded (in place), and return them by name.

        Raises:
            ModelError: there is nothing to code, or hidden states cannot be coded in a layer.
        """
        twins: dict[str, LatentMultiBit] = {}
        for name in self.coded_layers(model):
            twins[name] = self.twin(model.get_submodule(name))
            replace_module(model, name, twins[name])
        session.report(coded=list(twins))
        return twins

    def coded_layers(self, model: nn.Module) -> list[str]:
        """The layers that are coded; raises as `insert` does."""
        found = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding, nn.LSTM, nn.GRU)}
        if not found:
            raise ModelError(f"{self.name} found nothing to code: it takes Linear, Embedding, LSTM and GRU layers")
        for name, layer in found.items():
            if self.activation_bits and isinstance(layer, nn.RNNBase) and (layer.bidirectional or layer.proj_size):
                raise ModelError(
                    f"{self.name} cannot code the states of '{name}', which is bidirectional or projects; "
                    "leave out activation_bits"
                )
        return list(found)

    def twin(self, layer: nn.Module) -> LatentMultiBit:
        """The latent twin of a layer."""
        coded = coded_layer(layer, self.weight_bits, self.activation_bits, self.method, self.iterations)
        return LatentMultiBit(layer, coded, self.final_refit)

    def code(self, session: Session, model: nn.Module) -> None:
        """Code the weights of ``model`` as they are (in place), layer by layer, and report the relative squared error of
        each matrix."""
        names = self.coded_layers(model)
        errors: dict[str, float] = {}
        with session.progress.task(f"{session.label}: layers", len(names)) as bar:
            for name in names:
                errors |= pack(model, name, self.twin(model.get_submodule(name)))
                bar.advance()
        session.report(coded=names, relative_squared_error=errors)


@torch.no_grad()
def pack(model: nn.Module, name: str, twin: LatentMultiBit) -> dict[str, float]:
    """Put the packed layer in the place of a latent one (in place) and return the relative squared error of each
    matrix."""
    packed = twin.packed()
    errors = {}
    for matrix in packed.shapes:
        weight = twin.get_parameter(matrix)
        error = (packed.dense(matrix) - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        errors[f"{name}.{matrix}"] = float(error)
    replace_module(model, name, packed)
    return errors


class CodingAtTheEnd(Callback):
    """Codes the weights at the end of a run that other methods share."""

    structural = True

    def __init__(self, method: AlternatingMultibitQuantization, session: Session) -> None:
        self.method, self.session = method, session

    def finish(self, trainer: Trainer) -> None:
        self.method.code(self.session, trainer.model)


class TrainingThroughCodes(Callback):
    """Trains float weights of which every batch sees the codes, and packs the codes at the end."""

    structural = True

    def __init__(self, method: AlternatingMultibitQuantization, session: Session) -> None:
        self.method, self.session = method, session
        self.twins: dict[str, LatentMultiBit] = {}
        self.best = math.nan
        self.share = 1.0

    def setup(self, trainer: Trainer) -> None:
        self.twins = self.method.insert(self.session, trainer.model)

    def epoch_start(self, trainer: Trainer) -> None:
        metric = trainer.task.metric
        if not trainer.history or metric.name not in trainer.history[-1]:
            return
        value = trainer.history[-1][metric.name] * (-1 if metric.higher_is_better else 1)
        if value > self.best:
            self.share /= self.method.decay
        self.best = value if math.isnan(self.best) else min(self.best, value)

    def learning_rate(self, trainer: Trainer) -> float:
        return self.share

    @torch.no_grad()
    def after_step(self, trainer: Trainer) -> None:
        for twin in self.twins.values():
            for name in twin.coded.shapes:
                twin.get_parameter(name).clamp_(-self.method.clip, self.method.clip)

    def finish(self, trainer: Trainer) -> None:
        errors: dict[str, float] = {}
        for name, twin in self.twins.items():
            errors |= pack(trainer.model, name, twin)
        self.session.report(relative_squared_error=errors)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "share": self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.share = state["best"], state["share"]
