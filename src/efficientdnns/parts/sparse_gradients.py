"""Sparse gradient messages: which entries to send, how they are written, and how processes exchange them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from efficientdnns.coding.relative_index import relative_encode

RUN_LENGTH_BITS = 16
"""Bits of a run of zeros; a longer run is bridged by entries of value zero."""
HEADER_BYTES = 4
"""Bytes of a sparse message's number of entries."""


class Message(NamedTuple):
    """The non-zero entries of a tensor: 32-bit values, each after a 16-bit run of zeros."""

    run_lengths: Tensor
    """Zeros before each entry, (entries,), below 65,536."""
    values: Tensor
    """Float32, (entries,)."""

    @property
    def bytes(self) -> int:
        """Size on the wire."""
        return HEADER_BYTES + len(self.values) * (4 + RUN_LENGTH_BITS // 8)


@lru_cache(maxsize=4096)
def entries_to_send(numel: int, sparsity: float) -> int:
    """max(1, ceil((1 - s) * numel)), exactly: in floating point 1 - 0.999 is more than 0.001."""
    return min(numel, max(1, math.ceil((1 - Fraction(str(sparsity))) * numel)))


def select_exact(values: Tensor, count: int) -> Tensor:
    """Ascending positions of the ``count`` entries of a vector that are largest in magnitude."""
    if count >= values.numel():
        return torch.arange(values.numel(), device=values.device)
    return values.abs().topk(count, sorted=False).indices.sort().values


def select_sampled(
    values: Tensor, count: int, sample_ratio: float = 0.01, generator: torch.Generator | None = None
) -> Tensor:
    """About ``count`` entries of a vector by a threshold that a strided sample gives; ascending positions.

    Between 0.8 and 1.3 times ``count`` are taken as they come. More are selected again, exactly, among themselves
    (``count`` remain); after fewer the threshold falls and another sample is drawn, ten times at most.
    """
    numel = values.numel()
    # Fewer than two expected hits would make the threshold a matter of luck.
    stride = numel // max(1, math.ceil(numel * sample_ratio), math.ceil(2 * numel / count))
    if stride < 2 or count >= numel:
        return select_exact(values, count)
    magnitude, share = values.abs(), 1.0
    for _ in range(10):
        start = int(torch.randint(stride, (), generator=generator))
        sample = magnitude[start::stride]
        threshold = share * sample.topk(max(1, math.ceil(len(sample) * count / numel))).values[-1]
        selected = (magnitude >= threshold).nonzero().flatten()
        if len(selected) > 1.3 * count:
            return selected[select_exact(values[selected], count)]
        if len(selected) >= 0.8 * count:
            return selected
        share *= 0.8
    return select_exact(values, count)


def encode(positions: Tensor, values: Tensor) -> Message:
    """The message of ``values`` at ascending ``positions``."""
    gaps, filler = relative_encode(positions.cpu().numpy(), RUN_LENGTH_BITS)
    padded = torch.zeros(len(gaps), dtype=torch.float32, device=values.device)
    padded[torch.from_numpy(~filler).to(values.device)] = values.float()
    return Message(torch.from_numpy(gaps).to(values.device), padded)


def decode(message: Message, shape: Sequence[int]) -> Tensor:
    """The dense tensor of a message."""
    dense = torch.zeros(math.prod(shape), dtype=torch.float32, device=message.values.device)
    dense[torch.cumsum(message.run_lengths + 1, 0) - 1] = message.values
    return dense.view(tuple(shape))


Part = Message | Tensor
"""What is sent of one tensor: its message, or the dense tensor."""


def bytes_of(parts: Mapping[str, Part]) -> int:
    """Size of a worker's parts on the wire."""
    return sum(part.bytes if isinstance(part, Message) else 4 * part.numel() for part in parts.values())


def pack(parts: Mapping[str, Part]) -> Tensor:
    """All parts as one vector of bytes."""
    pieces: list[Tensor] = []
    for part in parts.values():
        if isinstance(part, Message):
            count = torch.tensor([len(part.values)], dtype=torch.int32, device=part.values.device)
            pieces += [count, part.values, part.run_lengths.to(torch.uint16)]
        else:
            pieces.append(part.detach().float().flatten())
    return torch.cat([piece.contiguous().view(torch.uint8) for piece in pieces])


def unpack(data: Tensor, shapes: Mapping[str, Sequence[int]], dense: set[str]) -> dict[str, Part]:
    """Undo `pack`, given the tensors' shapes in the order of packing and the names of those that were sent dense."""
    position = 0

    def take(count: int, dtype: torch.dtype) -> Tensor:
        nonlocal position
        start, position = position, position + count * dtype.itemsize
        # A copy, because a view as a wider type must start at a multiple of its size.
        return data[start:position].clone().view(dtype)

    parts: dict[str, Part] = {}
    for name, shape in shapes.items():
        if name in dense:
            parts[name] = take(math.prod(shape), torch.float32).view(tuple(shape))
        else:
            count = int(take(1, torch.int32))
            values = take(count, torch.float32)
            parts[name] = Message(take(count, torch.uint16).long(), values)
    return parts


def mean(workers: Sequence[Mapping[str, Part]], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The mean over the workers of what each sent, added in the order of the workers so that all get the same."""
    result = {}
    for name, shape in shapes.items():
        parts = [worker[name] for worker in workers]
        dense = [decode(part, shape) if isinstance(part, Message) else part for part in parts]
        total = dense[0]
        for part in dense[1:]:
            total = total + part
        result[name] = total / len(workers) if len(workers) > 1 else total
    return result


def all_gather_bytes(data: Tensor) -> list[Tensor]:
    """Every process's vector of bytes, in the order of ranks; lengths may differ."""
    world = dist.get_world_size()
    length = torch.tensor([data.numel()], device=data.device)
    lengths = [torch.zeros_like(length) for _ in range(world)]
    dist.all_gather(lengths, length)
    longest = max(int(other) for other in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=data.device)
    padded[: data.numel()] = data
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    return [part[: int(own)] for part, own in zip(gathered, lengths)]
