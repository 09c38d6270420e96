"""Networks of Hugging Face's transformers: ``hf:NAME`` (of the hub) or ``hf:FOLDER`` (with config.json and weights)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from efficientdnns.errors import ModelError, suggest

HEADS = {
    "feature-extraction": "AutoModel",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
}
"""Heads, and the class of transformers that has them."""
_ENDINGS = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "masked-lm",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "semantic-segmentation",
}


def hugging_face(name: str, num_classes: int | None, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The network and the options from which it is rebuilt without its files: ``head``, ``dtype`` and ``config``.

    Args:
        name: a name of the hub, or a folder.
        num_classes: classes of a head for classification or segmentation; an encoder without a head gets one.
        options: ``head``, one of `HEADS`, by default the one it was saved with; ``pretrained=False`` leaves the weights
            random; ``dtype`` (``float32``); ``config``, a whole configuration in place of the files. All others are
            fields of the configuration, such as ``num_hidden_layers``.

    Only safetensors are read, and no code that comes with a network is run. Raises `ModelError` for what cannot be
    built.
    """
    try:
        import transformers
    except ImportError:
        raise ModelError("transformers is not installed; pip install 'efficientdnns[transformers]'") from None
    fields = dict(options)
    given, head = fields.pop("config", None), fields.pop("head", None)
    pretrained, dtype = fields.pop("pretrained", True), str(fields.pop("dtype", "float32"))
    if head is not None and head not in HEADS:
        raise ModelError(f"hf:{name} has no head '{head}'{suggest(head, HEADS)}")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"hf:{name}: dtype is '{dtype}', expected a floating type of torch such as float32")
    try:
        with _quiet():
            config = _configuration(transformers, name, given, fields)
            head = head or _head(transformers, config, num_classes)
            if num_classes is not None and head.endswith(("classification", "segmentation")):
                config.num_labels = num_classes
            factory = getattr(transformers, HEADS[head])
            settings: dict[str, Any] = {"dtype": getattr(torch, dtype)}
            if pretrained and given is None:
                settings |= {"config": config, "use_safetensors": True, "ignore_mismatched_sizes": True}
                model = factory.from_pretrained(name, **settings)
            else:
                model = factory.from_config(config, **settings)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"hf:{name} cannot be built: {lines[0]}") from error
    return model, {"head": head, "dtype": dtype, "config": json.loads(model.config.to_json_string())}


def _configuration(transformers: Any, name: str, given: dict[str, Any] | None, fields: dict[str, Any]) -> Any:
    if given is None:
        config = transformers.AutoConfig.from_pretrained(name)
    else:
        known = dict(given)
        config = transformers.AutoConfig.for_model(known.pop("model_type"), **known)
    for field, value in fields.items():
        if not hasattr(config, field):
            known_fields = [key for key in config.to_dict() if not key.startswith("_")]
            raise ModelError(f"hf:{name} has no option '{field}'{suggest(field, [*known_fields, 'head', 'dtype'])}")
        setattr(config, field, value)
    return config


def _head(transformers: Any, config: Any, num_classes: int | None) -> str:
    saved = (config.architectures or [""])[0]
    head = next((head for ending, head in _ENDINGS.items() if saved.endswith(ending)), "feature-extraction")
    if head != "feature-extraction" or num_classes is None:
        return head
    text = type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return "sequence-classification" if text else "image-classification"


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no reports of what was loaded: a new head is what was asked for."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
