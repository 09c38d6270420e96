"""Recipes: YAML as data, read with the line number of whatever is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from efficientdnns.budget import Budget
from efficientdnns.errors import ConfigurationError, EfficientDNNsError, suggest
from efficientdnns.method import Method, Together, TrainingMethod, get
from efficientdnns.training import TrainingSettings

SCHEMA_VERSION = 1
T = TypeVar("T")
KEYS = ("schema", "model", "task", "methods", "training", "budget", "seed", "description")


@dataclass
class Recipe:
    """One run as data: a model, a task and the methods, in order."""

    model: dict[str, Any]
    task: dict[str, Any]
    methods: list[Method]
    training: TrainingSettings = field(default_factory=TrainingSettings)
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    description: str = ""

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            ConfigurationError: with the file, the line, what is wrong and what was expected.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigurationError(f"there is no recipe {path}; give the path of a YAML file")
        return cls.parse(path.read_text(), str(path))

    @classmethod
    def parse(cls, text: str, source: str = "recipe") -> Recipe:
        """Read a recipe from text; ``source`` names it in errors."""
        return cls.from_node(compose(text, source), source)

    def as_data(self) -> dict[str, Any]:
        """The recipe as plain data: what was stated, without the defaults. `text` of it can be run again."""
        data: dict[str, Any] = {"description": self.description} if self.description else {}
        data |= {key: _short(value) for key, value in (("model", self.model), ("task", self.task))}
        data |= {"seed": self.seed}
        data |= {"budget": limits} if (limits := self.budget.as_data()) else {}
        data |= {"training": stated} if (stated := self.training.model_dump(exclude_unset=True)) else {}
        data["methods"] = [_stated(method) for method in self.methods]
        return json.loads(json.dumps(data, default=lambda value: type(value).__name__))

    @classmethod
    def from_node(cls, node: yaml.Node | None, source: str) -> Recipe:
        """Read a recipe from a composed YAML node."""
        top = _mapping(node, source, "a recipe is a mapping with the keys model, task and methods")
        for key in top:
            if key not in KEYS:
                raise ConfigurationError(
                    f"{source} line {top[key][0]}: a recipe has no key '{key}'{suggest(key, KEYS)}"
                )
        for key in ("model", "task", "methods"):
            if key not in top:
                raise ConfigurationError(
                    f"{source} line {_line(node)}: the recipe lacks '{key}'; write e.g. {_EXAMPLES[key]}"
                )
        plain = {key: construct(value) for key, (_, value) in top.items() if key != "methods"}
        if (version := plain.get("schema", SCHEMA_VERSION)) != SCHEMA_VERSION:
            raise ConfigurationError(f"{source}: recipe schema {version} is not known, expected {SCHEMA_VERSION}")
        if not isinstance(plain.get("seed", 0), int):
            raise ConfigurationError(
                f"{source} line {top['seed'][0]}: seed is {plain['seed']!r}, expected a whole number"
            )
        training = _located(source, top.get("training"), lambda: TrainingSettings(**plain.get("training", {})))
        budget = _located(source, top.get("budget"), lambda: _budget(plain.get("budget", {})))
        return cls(
            model=_named(plain["model"], source, top["model"][0], "model"),
            task=_named(plain["task"], source, top["task"][0], "task"),
            methods=parse_methods(top["methods"][1], source),
            training=training,
            budget=budget,
            seed=plain.get("seed", 0),
            description=plain.get("description", ""),
        )


def text(recipe: dict[str, Any]) -> str:
    """A recipe as data (`Recipe.as_data`) in YAML, the fields of a method on one line where they fit."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _short(value: dict[str, Any]) -> Any:
    return value["name"] if value.keys() == {"name"} else value


def _stated(method: Method) -> Any:
    """A method as a recipe writes it."""
    if isinstance(method, Together):
        return {"together": [_stated(member) for member in method.methods]}
    stated = {key: value for key, value in method.fields_as_data().items() if key in method.model_fields_set}
    return {method.name: stated} if stated else method.name


class Loader(yaml.SafeLoader):
    """YAML without base-60 numbers: 2:4 is text, not 124."""


Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_INTEGER = r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"
_FLOAT = (
    r"([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(_INTEGER), list("-+0123456789"))
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def compose(text: str, source: str) -> yaml.Node | None:
    """The YAML node of a text, with one line on what is not YAML."""
    try:
        return yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigurationError(
            f"{source}{line}: this is no YAML ({getattr(error, 'problem', None) or error})"
        ) from None


def construct(node: yaml.Node) -> Any:
    """The plain value of a node; nothing but data can come out of it."""
    loader = Loader("")
    try:
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigurationError(f"{line}a recipe holds plain data only ({getattr(error, 'problem', error)})") from None


def parse_methods(node: yaml.Node, source: str) -> list[Method]:
    """Read the list of methods."""
    if not isinstance(node, yaml.SequenceNode):
        raise ConfigurationError(
            f"{source} line {_line(node)}: methods is a list; write one '- METHOD: {{field: value}}' a line"
        )
    return [_method(item, source) for item in node.value]


def parse_method_text(text: str) -> Method:
    """Read ``ID[:field=value,...]`` as the command line gives it; ``A:x=1+B:y=2`` share one training run."""
    members = [_parse_one(part) for part in text.split("+") if part.strip()]
    if not members:
        raise ConfigurationError("a method is empty; write ID[:field=value,...]")
    return members[0] if len(members) == 1 else _together(members)


def _parse_one(text: str) -> Method:
    name, _, rest = text.strip().partition(":")
    fields: dict[str, Any] = {}
    pieces: list[str] = []
    for piece in filter(None, rest.split(",")):
        # A comma inside a list or mapping belongs to the value before it.
        if pieces and any(pieces[-1].count(a) > pieces[-1].count(b) for a, b in ("[]", "{}")):
            pieces[-1] += "," + piece
        else:
            pieces.append(piece)
    for piece in pieces:
        key, equals, value = piece.partition("=")
        if not equals:
            raise ConfigurationError(f"{name}: '{piece}' is not field=value; write e.g. {name}:{key}=0.5")
        fields[key.strip()] = construct(node) if (node := compose(value, f"{name}: {key}")) is not None else None
    return get(name.strip())(**fields)


def _method(node: yaml.Node, source: str) -> Method:
    value: yaml.Node | None
    if isinstance(node, yaml.ScalarNode):
        name, value = node.value, None
    elif isinstance(node, yaml.MappingNode) and len(node.value) == 1:
        name, value = node.value[0][0].value, node.value[0][1]
    else:
        raise ConfigurationError(
            f"{source} line {_line(node)}: a method is one key with its fields; write '- METHOD: {{field: value}}'"
        )

    def build() -> Method:
        if name == "together":
            if not isinstance(value, yaml.SequenceNode):
                raise ConfigurationError("together holds a list of methods that share one training run")
            return _together([_method(item, source) for item in value.value])
        fields = construct(value) if value is not None else {}
        if fields is None:
            fields = {}
        if not isinstance(fields, dict):
            raise ConfigurationError(f"the fields of {name} are {fields!r}, expected a mapping such as {{epochs: 3}}")
        return get(name)(**fields)

    return _located(source, (_line(node), node), build)


def _together(members: Sequence[Method]) -> Method:
    training: list[TrainingMethod] = []
    for member in members:
        if not isinstance(member, TrainingMethod):
            raise ConfigurationError(
                f"{member.name} does not act during training and cannot share a run; give it a step of its own"
            )
        training.append(member)
    return Together(methods=tuple(training))


def _mapping(node: yaml.Node | None, source: str, expected: str) -> dict[str, tuple[int, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigurationError(f"{source} line {_line(node)}: this is no recipe; {expected}")
    return {str(key.value): (_line(key), value) for key, value in node.value}


def _named(value: Any, source: str, line: int, what: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return value
    raise ConfigurationError(f"{source} line {line}: {what} is {value!r}, expected a name or a mapping with a name")


def _budget(value: Any) -> Budget:
    if isinstance(value, str):
        return Budget.parse(value)
    if not isinstance(value, dict):
        raise ConfigurationError(f"budget is {value!r}, expected a mapping such as {{macs: 0.5}}")
    return Budget(**value)


def _located(source: str, where: tuple[int, Any] | None, build: Callable[[], T]) -> T:
    try:
        return build()
    except EfficientDNNsError as error:
        message = str(error)
        if where is None or message.startswith(source):
            raise
        raise type(error)(f"{source} line {where[0]}: {message}") from None
    except TypeError as error:
        raise ConfigurationError(f"{source} line {where[0] if where else 1}: {error}") from None


def _line(node: yaml.Node | None) -> int:
    return node.start_mark.line + 1 if node is not None else 1


_EXAMPLES = {"model": "model: lenet5", "task": "task: mnist", "methods": "methods: [nisp: {pruning_ratio: 0.5}]"}
