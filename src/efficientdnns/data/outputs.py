"""What a network returns, as the kinds of task read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from efficientdnns.data.embedding import embeddings


def class_logits(kind: str, outputs: Any) -> Any:
    """Logits with the classes last, (..., C), of what `read` gives: without the auxiliary output that a segmentation
    network has while it is trained."""
    if kind != "segmentation":
        return outputs
    return (outputs["out"] if isinstance(outputs, Mapping) else outputs).movedim(1, -1)


def read(kind: str, outputs: Any, inputs: Any, training: bool) -> Any:
    """The part of ``outputs`` that loss and metric of a task of this ``kind`` take.

    classification, regression, language-modelling, segmentation: the tensor in an attribute ``logits`` (Hugging Face's
    outputs); segmentation: the tensor ``out`` (torchvision's outputs), or all while training with an output ``aux``;
    feature-extraction: see `efficientdnns.data.embedding.embeddings`. Everything else stays.
    """
    if kind == "feature-extraction":
        return embeddings(outputs, inputs)
    if kind in ("detection", "custom") or isinstance(outputs, Tensor):
        return outputs
    if kind == "segmentation" and isinstance(outputs, Mapping) and "out" in outputs:
        return outputs if training and "aux" in outputs else outputs["out"]
    logits = getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else outputs
