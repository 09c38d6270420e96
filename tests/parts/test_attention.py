"""Split attention computes what torch's fused attention computes, and can be quantized."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import efficientdnns as ed
from efficientdnns.deployment import check_result
from efficientdnns.parts.attention import SplitAttention, split_attention
from efficientdnns.parts.integer_layers import QuantizedLinear


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_fused_attention(batch_first, need_weights, bias) -> None:
    fused = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first).double().eval()
    nn.init.normal_(fused.in_proj_weight)
    if bias:
        nn.init.normal_(fused.in_proj_bias)
    split = SplitAttention.of(fused)
    x, y = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    q, k = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    mask = torch.randn(5, 7).double()
    for options in ({}, {"attn_mask": mask}, {"key_padding_mask": padding}, {"attn_mask": mask > 1.5}):
        expected = fused(q, k, k, need_weights=need_weights, **options)
        got = split(q, k, k, need_weights=need_weights, **options)
        torch.testing.assert_close(got[0], expected[0])
        if need_weights:
            torch.testing.assert_close(got[1], expected[1])
        else:
            assert got[1] is None
    alone = split(x[0], y[0], y[0]) if batch_first else None
    if alone is not None:
        torch.testing.assert_close(alone[0], fused(x[0], y[0], y[0])[0])


def test_leaves_alone_what_is_not_called_as_a_module() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, batch_first=True))
    assert split_attention(model) == []
    assert split_attention(nn.ModuleDict({"odd": nn.MultiheadAttention(8, 2, kdim=4)})) == []


class Tiny(nn.Module):
    """Digits as 16 tokens, one fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention = nn.Conv2d(1, 32, 7, 7), nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def test_fused_attention_is_quantized(digits, tmp_path) -> None:
    model = Tiny()
    ed.fit(model, digits, epochs=2, quiet=True, learning_rate=0.05, batch_size=32)
    result = ed.compress(model, digits, [ed.Int8Quantization(calibration_samples=64)], quiet=True, latency=False)
    quantized = [name for name, module in result.model.named_modules() if isinstance(module, QuantizedLinear)]
    assert {f"attention.{part}" for part in ("query", "key", "value", "out")} <= set(quantized)
    assert result.after.metric.value > result.before.metric.value - 3
    result.save(tmp_path)
    check_result(tmp_path, inputs=next(iter(digits.evaluation.batches(7))).inputs, model=Tiny())
    assert (tmp_path / "model.safetensors").stat().st_size < 0.45 * result.before.bytes
