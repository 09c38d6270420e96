"""Which layers of a network can be replaced by a chain of smaller ones."""

from __future__ import annotations

from torch import nn

from efficientdnns.parts.low_rank import Layer


def layers_of(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that can be decomposed, by name, and why the other convolutions and linear layers cannot."""
    fused = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    inside = {id(part) for module in model.modules() if isinstance(module, fused) for part in module.modules()}
    able: dict[str, Layer] = {}
    unable: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            continue
        if id(module) in inside:
            unable[name] = "read by a fused kernel"
        elif type(module) not in (nn.Conv2d, nn.Linear):
            unable[name] = f"a {type(module).__name__}"
        elif getattr(module, "groups", 1) > 1:
            unable[name] = "grouped"
        else:
            able[name] = module  # type: ignore[assignment]
    return able, unable
