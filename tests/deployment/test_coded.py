"""Weights kept in fewer bytes come back bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from efficientdnns.deployment.coded import GAIN, Decoding, encode, pack, unpack, with_coded_weights


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 70), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_packed_codes_come_back(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count), codes)


def stored(module: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in module.buffers())


@pytest.mark.parametrize("distinct", [1, 2, 3, 16, 200])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.95, 1.0])
def test_every_form_is_exact_and_smaller(distinct: int, zeros: float) -> None:
    weight = torch.randn(distinct)[torch.randint(0, distinct, (40, 50))]
    weight[torch.rand(40, 50) < zeros] = 0
    found = encode(weight)
    assert found is not None
    assert torch.equal(found(), weight)
    assert stored(found) <= GAIN * weight.nbytes
    if distinct == 16 and zeros == 0:
        assert stored(found) == 40 * 50 // 2 + 16 * 4
    if zeros == 0.95:
        assert stored(found) < 40 * 50 / 8 + 0.1 * 2000 * 1 + 4 * 201


def test_sparse_weights_of_many_values() -> None:
    weight = torch.randn(64, 64) * (torch.rand(64, 64) < 0.1)
    found = encode(weight)
    assert found is not None
    assert torch.equal(found(), weight)
    assert stored(found) == 64 * 64 // 8 + 4 * int(weight.count_nonzero())


def test_dense_or_tiny_weights_stay() -> None:
    assert encode(torch.randn(64, 64)) is None
    assert encode(torch.zeros(8)) is None
    network = nn.Linear(64, 64)
    assert with_coded_weights(network) is network


def test_tied_weights_and_recurrent_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
            self.lstm = nn.LSTM(32, 16, batch_first=True)
            with torch.no_grad():
                self.first.weight.copy_(self.first.weight.sign() / 8)
                self.lstm.weight_ih_l0.copy_(self.lstm.weight_ih_l0.sign() / 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.lstm(self.second(self.first(x).relu()))[0]

    network, x = Tied(), torch.randn(2, 3, 32)
    decoding = with_coded_weights(network)
    assert isinstance(decoding, Decoding)
    with torch.no_grad():
        assert torch.equal(decoding(x), network(x))
    assert sum(p.nbytes for p in decoding.parameters()) < 0.6 * sum(p.nbytes for p in network.parameters())
    assert network.first.weight.numel() == 32 * 32, "the network itself is left alone"
