"""Integer-only networks: affine 8-bit quantization of weights and activations, after training or during it.

Ranges come from calibration data (static), from each batch (dynamic) or from training with imitated quantization
(QAT); the layers that result compute in integers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn

from efficientdnns.data.split import Batch
from efficientdnns.deployment.int8_latency import layer_latencies, slower_layers
from efficientdnns.errors import ConfigurationError, DataError, ModelError
from efficientdnns.method import Need, Paper, TrainingMethod
from efficientdnns.parts.attention import split_attention
from efficientdnns.parts.observer import MinMax, MovingAverage, Observer, ObserverName, make_observer
from efficientdnns.parts.quantizer import QuantSpec
from efficientdnns.quantization.fake_quantization import (
    FakeQuantizedLayer,
    Place,
    convert,
    matches,
    places,
    prepare,
    quantizers,
)
from efficientdnns.session import Session
from efficientdnns.storage import trim
from efficientdnns.surgery.remove import clone
from efficientdnns.training import Callback, Trainer

Bits = Annotated[int, Field(ge=2, le=8)]


class Int8Quantization(TrainingMethod):
    r"""Integer-arithmetic-only inference, `Jacob et al., CVPR 2018 <https://arxiv.org/abs/1712.05877>`_.

    A real number r is S(q - Z) with a scale S, an integer q and a zero point Z. A layer computes

    .. math:: q_3 = Z_3 + M \sum_j (q_1^{(j)} - Z_1)(q_2^{(j)} - Z_2), \quad M = S_1 S_2 / S_3 = 2^{-n} M_0

    with int8 inputs q1 and weights q2, an int32 accumulator to which an int32 bias of scale S1 S2 is added, a
    fixed-point multiplier M0 of 32 bits and a rounding shift n. A following ReLU or ReLU6 is the clamp to [act_min,
    act_max]. Batch norms are folded first. Every Conv2d with zero padding and every Linear becomes an integer layer;
    all else, recurrent layers too, stays real and is listed in the report under ``left_real``.

    - ``static`` folds, observes ``calibration_samples`` of the calibration split and converts. No training, no labels.
    - ``dynamic`` quantizes weights only; the range of a layer's input is that of each batch.
    - ``qat`` trains with imitated quantization: gradients pass straight through inside the range and are 0 outside.
      Activation ranges are moving averages, and are only observed for the first ``delay`` of the run. Batch norms stay
      alive and are imitated folded with their running variance; from ``freeze_batch_norm`` on their statistics stand
      still.

    Per-channel weights and the practice of observers follow `Krishnamoorthi, 2018 <https://arxiv.org/abs/1806.08342>`_;
    ``entropy`` is the KL calibration of S. Migacz (GTC 2017).

    Deviations:
        Residual additions, concatenations and average pools run in real numbers between integer layers (their inputs
        lie on their layers' grids, their result is quantized where the next integer layer reads it); the paper rescales
        in integers (`parts.integer_arithmetic.quantized_add`). A layer whose output is the network's output returns its
        accumulators as real numbers. The layers are an exact reference: they are smaller, not faster; speed comes from
        ONNX Runtime, for which `efficientdnns.deployment.int8_onnx` writes them, residual additions in integers too.
        QAT divides the convolution by the fold factor and normalises it by the batch
        (the variant of 1806.08342 without its correction term, which this makes superfluous) in place of the paper's
        second convolution. The delay is a share of the run, not 50,000 to 2 million steps.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="int8-quantization",
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        authors="Benoit Jacob, Skirmantas Kligys, Bo Chen, Menglong Zhu, Matthew Tang, Andrew Howard, Hartwig Adam, "
        "Dmitry Kalenichenko",
        venue="CVPR",
        year=2018,
        url="https://arxiv.org/abs/1712.05877",
    )
    kind: ClassVar[str] = "quantization"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration data"})
    in_place: ClassVar[bool] = False
    contract_fields: ClassVar[dict[str, Any]] = {"calibration_samples": 64}

    mode: Literal["static", "dynamic", "qat"] = "static"
    """After training with calibrated ranges, after training with ranges of each batch, or quantization-aware
    training."""
    weight_bits: Bits = 8
    """Width of a weight."""
    activation_bits: Bits = 8
    """Width of an activation."""
    per_channel: bool = True
    """A weight scale for every output channel in place of one for the layer."""
    symmetric: bool = True
    """Weights with zero point 0 on the narrow grid (-127..127)."""
    observer: ObserverName = "mse"
    """How 'static' turns what it saw into ranges: extremes, moving average of extremes, percentile, least squared
    error, least KL."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """Percentile of the observer of that name; the rest is clipped at both ends."""
    calibration_samples: PositiveInt = 512
    """Samples of the calibration split that 'static' observes."""
    skip: tuple[str, ...] = ()
    """Layers that stay real: names or patterns such as 'layer1.*'."""
    skip_slower: bool = False
    """Leave layers real that are slower in integers, measured in ONNX Runtime on this machine at the threads of the run
    and a batch of one; they are reported under ``slower``. On by itself under a latency budget. Needs onnxruntime."""
    learning_rate: Annotated[float, Field(gt=0)] | None = 0.005
    """Peak learning rate of 'qat'; low, because a trained network is tuned."""
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Weight of the past in the moving averages of activation ranges ('qat')."""
    delay: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the run before activations are quantized ('qat')."""
    freeze_batch_norm: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Share of the run after which batch-norm statistics stand still ('qat')."""

    @property
    def total_epochs(self) -> int:
        return self.epochs if self.mode == "qat" else 0

    def check(self, session: Session) -> None:
        if self.mode == "static":
            super().check(session)
        elif self.mode == "qat" and (session.task.train is None or not session.task.has_labels):
            raise DataError(
                f"{self.name} with mode=qat needs labelled training data, but task '{session.task.name}' has none; "
                "write mode=static"
            )

    def callback(self, session: Session) -> Callback:
        return QuantizationAwareTraining(self, session) if self.mode == "qat" else PostTraining(self, session)

    def apply(self, session: Session) -> None:
        if self.mode == "qat":
            super().apply(session)
        else:
            quantize_after_training(self, session, session.model)

    def weight_spec(self) -> QuantSpec:
        """The weights' quantizer."""
        return QuantSpec(self.weight_bits, self.symmetric, axis=0 if self.per_channel else None)

    def activation_spec(self) -> QuantSpec:
        """The activations' quantizer."""
        return QuantSpec(self.activation_bits)

    def plan(self, session: Session, model: nn.Module) -> list[Place]:
        """The layers to quantize; reports those that stay real."""
        names = [name for name, _ in model.named_modules()]
        for pattern in self.skip:
            if not any(matches(name, (pattern,)) for name in names):
                raise ConfigurationError(
                    f"{self.name}: skip names '{pattern}', which no layer is called; "
                    "write a name or a pattern like 'layer1.*'"
                )
        plan, left = places(model, session.example_input, self.skip)
        if plan and (self.skip_slower or "latency" in session.budget.limits()):
            plan, left = self.faster(session, model, plan)
        if not plan:
            raise ModelError(
                f"{self.name} found no layer to quantize: it takes Conv2d with zero padding and Linear, called once"
            )
        session.report(
            quantized=[place.name for place in plan], left_real=left, fused=sum(p.activation != "none" for p in plan)
        )
        return plan

    def faster(self, session: Session, model: nn.Module, plan: list[Place]) -> tuple[list[Place], list[str]]:
        """`places` without the layers that a trial in integers shows to be slower; reports them with both times."""
        trial = clone(model).eval()
        layers = prepare(trial, plan, self.weight_spec(), self.activation_spec(), MinMax)
        for quantizer in quantizers(layers):
            quantizer.calibrating = True
        with torch.no_grad():
            session.task.outputs(trial, session.example_input)
            convert(trial, plan, layers, dynamic=self.mode == "dynamic")
        latencies = layer_latencies(trial.cpu(), session.task.example_input, forward=session.task.outputs)
        slower = slower_layers(latencies)
        session.report(
            slower={layer.name: [layer.real_ms, layer.int8_ms] for layer in latencies if layer.name in slower}
        )
        return places(model, session.example_input, (*self.skip, *slower))


@torch.no_grad()
def quantize_after_training(method: Int8Quantization, session: Session, model: nn.Module) -> None:
    """Fold, observe and convert the network in place."""
    model.eval()
    split_attention(model)
    plan = method.plan(session, model)
    trim(garbage_of=model)
    spec = method.activation_spec()

    def observer() -> Observer:
        return make_observer(method.observer, spec, percent=method.percentile)

    layers = prepare(model, plan, method.weight_spec(), spec, observer)
    if method.mode == "static":
        for quantizer in quantizers(layers):
            quantizer.calibrating = True
        with session.progress.task(f"{session.label}: calibration", method.calibration_samples) as bar:
            for inputs in session.calibration(method.calibration_samples):
                session.task.outputs(model, inputs)
                bar.advance(steps=len(inputs))
    with session.progress.task(f"{session.label}: layers", len(plan)) as bar:
        for place in plan:
            convert(model, [place], layers, dynamic=method.mode == "dynamic")
            layers[place.name].release()
            bar.advance()


class PostTraining(Callback):
    """Quantizes at the end of a run that other methods share."""

    structural = True

    def __init__(self, method: Int8Quantization, session: Session) -> None:
        self.method, self.session = method, session

    def finish(self, trainer: Trainer) -> None:
        quantize_after_training(self.method, self.session, trainer.model)


class QuantizationAwareTraining(Callback):
    """Trains with imitated quantization and converts at the end. Ranges are buffers of the model, so they lie in its
    checkpoint."""

    structural = True

    def __init__(self, method: Int8Quantization, session: Session) -> None:
        self.method, self.session = method, session
        self.plan: list[Place] = []
        self.layers: dict[str, FakeQuantizedLayer] = {}

    def setup(self, trainer: Trainer) -> None:
        method = self.method
        split_attention(trainer.model)
        self.plan = method.plan(self.session, trainer.model)
        self.layers = prepare(
            trainer.model,
            self.plan,
            method.weight_spec(),
            method.activation_spec(),
            lambda: MovingAverage(1 - method.smoothing),
        )

    def batch(self, trainer: Trainer, batch: Batch) -> Batch:
        done = trainer.step / trainer.total_steps
        for quantizer in quantizers(self.layers):
            quantizer.quantizing = done >= self.method.delay
        if done >= self.method.freeze_batch_norm:
            for module in trainer.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return batch

    def finish(self, trainer: Trainer) -> None:
        with torch.no_grad():
            convert(trainer.model, self.plan, self.layers)
