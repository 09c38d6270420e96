"""Observers: what range of values a quantizer should cover, learnt from the tensors that pass by.

An observer is a module without parameters; its statistics are buffers, so they lie in checkpoints and follow the
device. Call it on every tensor, then ask for `range`. `make_observer` builds one by name.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from efficientdnns.errors import DataError
from efficientdnns.parts.quantizer import QuantSpec, extremes, scale_and_zero_point

ObserverName = Literal["min-max", "moving-average", "percentile", "mse", "entropy"]


class Observer(nn.Module):
    """Base: keeps the extremes of everything seen. ``low`` and ``high`` are NaN until a tensor was seen."""

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(math.nan))
        self.register_buffer("high", torch.tensor(math.nan))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` and return it unchanged; empty tensors are passed over."""
        if x.numel():
            self.observe(x.detach())
        return x

    def observe(self, x: Tensor) -> None:
        """Take ``x`` into the statistics."""
        low, high = extremes(x)
        # fmin and fmax pass over the NaN that stands for "nothing seen".
        torch.fmin(self.low, low.to(self.low.dtype), out=self.low)
        torch.fmax(self.high, high.to(self.high.dtype), out=self.high)

    def range(self) -> tuple[Tensor, Tensor]:
        """The range to cover, (a, b).

        Raises:
            DataError: nothing was observed, or the values were not finite.
        """
        if not (torch.isfinite(self.low) and torch.isfinite(self.high)):
            why = "saw no tensor" if torch.isnan(self.low) else "saw values that are not finite"
            raise DataError(f"a quantizer's observer {why}; run calibration inputs through this part of the network")
        return self.low, self.high


class MinMax(Observer):
    """The true extremes of everything seen."""


class MovingAverage(Observer):
    """Moving average of each batch's extremes, m <- m + c (m_batch - m), starting from the first batch.

    Args:
        constant: c in (0, 1]; 0.01 as in PyTorch.
    """

    def __init__(self, constant: float = 0.01) -> None:
        super().__init__()
        self.constant = constant

    def observe(self, x: Tensor) -> None:
        for mean, now in zip((self.low, self.high), extremes(x)):
            mean.copy_(torch.where(mean.isnan(), now, mean + self.constant * (now - mean)))


class Histogram(Observer):
    """Counts of values in bins whose width is a power of two and whose edges are multiples of it.

    When the range grows, the width doubles until the bins reach, and bins are merged pairwise: nothing is interpolated,
    so the counts are the same however the data was split into batches.

    Args:
        bins: how many there are; between a half and all of them lie within the data's range.
    """

    counts: Tensor
    place: Tensor

    def __init__(self, bins: int = 2048) -> None:
        super().__init__()
        self.bins = bins
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.int64))
        self.register_buffer("place", torch.zeros(2, dtype=torch.int64))
        """Exponent k of the width 2^k, and index of the first bin in widths from 0."""

    def observe(self, x: Tensor) -> None:
        seen = not bool(self.low.isnan())
        super().observe(x)
        low, high = Observer.range(self)
        exponent, first = _placement(float(low), float(high), self.bins)
        if seen:
            old_exponent, old_first = self.place.tolist()
            index = ((torch.arange(self.bins, device=x.device) + old_first) >> (exponent - old_exponent)) - first
            inside = self.counts > 0
            merged = torch.zeros_like(self.counts).index_add_(0, index[inside], self.counts[inside])
            self.counts.copy_(merged)
        index = torch.floor(x.flatten().double() * 2.0**-exponent).long() - first
        self.counts += torch.bincount(index, minlength=self.bins)
        self.place.copy_(torch.tensor([exponent, first]))

    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Edges (n + 1) and counts (n) of the bins from the first to the last that holds anything; the outer edges
        are the extremes."""
        low, high = (float(value) for value in Observer.range(self))
        exponent, first = self.place.tolist()
        counts = self.counts.cpu().numpy()
        filled = np.flatnonzero(counts)
        a, b = int(filled[0]), int(filled[-1]) + 1
        edges = (np.arange(a, b + 1) + first) * 2.0**exponent
        edges[0], edges[-1] = low, high
        return edges, counts[a:b].astype(np.float64)


def _placement(low: float, high: float, bins: int) -> tuple[int, int]:
    """The least exponent k (and the first bin) for which ``bins`` bins of width 2^k cover [low, high].

    Widths below 2^-22 of the largest magnitude are not used, nor any that float32 could not tell apart.
    """
    size = max(abs(low), abs(high), 1e-30)
    exponent = math.frexp(size)[1] - 23
    while math.floor(high * 2.0**-exponent) - math.floor(low * 2.0**-exponent) >= bins:
        exponent += 1
    return exponent, math.floor(low * 2.0**-exponent)


class Percentile(Histogram):
    """The range between the (100 - p)-th and the p-th percentile of everything seen, interpolated inside a bin.

    Args:
        percent: p in (50, 100]; 99.9 to 99.999 are usual.
        bins: 65,536, because the bulk may lie in a few bins beside a far outlier.
    """

    def __init__(self, percent: float = 99.99, bins: int = 1 << 16) -> None:
        super().__init__(bins)
        self.percent = percent

    def range(self) -> tuple[Tensor, Tensor]:
        if self.counts.sum() == 0:
            return super().range()
        edges, counts = self.edges()
        share = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
        low, high = np.interp([1 - self.percent / 100, self.percent / 100], share, edges)
        return self.low.new_tensor(low), self.high.new_tensor(high)


class MeanSquaredError(Histogram):
    """The range of least expected squared quantization error, values being spread evenly inside a bin.

    From the full range on, one end at a time is moved inward past a share of 1e-5 of the samples, the end that gives up
    more bins for it. The best range on this way is taken; it ends where the error is twice the least found, not at the
    first rise as in PyTorch, because with few levels the error wavers as the grid shifts.

    Args:
        spec: the quantizer the range is for.
        bins: of the histogram.
    """

    STEP = 1e-5

    def __init__(self, spec: QuantSpec, bins: int = 2048) -> None:
        super().__init__(bins)
        self.spec = spec

    def range(self) -> tuple[Tensor, Tensor]:
        if self.counts.sum() == 0:
            return super().range()
        edges, counts = self.edges()
        share = (np.cumsum(counts) / counts.sum()).tolist()
        start, end = 0, len(counts) - 1
        alpha, beta = 0.0, 1.0
        best, chosen = self._error(edges, counts, start, end), (start, end)
        while alpha < beta and start < end:
            left = min(bisect_left(share, alpha + self.STEP), end)
            right = max(bisect_right(share, beta - self.STEP) - 1, start)
            if left - start > end - right:
                alpha, candidate = alpha + self.STEP, (left, end)
            else:
                beta, candidate = beta - self.STEP, (start, min(right, end))
            if candidate == (start, end):
                continue
            start, end = candidate
            error = self._error(edges, counts, start, end)
            if error > 2 * best:
                break
            if error < best:
                best, chosen = error, candidate
        return self.low.new_tensor(edges[chosen[0]]), self.high.new_tensor(edges[chosen[1] + 1])

    def _error(self, edges: NDArray[np.float64], counts: NDArray[np.float64], start: int, end: int) -> float:
        return expected_squared_error(edges, counts, float(edges[start]), float(edges[end + 1]), self.spec)


def expected_squared_error(
    edges: NDArray[np.float64], counts: NDArray[np.float64], low: float, high: float, spec: QuantSpec
) -> float:
    """Sum over all samples of the squared error of quantizing them with the range [low, high].

    Args:
        edges: n + 1 rising edges of the bins. counts: n samples in each, spread evenly inside their bin.
    """
    scales, zero_point = scale_and_zero_point(torch.tensor(low).double(), torch.tensor(high).double(), spec)
    step = float(scales)
    low, high = (spec.low - int(zero_point)) * step, (spec.high - int(zero_point)) * step

    # The integral of the squared error from the lower end up to u: step^3 / 12 for each full cell of the grid.
    inside = np.clip(edges, low, high)
    position = (inside - low) / step + 0.5
    cell = np.floor(position)
    integral = step**3 * (cell / 12 + ((position - cell - 0.5) ** 3 + 0.125) / 3) + (edges - inside) ** 3 / 3
    width = np.diff(edges)
    density = np.divide(counts, width, out=np.zeros_like(counts), where=width > 0)
    points = np.where(width > 0, 0.0, counts * ((edges[:-1] - inside[:-1]) ** 2))
    return float((density * np.diff(integral) + points).sum())


class Entropy(Histogram):
    r"""The symmetric threshold of least information loss (S. Migacz, 8-bit inference with TensorRT, GTC 2017).

    Over the histogram of |x|, for each number of bins i from the number of levels on: P is the first i bins with
    everything beyond added to the last; Q the same i bins without what lies beyond, merged to the levels and spread
    again over the bins in which P is not zero. The i with the least KL(P || Q) gives the threshold (i + 0.5) bin
    widths. The range returned is [-threshold, threshold] cut to the extremes of the data. The bin at 0, which ReLU
    fills with values that cost nothing, counts as much as the one after it.

    Args:
        spec: the quantizer the range is for; 2^(bits - 1) levels (128 for 8 bits), twice as many where nothing is
            negative.
        bins: of the histogram.
    """

    signed_low: Tensor
    signed_high: Tensor

    def __init__(self, spec: QuantSpec, bins: int = 2048) -> None:
        super().__init__(bins)
        self.spec = spec
        self.register_buffer("signed_low", torch.tensor(math.nan))
        self.register_buffer("signed_high", torch.tensor(math.nan))

    def observe(self, x: Tensor) -> None:
        low, high = extremes(x)
        torch.fmin(self.signed_low, low.to(self.signed_low.dtype), out=self.signed_low)
        torch.fmax(self.signed_high, high.to(self.signed_high.dtype), out=self.signed_high)
        # A zero beside the values keeps the bins starting at 0 whatever the least magnitude is.
        super().observe(torch.cat([x.abs().flatten(), x.new_zeros(1)]))

    def range(self) -> tuple[Tensor, Tensor]:
        if self.counts.sum() == 0:
            return super().range()
        _, counts = self.edges()
        counts[0] = counts[min(1, len(counts) - 1)]
        low, high = self.signed_low, self.signed_high
        levels = 1 << (self.spec.bits - bool(low < 0))
        threshold = (best_entropy_bins(counts, levels) + 0.5) * 2.0 ** int(self.place[0])
        return low.clamp(min=-threshold), high.clamp(max=threshold)


def best_entropy_bins(counts: NDArray[np.float64], levels: int) -> int:
    """The number of bins i in [levels, len(counts)] with the least KL(P || Q); all of them where there are fewer
    than levels."""
    best, chosen = math.inf, len(counts)
    for i in range(levels, len(counts) + 1):
        kept = counts[:i]
        p = kept.copy()
        p[-1] += counts[i:].sum()
        group = np.arange(i) * levels // i
        present = p > 0
        per_level = np.bincount(group, weights=kept, minlength=levels)
        size = np.bincount(group, weights=present, minlength=levels)
        q = np.where(present, per_level[group] / np.maximum(size[group], 1), 0.0)
        if q.sum() == 0:
            continue
        p, q = p[present] / p.sum(), q[present] / q.sum()
        # Where Q has nothing for something in P the divergence is infinite; a floor keeps it merely large.
        divergence = float((p * np.log(p / np.maximum(q, 1e-12))).sum())
        if divergence < best:
            best, chosen = divergence, i
    return chosen


def make_observer(name: ObserverName, spec: QuantSpec, *, percent: float = 99.99, constant: float = 0.01) -> Observer:
    """The observer called ``name`` for a quantizer of ``spec``."""
    if name == "min-max":
        return MinMax()
    if name == "moving-average":
        return MovingAverage(constant)
    if name == "percentile":
        return Percentile(percent)
    return MeanSquaredError(spec) if name == "mse" else Entropy(spec)
