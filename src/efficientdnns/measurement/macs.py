"""Multiply-accumulates (MACs) of the graph that runs.

The network is called once and every ATen operation it executes is counted by its formula, whatever the modules are
called and however they are written. Nothing is inferred from module types: a custom layer, a functional call or a fused
kernel counts like the layer it computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from efficientdnns.measurement.inference import Forward, batch_size, call, device_of, to_device
from efficientdnns.measurement.mac_formulas import has_formula, macs_of
from efficientdnns.measurement.watch import Watch, watching


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of one forward pass, per sample.

    Attributes:
        total: all of them.
        by_module: module name -> those it executed itself, not through a child; the network itself is ``""``.
            A module that is called twice counts twice. The values add up to ``total`` (up to rounding, see
            :func:`count_macs`).
        by_operation: operation (``"aten.convolution"``) -> those it executed.
        unknown: operations outside ATen that ran and have no formula, so that ``total`` may lack theirs.
    """

    total: int
    by_module: dict[str, int]
    by_operation: dict[str, int]
    unknown: tuple[str, ...] = ()


def count_macs(
    model: nn.Module, example_inputs: Any, forward: Forward | None = None, *, samples: int | None = None
) -> MacCount:
    r"""Count the multiply-accumulates of one forward pass in evaluation mode, per sample.

    ================================  =============================================================================
    convolution, any dimension        output elements x in / groups x kernel; transposed: input elements x
                                      out / groups x kernel. Dilation changes nothing, padding counts.
    linear, matmul, einsum, bilinear  m x n x k of the products that run
    LSTM, GRU, RNN                    steps x elements of every weight matrix, of each layer and direction (an LSTM
                                      layer: :math:`4h(i + h)` a step)
    attention                         :math:`h\,l_q\,l_k(d_{qk} + d_v)`, masked positions included, beside its
                                      projections; one ``TransformerEncoderLayer(192, 3, 768)`` at 197 tokens: 102.0 M
    ================================  =============================================================================

    Zero: embeddings, element-wise operations, biases, softmax, pooling, interpolation, FFTs and normalisation. Weights
    that are zero count, also in a sparse layout: only what makes the network smaller lowers its MACs.

    Args:
        model: any network; training flags and random state are restored.
        example_inputs: what the network is called with: a tensor, a tuple (arguments) or a mapping (keywords). Moved to
            the network's device.
        forward: ``forward(model, inputs)`` where calling the model is not enough.
        samples: samples in ``example_inputs``, by default the first dimension of its first tensor. The count is divided
            by it and rounded; work that is shared by the whole batch, such as a weight composed from factors, is
            therefore shared out. Give one sample to see it whole.

    Raises:
        DataError: ``example_inputs`` holds no tensor.
    """
    samples = samples or batch_size(example_inputs)
    inputs = to_device(example_inputs, device_of(model))
    counter = _Counter()
    with _current_module(model, counter.path), watching(model, counter):
        (forward or call)(model, inputs)

    def per_sample(counts: Counter[str]) -> dict[str, int]:
        return {name: round(count / samples) for name, count in counts.items()}

    return MacCount(
        total=round(counter.by_module.total() / samples),
        by_module=per_sample(counter.by_module),
        by_operation=per_sample(counter.by_operation),
        unknown=tuple(sorted(counter.unknown)),
    )


class _Counter(Watch):
    """Adds up the formulas; ``path`` holds the names of the modules being called."""

    def __init__(self) -> None:
        super().__init__()
        self.path = [""]
        self.by_module: Counter[str] = Counter()
        self.by_operation: Counter[str] = Counter()
        self.unknown: set[str] = set()

    def whole(self, operation: Any) -> bool:
        return has_formula(operation)

    def seen(self, operation: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        macs = macs_of(operation, output, args, kwargs)
        if macs:
            self.by_module[self.path[-1]] += macs
            self.by_operation[str(operation)] += macs
        elif macs is None and str(operation).partition(".")[0] not in ("aten", "prim", "prims", "profiler"):
            self.unknown.add(str(operation))


@contextmanager
def _current_module(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep in ``path[-1]`` the name of the innermost module being called.

    The hooks are global ones: hooks on the modules themselves would switch off PyTorch's fused transformer layers, and
    another graph than the user's would be counted.
    """
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, inputs: Any) -> None:
        path.append(names.get(id(module), path[-1]))

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        path.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
