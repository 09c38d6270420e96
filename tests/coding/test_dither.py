"""Dithered quantization: its error, and the codec."""

from __future__ import annotations

import pytest
import torch

from efficientdnns.coding import load_weights, save_weights
from efficientdnns.coding.dither import DitheredCodec, dither, quantize_uniform
from efficientdnns.coding.hashing import splitmix64
from efficientdnns.errors import ConfigurationError, FileFormatError


def test_hashes_are_fixed_and_spread() -> None:
    assert [hex(h) for h in splitmix64([0, 1, 2**40], seed=7)] == [hex(h) for h in splitmix64([0, 1, 2**40], seed=7)]
    assert int(splitmix64([0], 0)[0]) != int(splitmix64([0], 1)[0])
    bits = torch.from_numpy((splitmix64(range(20_000), 3) >> 63).astype("int64"))
    assert abs(float(bits.float().mean()) - 0.5) < 0.02


def test_error_is_within_half_a_step_and_with_dither_uniform_and_independent() -> None:
    weight, step = torch.randn(100_000) * 0.1, 0.4  # coarse: without dither the error follows the weights
    plain = quantize_uniform(weight, step) * step - weight
    assert plain.abs().max() <= step / 2 + 1e-6
    noise = dither(weight.numel(), step, seed=3)
    error = quantize_uniform(weight, step, noise) * step - noise - weight
    assert error.abs().max() <= step / 2 + 1e-6
    assert abs(float(error.mean())) < 1e-3
    assert float(error.var()) == pytest.approx(step**2 / 12, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([error, weight]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([plain, weight]))[0, 1])) > 0.1


def test_codec_gives_back_every_bit_from_fewer_bytes(tmp_path) -> None:
    weight, step, seed = torch.randn(50, 40), 0.25, 11
    noise = dither(weight.numel(), step, seed).view_as(weight)
    indices = quantize_uniform(weight, step, noise)
    levels = indices.unique()
    decoded = torch.where(weight.abs() > 1.0, indices * step - noise, 0.0)
    codec = DitheredCodec(step, seed, tuple((levels * step).tolist()))
    assert codec.suits(decoded)
    size = save_weights(tmp_path / "w.safetensors", {"w": decoded}, {"w": (codec, "sparse")})
    assert torch.equal(load_weights(tmp_path / "w.safetensors")["w"], decoded)
    assert size < 0.6 * save_weights(tmp_path / "s.safetensors", {"w": decoded}, {"w": "sparse"})


def test_codec_refuses_other_weights_and_corrupt_bytes() -> None:
    weight = torch.randn(30)
    codec = DitheredCodec(0.5, 0, (-0.5, 0.0, 0.5))
    assert not codec.suits(weight)
    with pytest.raises(ConfigurationError, match="use 'sparse'"):
        codec.encode(weight)
    noise = dither(30, 0.5, 0)
    data, _ = codec.encode(0.5 - noise)
    with pytest.raises(FileFormatError, match="needs float32"):
        codec.decode(data, {}, (30,), torch.float32)
