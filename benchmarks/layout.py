"""Images in memory: how much faster networks train and are evaluated channels-last than in the usual layout.

    python benchmarks/layout.py [--rounds 7] [--markdown]

Both layouts take turns in one process on one thread; ratios of the median processor times, above 1: channels-last is faster.
The last lines are milliseconds an image in evaluation with batches of several sizes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from table import show
from torch import nn
from torch.nn import functional as F

import efficientdnns as ed
from efficientdnns.layout import lay_out

NETWORKS: dict[str, tuple[int, ...]] = {
    "lenet5": (64, 1, 28, 28),
    "lenet5-caffe": (64, 1, 28, 28),
    "cifar-resnet20": (64, 3, 32, 32),
    "cifar-resnet56": (64, 3, 32, 32),
    "torchvision:resnet18": (8, 3, 224, 224),
    "torchvision:mobilenet_v2": (16, 3, 64, 64),
    "torchvision:vgg11_bn": (8, 3, 64, 64),
}
LAYOUTS = (torch.contiguous_format, torch.channels_last)
BATCHES = (16, 64, 128, 256, 512)


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def step(model: nn.Module, x: torch.Tensor) -> None:
    F.cross_entropy(model.train()(x), torch.zeros(len(x), dtype=torch.long)).backward()


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor) -> None:
    model.eval()(x)


def medians(model: nn.Module, shape: tuple[int, ...], work: Callable[..., None], rounds: int) -> list[float]:
    """Median seconds in both layouts."""
    arms = [(lay_out(copy.deepcopy(model), f), torch.randn(shape).contiguous(memory_format=f)) for f in LAYOUTS]
    for arm in arms:
        work(*arm)
    taken = [[seconds(lambda: work(*arm)) for arm in arms] for _ in range(rounds)]  # noqa: B023
    return [statistics.median(column) for column in zip(*taken)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [["network", "batch", "step", "evaluation"]]
    for name, shape in NETWORKS.items():
        model = ed.models.build(name)
        ratios = [first / last for first, last in (medians(model, shape, w, options.rounds) for w in (step, evaluate))]
        size = f"{shape[0]} of {shape[2]}x{shape[3]}"
        rows.append([name.removeprefix("torchvision:"), size, *(f"{ratio:.2f}x" for ratio in ratios)])
    model = ed.models.build("cifar-resnet20")
    for batch in BATCHES:
        taken = medians(model, (batch, 3, 32, 32), evaluate, options.rounds)
        rows.append(["cifar-resnet20, ms an image", str(batch), *(f"{1000 * t / batch:.2f}" for t in taken)])
    show(rows[0], rows[1:], options.markdown, "usual layout / channels-last; in the last lines each by itself")


if __name__ == "__main__":
    main()
