"""Networks that a method's fields name: teachers and students."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from efficientdnns.errors import ConfigurationError
from efficientdnns.models import build, names

if TYPE_CHECKING:
    from efficientdnns.session import Session


def network(description: Any, num_classes: int | None = None) -> nn.Module:
    """The network that a field describes.

    ``description`` is a name as on the command line, a mapping with ``name``, the network's options and optionally
    ``weights`` (a file), or an ``nn.Module``, which is copied. ``num_classes`` sizes the head of a network that is
    built.

    Raises `ConfigurationError` if it is none of these, and what `efficientdnns.models.build` raises.
    """
    if isinstance(description, nn.Module):
        return copy.deepcopy(description)
    if isinstance(description, str):
        description = {"name": description}
    if not isinstance(description, Mapping) or not isinstance(description.get("name"), str):
        raise ConfigurationError(f"{description!r} is no network; write a name or {{name: NAME, option: value}}")
    options = {"num_classes": num_classes, **{key: value for key, value in description.items() if key != "name"}}
    return build(description["name"], **options)


def student_network(session: Session, description: Any) -> nn.Module:
    """The student that a field describes on the session's device; None is the session's own network."""
    if description is None:
        return session.model
    return network(description, session.task.num_classes).to(session.device)


def teacher_network(session: Session, description: Any = "original") -> nn.Module:
    """The frozen teacher that a field describes, in evaluation mode; ``original`` is the network before compression."""
    if isinstance(description, str) and description == "original":
        return session.teacher()
    check_trained(description)
    return session.teacher(network(description, session.task.num_classes))


def check_trained(description: Any) -> None:
    """Raise `ConfigurationError` where a teacher would be a freshly initialised network."""
    options = dict(description) if isinstance(description, Mapping) else {"name": description}
    name = options.get("name")
    fresh = isinstance(name, str) and (name in names() or name.startswith(("torchvision:", "timm:")))
    if fresh and not (options.get("weights") or options.get("pretrained")):
        raise ConfigurationError(
            f"teacher '{name}' would be untrained; write {{name: {name}, weights: FILE}}, a saved result or 'original'"
        )
