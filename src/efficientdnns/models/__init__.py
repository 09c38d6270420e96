"""Networks: built-in ones by name, torchvision's, timm's and Hugging Face's, the user's own, and saved results."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from efficientdnns.data.nested import leaves, to_device
from efficientdnns.errors import DataError, EfficientDNNsError, ModelError, suggest
from efficientdnns.models.catalogue import CATALOGUE, Entry
from efficientdnns.models.hugging_face import hugging_face
from efficientdnns.models.user_code import call_factory, load_factory
from efficientdnns.models.weights import load_weights_into
from efficientdnns.models.zoo import timm_model, torchvision_model
from efficientdnns.storage import build_hollow

if TYPE_CHECKING:
    from efficientdnns.task import Task

__all__ = ["build", "check_fits", "describe", "load_weights_into", "names", "rebuild"]

_ZOOS = {"torchvision": torchvision_model, "timm": timm_model, "hf": hugging_face}


def build(spec: str, *, num_classes: int | None = None, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Build the network that ``spec`` names and set ``model.factory``, from which a saved result is rebuilt.

    Args:
        spec: a built-in name (`names`), ``torchvision:NAME``, ``timm:NAME``, ``hf:NAME`` or ``hf:FOLDER``,
            ``path/to/file.py:factory``, ``package.module:factory``, or the folder of a saved result.
        num_classes: size of the head, for every network that has such an option.
        weights: a file for `load_weights_into`.
        options: the network's own (`describe` lists them). torchvision's and timm's networks take ``pretrained=True``;
            Hugging Face's come with their weights. See also `zoo.torchvision_model` and `hugging_face.hugging_face`.

    ``model.factory`` is ``{"spec", "options"}``, with ``"path"``, the absolute path, for a file; a network whose
    options are no JSON data gets none. Raises `ModelError` with one line for anything that cannot be built.
    """
    if weights is not None:
        # Initial values would only be overwritten; a large network would take its memory twice.
        model = build_hollow(lambda: build(spec, num_classes=num_classes, **options))
        load_weights_into(model, weights)
        return model
    prefix, _, name = spec.partition(":")
    if spec in CATALOGUE:
        model, used = _built_in(spec, CATALOGUE[spec], num_classes, options)
    elif name and prefix in _ZOOS:
        model, used = _ZOOS[prefix](name, num_classes, options)
    elif name:
        model, used = _own(spec, num_classes, options)
    elif (Path(spec) / "structure.json").is_file():
        model, used = _saved(spec, options), None
    else:
        raise ModelError(f"no model is named '{spec}'{_hint(spec)}")
    if used is not None and (recorded := _as_data(used)) is not None:
        factory: dict[str, Any] = {"spec": spec, "options": recorded}
        if spec.rpartition(":")[0].endswith(".py"):
            factory["path"] = str(Path(spec.rpartition(":")[0]).expanduser().resolve())
        model.factory = factory  # type: ignore[assignment]
    return model


def rebuild(factory: Mapping[str, Any]) -> nn.Module:
    """Build anew what ``model.factory`` records; a file that is not where ``spec`` says is looked for at ``path``."""
    spec, path = factory["spec"], factory.get("path")
    where, _, name = spec.rpartition(":")
    if path is not None and not Path(where).expanduser().is_file():
        spec = f"{path}:{name}"
    return build(spec, **factory["options"])


def names() -> list[str]:
    """The built-in networks."""
    return list(CATALOGUE)


def describe(name: str) -> str:
    """One built-in network in a line: what it is, its parameters and its options with their defaults."""
    if name not in CATALOGUE:
        raise ModelError(f"no model is named '{name}'{suggest(name, CATALOGUE)}")
    entry = CATALOGUE[name]
    parameters = sum(parameter.numel() for parameter in build_hollow(entry.factory).parameters())
    options = ", ".join(f"{key}={value!r}" for key, value in _options(entry).items())
    return f"{name}: {entry.summary} ({parameters:,} parameters; options {options})"


@torch.inference_mode()
def check_fits(model: nn.Module, task: Task) -> None:
    """One forward pass of the task's example input; the model is left as it was. A task that knows its classes only from
    the labels of its data learns their number from the network.

    Raises:
        ModelError: the input does not fit the model, the head has another number of outputs than the task classes, or a
            detector does not return detections.
        DataError: the outputs are not what the kind of task reads.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    shapes = " and ".join(str(tuple(tensor.shape)) for tensor in leaves(task.example_input))
    try:
        outputs = task.outputs(model.eval(), to_device(task.example_input, device))
    except EfficientDNNsError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"the model cannot take inputs of shape {shapes} from task '{task.name}': {lines[0]}"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    if task.kind == "detection":
        return _check_detections(outputs)
    if task.kind not in _EXPECTED or (
        task.num_classes is None and task.kind in ("classification", "language-modelling")
    ):
        return
    if not isinstance(outputs, Tensor):
        kind = type(outputs).__name__
        raise DataError(
            f"the model returns a {kind}, expected a tensor of {_EXPECTED[task.kind]}; "
            "give the task forward=, e.g. forward=lambda model, x: model(x)[0]"
        )
    if task.num_classes is None or task.kind == "feature-extraction":
        return
    dimension = -1 if task.kind == "language-modelling" else 1
    found = outputs.shape[dimension] if outputs.dim() > 1 else 1
    if task.least_classes is not None:
        task.num_classes = max(found, task.least_classes)
    if found != task.num_classes:
        raise ModelError(
            f"the model gives {found} outputs but task '{task.name}' has {task.num_classes} classes; "
            f"build it with num_classes={task.num_classes}"
        )


_EXPECTED = {
    "classification": "logits",
    "language-modelling": "logits",
    "segmentation": "logits (B, C, H, W)",
    "feature-extraction": "embeddings (B, D)",
}


def _check_detections(outputs: Any) -> None:
    first = outputs[0] if isinstance(outputs, list) and outputs else outputs
    if not isinstance(first, Mapping) or not {"boxes", "labels", "scores"} <= first.keys():
        raise ModelError(
            f"the detector returns a {type(first).__name__}; expected, in evaluation mode, a dictionary with boxes, "
            "labels and scores for each image"
        )


def __getattr__(name: str) -> Any:
    """``models.lenet5(**options)`` is ``build("lenet5", **options)``, with underscores for dashes."""
    for known in CATALOGUE:
        if known.replace("-", "_") == name:
            return partial(build, known)
    raise AttributeError(f"module 'efficientdnns.models' has no attribute '{name}'")


def _built_in(
    spec: str, entry: Entry, num_classes: int | None, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    known = _options(entry)
    for option in options:
        if option not in known:
            raise ModelError(f"model '{spec}' has no option '{option}'{suggest(option, known)}")
    used = ({} if num_classes is None else {entry.classes: num_classes}) | options
    try:
        return entry.factory(**used), used
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, EfficientDNNsError):
            raise
        raise ModelError(f"model '{spec}' cannot be built with {used}: {str(error).splitlines()[0]}") from error


def _options(entry: Entry) -> dict[str, Any]:
    return {parameter.name: parameter.default for parameter in inspect.signature(entry.factory).parameters.values()}


def _own(spec: str, num_classes: int | None, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    used = dict(options)
    if num_classes is not None and _takes(load_factory(spec, ModelError), "num_classes"):
        used["num_classes"] = num_classes
    model = call_factory(spec, used, ModelError)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model, used


def _takes(function: Any, option: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == option or p.kind is p.VAR_KEYWORD for p in parameters)


def _saved(folder: str, options: dict[str, Any]) -> nn.Module:
    from efficientdnns.result import load

    if options:
        raise ModelError(f"{folder} is a saved result and takes no options; leave out {', '.join(options)}")
    return load(folder)


def _hint(spec: str) -> str:
    if Path(spec).is_dir():
        return "; the folder holds no saved result (structure.json)"
    if spec.endswith(".py"):
        return f"; name the function or class in it, e.g. {spec}:make_model"
    return f"{suggest(spec, CATALOGUE)}, and no such folder; or write torchvision:NAME, timm:NAME, hf:NAME or file.py:factory"


def _as_data(options: dict[str, Any]) -> dict[str, Any] | None:
    """The options as JSON has them, without where weights came from (they are saved with a result), or ``None``."""
    try:
        data: dict[str, Any] = json.loads(json.dumps(options))
    except (TypeError, ValueError):
        return None
    for key in ("pretrained", "weights_backbone"):
        data.pop(key, None)
    return data
