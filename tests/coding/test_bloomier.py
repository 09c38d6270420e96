"""The Bloomier filter and its codec."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from efficientdnns.coding import load_weights, save_weights
from efficientdnns.coding.bloomier import (
    BloomierFilter,
    WeightlessCodec,
    _cells,
    _peel,
    false_positive_rate,
    table_size,
)
from efficientdnns.errors import ConfigurationError, FileFormatError


@pytest.mark.parametrize("n", [1, 2, 3, 10, 33, 100, 1000, 20_000])
@pytest.mark.parametrize(("k", "t"), [(2, 4), (9, 8), (16, 7)])
def test_every_stored_key_has_its_value(n, k, t) -> None:
    rng = np.random.default_rng(n)
    keys = rng.choice(50 * n, n, replace=False)
    values = rng.integers(0, k, n)
    table = BloomierFilter.build(keys, values, t)
    assert np.array_equal(table.query(keys), values)
    again = BloomierFilter.from_bytes(table.to_bytes())
    assert np.array_equal(again.query(np.arange(50 * n)), table.query(np.arange(50 * n)))
    assert len(table.to_bytes()) <= -(-table.table.size * t // 8) + 6
    assert table.table.size >= table_size(n, 1.25)


@pytest.mark.parametrize(("k", "t", "rate"), [(9, 8, 0.0352), (16, 10, 0.0156)])
def test_false_positives_are_as_many_as_they_must_be(k, t, rate) -> None:
    assert false_positive_rate(k, t) == pytest.approx(rate, abs=1e-4)
    n, absent = 5000, 1_000_000
    table = BloomierFilter.build(np.arange(n), np.arange(n) % k, t)
    found = float((table.query(np.arange(n, n + absent)) < k).mean())
    exact = k / 2**t
    assert abs(found - exact) < 3 * (exact * (1 - exact) / absent) ** 0.5


def test_success_of_the_construction_depends_on_the_size_of_the_table() -> None:
    keys = np.arange(2640)
    rates = [
        np.mean([_peel(_cells(keys, 3 * round(c * 880), s), 3 * round(c * 880)) is not None for s in range(12)])
        for c in (1.18, 1.3)
    ]
    assert rates[0] == 0
    assert rates[1] > 0.8
    small = [
        _peel(_cells(np.arange(n), table_size(n, 1.25), s), table_size(n, 1.25))
        for n in (2, 10, 100)
        for s in range(20)
    ]
    assert sum(rounds is not None for rounds in small) >= 57
    with pytest.raises(ConfigurationError, match="found no place"):
        BloomierFilter.build(np.arange(5000), np.zeros(5000), 4, c=1.0, retries=3)


def test_is_the_same_in_every_process() -> None:
    code = (
        "import numpy as np; from efficientdnns.coding.bloomier import BloomierFilter;"
        "print(BloomierFilter.build(np.arange(0, 700, 7), np.arange(100) % 9, 8, seed=3).to_bytes().hex())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out == BloomierFilter.build(np.arange(0, 700, 7), np.arange(100) % 9, 8, seed=3).to_bytes().hex()


def test_file_holds_the_very_bytes(tmp_path) -> None:
    weight = torch.zeros(200, 300)
    weight.view(-1)[torch.randperm(60_000)[:600]] = torch.tensor([0.1, -0.2, 0.3])[torch.arange(600) % 3]
    codec = WeightlessCodec.lossy(weight, 8)
    decoded = codec.decoded(tuple(weight.shape))
    assert torch.equal(decoded[weight != 0], weight[weight != 0]), "no false negatives"
    extra = int((decoded != 0).sum()) - 600
    assert 500 < extra < 900
    assert set(decoded.unique().tolist()) == set(weight.unique().tolist())
    size = save_weights(tmp_path / "w.safetensors", {"w": decoded}, {"w": (codec, "codebook")})
    assert torch.equal(load_weights(tmp_path / "w.safetensors")["w"], decoded)
    assert size < len(codec.data) + 200 < 1250
    # Weights that were changed since are coded otherwise.
    changed = decoded + 0.0
    changed[0, 0] = 7.0
    assert not codec.suits(changed)
    save_weights(tmp_path / "c.safetensors", {"w": changed}, {"w": (codec, "codebook")})
    assert torch.equal(load_weights(tmp_path / "c.safetensors")["w"], changed)


def test_empty_and_full_tensors_and_wrong_ones() -> None:
    for weight in (torch.zeros(5, 5), torch.ones(5, 5)):
        assert torch.equal(WeightlessCodec.lossy(weight, 12).decoded((5, 5))[weight != 0], weight[weight != 0])
    with pytest.raises(ConfigurationError, match="use fewer clusters"):
        WeightlessCodec.lossy(torch.randn(10, 10), 4)
    with pytest.raises(FileFormatError):
        WeightlessCodec().decode(b"\1\0\0\0\0\21\0\0", {}, (3,), torch.float32)
    with pytest.raises(ConfigurationError, match="do not fit 4 bits"):
        BloomierFilter.build([1], [16], 4)
