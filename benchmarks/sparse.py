"""Do zeros make a layer faster? Compressed rows, Winograd and frequency execution beside the dense layer, in turns.

    python benchmarks/sparse.py [--batches 1,64] [--rounds 10] [--only lstm] [--markdown]

Every entry is the dense layer's time divided by the other's: above 1 zeros pay, below 1 dense is faster. Times are the
least of the thread's processor time over rounds in which all variants take turns.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from table import show
from torch import Tensor, nn

from efficientdnns.parts.dct import DCTConv2d
from efficientdnns.parts.select import largest_mask
from efficientdnns.parts.sparse_kernels import compressed
from efficientdnns.parts.winograd import WinogradConv2d

SPARSITIES = (0.9, 0.95, 0.99)
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear 800-500": (nn.Linear(800, 500), (800,)),
    "linear 2048-2048": (nn.Linear(2048, 2048), (2048,)),
    "1x1 256-256, 14x14": (nn.Conv2d(256, 256, 1), (256, 14, 14)),
    "3x3 128-128, 16x16": (nn.Conv2d(128, 128, 3, padding=1), (128, 16, 16)),
    "3x3 256-256, 14x14": (nn.Conv2d(256, 256, 3, padding=1), (256, 14, 14)),
    "3x3 64-64, 32x32": (nn.Conv2d(64, 64, 3, padding=1), (64, 32, 32)),
    "LSTM 256-256, 32 steps": (nn.LSTM(256, 256, batch_first=True), (32, 256)),
    "LSTM 1024-1024, 16 steps": (nn.LSTM(1024, 1024, batch_first=True), (16, 1024)),
}
ZEROS = [f"{sparsity:.0%} zeros" for sparsity in SPARSITIES]
TITLES = [
    "layer",
    "batch",
    "dense ms",
    *ZEROS,
    "Winograd, dense",
    *(f"Winograd, {zeros}" for zeros in ZEROS),
    "DCT, dense",
]


def variants(layer: nn.Module) -> list[nn.Module | None]:
    """The layer with more and more zeros in compressed rows and (3x3) in the Winograd domain, and in the frequency domain."""
    made: list[nn.Module | None] = []
    for sparsity in SPARSITIES:
        sparse = copy.deepcopy(layer)
        with torch.no_grad():
            for weight in sparse.parameters():
                if weight.dim() > 1:
                    weight.mul_(largest_mask(weight.abs(), round((1 - sparsity) * weight.numel())))
        made.append(compressed(sparse))
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
        dense = WinogradConv2d.of(layer, 2)
        made.append(dense)
        for sparsity in SPARSITIES:
            pruned = WinogradConv2d.of(layer, 2)
            pruned.threshold = float(dense.transformed().detach().abs().quantile(sparsity))
            made.append(compressed(pruned))
        return [*made, DCTConv2d.of(layer, "frequency")]
    return [*made, *[None] * (2 + len(SPARSITIES))]


@torch.no_grad()
def seconds(networks: list[nn.Module], x: Tensor, rounds: int) -> list[float]:
    """Least processor time of one call of each, over rounds in which they take turns."""
    for network in networks:
        network.eval()(x)
    best = [float("inf")] * len(networks)
    for _ in range(rounds):
        for place, network in enumerate(networks):
            started = time.thread_time()
            for _ in range(calls := 5 if len(x) == 1 else 1):
                network(x)
            best[place] = min(best[place], (time.thread_time() - started) / calls)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="", help="layers whose name has this in it")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, (layer, shape) in LAYERS.items():
        if options.only.lower() not in name.lower():
            continue
        for batch in map(int, options.batches.split(",")):
            others = variants(layer)
            run = [network for network in others if network is not None]
            dense, *times = seconds([layer, *run], torch.randn(batch, *shape), options.rounds)
            ratios = iter(f"{dense / value:.2f}x" for value in times)
            rows.append([name, str(batch), f"{1e3 * dense:.3f}", *("-" if n is None else next(ratios) for n in others)])
    show(TITLES, rows, options.markdown)


if __name__ == "__main__":
    main()
