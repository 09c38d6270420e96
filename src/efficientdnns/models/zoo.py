"""Networks of torchvision (classification, segmentation, detection, video) and timm by their names."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from efficientdnns.errors import ModelError, suggest


def torchvision_model(name: str, num_classes: int | None, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and the options from which one of the same structure is rebuilt without any weights.

    ``pretrained=True`` takes torchvision's default weights. Without it nothing is downloaded, unless
    ``weights_backbone="DEFAULT"`` asks for those of the backbone alone, for a segmentation network or a detector with
    classes of its own. A detector's ``num_classes`` count the background.
    """
    try:
        from torchvision import models as zoo
    except ImportError:
        raise ModelError("torchvision is not installed; pip install 'efficientdnns[vision]'") from None
    if name not in zoo.list_models():
        raise ModelError(f"torchvision has no model '{name}'{_near(name, zoo.list_models())}")
    used = options | ({} if num_classes is None else {"num_classes": num_classes})
    own = {key: value for key, value in used.items() if key not in ("pretrained", "frozen_norms")}
    known = inspect.signature(zoo.get_model_builder(name)).parameters
    if "weights_backbone" in known:
        own.setdefault("weights_backbone", None)
    try:
        model = zoo.get_model(name, weights="DEFAULT" if used.get("pretrained") else None, **own)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"torchvision:{name} cannot be built with {used}: {str(error).splitlines()[0]}") from error
    # Weights decide about structure too: segmentation networks get an auxiliary head, detectors frozen norms.
    if "aux_loss" in known and hasattr(model, "aux_classifier"):
        used["aux_loss"] = model.aux_classifier is not None
    if used.get("frozen_norms"):
        freeze_norms(model.backbone)
    elif any(_is_frozen(module) for module in model.modules()):
        used["frozen_norms"] = True
    return model, used


def freeze_norms(model: nn.Module) -> None:
    """Replace every batch norm in ``model`` by torchvision's frozen one, as detectors have it on a trained backbone."""
    from torchvision.ops import FrozenBatchNorm2d

    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(model, name, frozen)
        else:
            freeze_norms(child)


def _is_frozen(module: nn.Module) -> bool:
    from torchvision.ops import FrozenBatchNorm2d

    return isinstance(module, FrozenBatchNorm2d)


def timm_model(name: str, num_classes: int | None, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The network and its options; ``pretrained=True`` takes timm's weights."""
    try:
        import timm
    except ImportError:
        raise ModelError("timm is not installed; pip install 'efficientdnns[vision]'") from None
    if not timm.is_model(name.partition(".")[0]):
        raise ModelError(f"timm has no model '{name}'{_near(name, timm.list_models())}")
    used = options | ({} if num_classes is None else {"num_classes": num_classes})
    try:
        return timm.create_model(name, **used), used
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"timm:{name} cannot be built with {used}: {str(error).splitlines()[0]}") from error


def _near(name: str, known: list[str]) -> str:
    hint = suggest(name, known)
    return hint if "did you mean" in hint else ""
