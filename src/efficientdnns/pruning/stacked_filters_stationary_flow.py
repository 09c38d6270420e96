"""Stacked filters stationary flow: pruned layers coded in the order in which a sparse processor can use them.

Nothing is pruned or trained here: the weights are re-coded without loss, and what such a processor would do is counted.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from efficientdnns.coding.codecs import DeepCompressionCodec, best
from efficientdnns.coding.csf import ORDERS, CSFCodec, Order, column_entries, fillers, stacked
from efficientdnns.errors import ConfigurationError
from efficientdnns.measurement.macs import count_macs
from efficientdnns.method import Method, Paper
from efficientdnns.parts.select import layer_weights, without
from efficientdnns.session import Session

IndexBits = Annotated[int, Field(ge=2, le=16)]


def sfs_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    skip_zeros: bool = False,
) -> tuple[Tensor, int]:
    """The execution order as a reference: weights of all filters at one position stay, the channel's pixels stream by.

    Args:
        x: (N, C, H, W).
        weight: (M, C / groups, R, S); its zeros are never multiplied with. Every group is a layer of its own.
        skip_zeros: do not multiply with pixels that are zero (padding among them) either.

    Returns:
        The convolution, and the number of multiplications.
    """
    filters, channels, rows, columns = weight.shape
    padded = F.pad(x, (padding,) * 4)
    height, width = ((size - k) // stride + 1 for size, k in zip(padded.shape[-2:], (rows, columns)))
    y = x.new_zeros(filters, len(x), height, width)
    multiplications = 0
    share = filters // groups
    for group in range(groups):
        columns_of = stacked(weight[group * share : (group + 1) * share])
        for c, r, s in torch.cartesian_prod(*map(torch.arange, (channels, rows, columns))).tolist():
            column = columns_of[c, r, s]
            kept = column.nonzero().flatten()
            pixels = padded[:, group * channels + c, r : r + stride * height : stride, s : s + stride * width : stride]
            y.index_add_(0, group * share + kept, column[kept][:, None, None, None] * pixels[None])
            multiplications += len(kept) * (int(pixels.count_nonzero()) if skip_zeros else pixels.numel())
    y = y.transpose(0, 1)
    return y if bias is None else y + bias.view(-1, 1, 1), multiplications


def sfs_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, skip_zeros: bool = False) -> tuple[Tensor, int]:
    """A linear layer as a convolution of 1 x 1 maps: (N, C) -> (N, M), and the number of multiplications."""
    y, multiplications = sfs_conv2d(x[..., None, None], weight[..., None, None], bias, skip_zeros=skip_zeros)
    return y.flatten(1), multiplications


def pe_utilization(weight: Tensor, lanes: int = 16, index_bits: int = 16, skip_zeros: bool = True) -> float:
    r"""Useful multiplications over cycles times processing elements, along the filters; spatial lanes are taken as full.

    Skipping zeros, a column of stacked filters takes :math:`\lceil \text{entries} / P \rceil` cycles, fillers among them;
    otherwise :math:`\lceil M / P \rceil`.
    """
    entries = column_entries(weight, index_bits)
    if not skip_zeros:
        entries = entries * 0 + weight.shape[0]
    cycles = int((-(-entries // lanes)).sum())
    return int(weight.count_nonzero()) / (cycles * lanes) if cycles else 0.0


def compare_formats(weight: Tensor, index_bits: int | None = None) -> dict[str, int]:
    """Bytes of one weight: dense, CSR (32-bit values, 16- or 32-bit columns), relative indices in both orders, Deep
    Compression's format with Huffman codes, and this library's smallest."""
    rows, nonzero = weight.shape[0], int(weight.count_nonzero())
    width = 2 if weight.numel() // rows <= 1 << 16 else 4
    sizes = {"dense": 4 * weight.numel(), "csr": nonzero * (4 + width) + 4 * (rows + 1)}
    if CSFCodec().suits(weight):
        sizes |= {order: len(CSFCodec(index_bits, order).encode(weight)[0]) for order in ORDERS}
        sizes["deep-compression"] = len(DeepCompressionCodec(index_bits).encode(weight)[0])
    return sizes | {"smallest": len(best(weight).data)}


class StackedFiltersStationaryFlow(Method):
    r"""Stacked filters stationary flow, `Gao et al., 2018 <https://arxiv.org/abs/1801.07459>`_.

    Weights :math:`W_{mcrs}` are listed in the order (c, r, s, m), filters fastest, and stored as (gap, value) pairs with
    gaps of :math:`b_i` bits and values as cluster ids of :math:`b_v` bits (id 0 marks a filler, which bridges
    :math:`2^{b_i}` zeros):

    .. math:: \text{bits} = E (b_i + b_v) + 32 k, \qquad E = \text{non-zeros} + \text{fillers}

    A processor multiplies one input pixel with the column :math:`W_{\cdot crs}` of all filters, so a decoded pair says at
    once which sum it belongs to, and zeros take no cycle. Without a loss: the order that is smaller is taken for each
    layer, also the usual one (m, c, r, s), and the file is written so.

    Give it a pruned network whose weights are shared (after `deep-compression`, say); layers that are not sparse, or have
    too many values, are left as they are and named. The report has the bytes of all formats, the multiplications of one
    sample that remain and the utilisation of the processor model with and without skipping. `sfs_conv2d` is the execution
    order as a reference; its time says nothing about hardware.

    Deviations:
        Field widths and fillers are Deep Compression's, the paper's text leaves them open. Gaps run through the whole
        layer in the file, and start anew in every column in the processor model.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="stacked-filters-stationary-flow",
        title="Stacked Filters Stationary Flow For Hardware-Oriented Acceleration Of Deep Convolutional Neural Networks",
        authors="Yuechao Gao, Nianhong Liu, Sheng Zhang",
        venue="ICLR Workshop",
        year=2018,
        url="https://arxiv.org/abs/1801.07459",
    )
    kind: ClassVar[str] = "pruning"
    in_place: ClassVar[bool] = False

    index_bits: IndexBits | None = None
    """Bits of a gap; None takes what is smallest for each layer."""
    order: Order | None = None
    """The order of all layers; None takes the smaller one of each."""
    lanes: PositiveInt = 16
    """P, processing elements along the filters in the model of utilisation."""
    skip: tuple[str, ...] = ()
    """Layers to leave alone, by name pattern such as ``fc3`` or ``layer1.*``."""

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights that are looked at, by parameter name."""
        return without(layer_weights(model), self.skip, f"{self.name}: skip")

    def check(self, session: Session) -> None:
        super().check(session)
        if not self.weights(session.model):
            raise ConfigurationError(
                f"{self.name}: {type(session.model).__name__} has no linear, convolutional or recurrent layer"
            )

    def apply(self, session: Session) -> None:
        macs = count_macs(session.model, session.example_input, session.task.outputs).by_module
        codec = CSFCodec(self.index_bits, self.order)
        layers: dict[str, Any] = {}
        left, executed, dense = [], 0.0, 0.0
        for name, parameter in self.weights(session.model).items():
            weight = parameter.detach().cpu()
            density = int(weight.count_nonzero()) / weight.numel()
            layer = name.rpartition(".")[0]
            # A recurrent layer has several weights; its products are shared out by their sizes.
            own = session.model.get_submodule(layer).parameters(recurse=False)
            count = macs.get(layer, 0) * weight.numel() / sum(p.numel() for p in own if p.dim() > 1)
            dense, executed = dense + count, executed + count * density
            if not codec.suits(weight):
                left.append(name)
                continue
            session.codecs[name] = (codec, "sparse")
            layers[name] = self._layer(weight)
        session.report(
            layers=layers,
            left=left,
            bytes={key: sum(entry["bytes"][key] for entry in layers.values()) for key in _FORMATS if layers},
            multiplications={"dense": round(dense), "executed": round(executed)},
        )

    def _layer(self, weight: Tensor) -> dict[str, Any]:
        sizes = compare_formats(weight, self.index_bits)
        coded = CSFCodec(self.index_bits, self.order).encode(weight)[0]
        bits = coded[1] & 0x7F
        return {
            "density": int(weight.count_nonzero()) / weight.numel(),
            "bytes": sizes | {"csf": len(coded)},
            "order": ORDERS[coded[0]],
            "index_bits": bits,
            "fillers": {order: fillers(weight, bits, order) for order in ORDERS},
            "utilization": {
                "skipping": pe_utilization(weight, self.lanes, bits),
                "not skipping": pe_utilization(weight, self.lanes, skip_zeros=False),
            },
        }


_FORMATS = ("dense", "csr", *ORDERS, "csf", "deep-compression", "smallest")
