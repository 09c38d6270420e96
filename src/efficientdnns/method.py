"""What a method is: a frozen, validated description with a paper card, plus `apply(session)`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails

from efficientdnns.errors import ConfigurationError, DataError, suggest

if TYPE_CHECKING:
    from efficientdnns.session import Session
    from efficientdnns.training import Callback

KINDS = (
    "pruning",
    "coding",
    "quantization",
    "decomposition",
    "distillation",
    "redesign",
    "search",
    "optimization",
    "distributed",
    "synthesis",
    "interpretation",
    "applications",
)
_REGISTRY: dict[str, type[Method]] = {}

Need = Literal["labels", "training data", "calibration data", "teacher"]

Ratio = Annotated[float, Field(ge=0, lt=1)]
"""A share in [0, 1)."""
Network = Annotated[Any, WithJsonSchema({"type": "string"})]
"""A network named as on the command line (``cifar-resnet56``, a saved result, ``file.py:factory``) or an ``nn.Module``."""


class Paper(BaseModel):
    """Where a method comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    title: str
    authors: str
    venue: str
    year: int
    url: str


class Method(BaseModel):
    """A published method: its fields are the paper's hyperparameters, its defaults the paper's values.

    A subclass that carries a ``paper`` registers itself under the paper's id; a subclass without a paper (such as plain
    training) registers when it sets ``name``. ``needs`` lists what must be there before work starts.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )

    paper: ClassVar[Paper | None] = None
    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    budgets: ClassVar[frozenset[str]] = frozenset()
    """Budget limits that the method can solve for: of ``macs``, ``params``, ``bytes``, ``latency``."""
    in_place: ClassVar[bool] = True
    """Whether ``apply`` may write into the network's tensors. A method that only puts new tensors or modules in their
    places, or writes after `Session.train` alone, says False: the network then keeps sharing memory with the original."""
    contract_fields: ClassVar[dict[str, Any]] = {}
    """Small values with which the contract tests run the method on digits in seconds."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigurationError(_one_line(type(self), error.errors()[0])) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "paper" in cls.__dict__ and cls.paper is not None and "name" not in cls.__dict__:
            cls.name = cls.paper.id
        if cls.__dict__.get("name"):
            _REGISTRY[cls.name] = cls

    @property
    def solves(self) -> frozenset[str]:
        """Of ``budgets`` those that can be solved for with these fields; some fields leave more or less to choose."""
        return self.budgets

    def check(self, session: Session) -> None:
        """Raise before any work starts if the session lacks what the method needs. Extend it, do not replace it."""
        task = session.task
        if "labels" in self.needs and not (task.train is not None and task.train.has_labels):
            raise DataError(f"{self.name} needs labelled training data, but task '{task.name}' has none; give targets")
        if "training data" in self.needs and task.train is None:
            raise DataError(f"{self.name} needs training data, but task '{task.name}' has none; give a train split")
        if "calibration data" in self.needs and task.calibration is None:
            raise DataError(f"{self.name} needs calibration inputs, but task '{task.name}' has none")

    def check_network(self, session: Session) -> None:
        """Raise what the network itself tells: names that fit no layer, a budget out of reach.

        Called before any work, but only where the steps before this one leave the structure alone.
        """

    def apply(self, session: Session) -> None:
        """Do the work: change ``session.model``, train through ``session.train``, report through ``session.report``."""
        raise ConfigurationError(f"{self.name} is abstract and cannot be applied")

    def fields_as_data(self) -> dict[str, Any]:
        """The fields as plain data, as they stand in a recipe and in ``report.json``."""
        return {
            key: value
            if isinstance(value, str | int | float | bool | list | dict | tuple | None)
            else type(value).__name__
            for key, value in self.model_dump().items()
        }


class TrainingMethod(Method):
    """A method that acts during training, through a `Callback` that lives for one training run.

    Several of them can share one run (`Together`). Fields left at None take the session's training settings.
    """

    epochs: NonNegativeInt = 10
    """Epochs of the training run."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate."""
    batch_size: PositiveInt | None = None
    """Samples per step, over all processes."""
    optimizer: Literal["sgd", "nesterov", "adam", "adamw", "rmsprop"] | None = None
    """Optimizer of the run."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """L2 coefficient of the optimizer."""
    schedule: Literal["constant", "cosine", "linear", "step"] | None = None
    """Learning-rate schedule over the run; 'step' divides by 10 at 50 % and 75 %."""
    augment: bool | None = None
    """Change training images at random as the task says."""

    needs: ClassVar[frozenset[Need]] = frozenset({"training data", "labels"})

    def prepare(self, session: Session) -> None:
        """Change the model before the run (build a student, initialise it); called before any callback is made."""

    def callback(self, session: Session) -> Callback:
        """The part that lives through the run; it holds all state."""
        raise ConfigurationError(f"{self.name} has no callback")

    @property
    def total_epochs(self) -> int:
        """Epochs the method needs, all phases together."""
        return self.epochs

    def afterwards(self, session: Session) -> None:
        """What follows the run, once the network is what the method made of it: fine-tuning after a cut, say."""

    def settings(self) -> dict[str, Any]:
        """The training settings that this method fixes."""
        names = ("learning_rate", "batch_size", "optimizer", "weight_decay", "schedule", "augment")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def apply(self, session: Session) -> None:
        train_together(session, [self])


class Together(Method):
    """Several training methods that share one training run, for example distillation while pruning.

    The run lasts as long as its longest member; a setting is taken from the first member that fixes it.
    """

    name: ClassVar[str] = "together"
    kind: ClassVar[str] = "training"

    methods: tuple[TrainingMethod, ...]
    """The members."""

    def check(self, session: Session) -> None:
        for method in self.methods:
            method.check(session)

    def check_network(self, session: Session) -> None:
        for method in self.methods:
            method.check_network(session)

    def apply(self, session: Session) -> None:
        train_together(session, self.methods)

    def fields_as_data(self) -> dict[str, Any]:
        return {"methods": [{method.name: method.fields_as_data()} for method in self.methods]}


def train_together(session: Session, methods: Iterable[TrainingMethod]) -> None:
    """Run one training run in which every method acts through its callback."""
    methods = list(methods)
    for method in methods:
        method.prepare(session)
    settings: dict[str, Any] = {}
    for method in methods:
        settings = {**method.settings(), **settings}
    callbacks = [method.callback(session) for method in methods]
    session.train(callbacks, epochs=max(method.total_epochs for method in methods), **settings)
    for method in methods:
        method.afterwards(session)


def registered() -> dict[str, type[Method]]:
    """Every method by id, papers and built-in steps alike."""
    return dict(sorted(_REGISTRY.items()))


def methods(kind: str | None = None) -> list[type[Method]]:
    """The published methods, optionally of one kind, in the order of their ids."""
    if kind is not None and kind not in KINDS:
        raise ConfigurationError(f"no kind of method is called '{kind}'{suggest(kind, KINDS)}")
    return [m for m in registered().values() if m.paper is not None and kind in (None, m.kind)]


def get(name: str) -> type[Method]:
    """The method registered under ``name``; raises with the nearest names otherwise."""
    if name not in _REGISTRY:
        raise ConfigurationError(f"no method is called '{name}'{suggest(name, _REGISTRY)}")
    return _REGISTRY[name]


def card(method: type[Method]) -> dict[str, Any]:
    """The machine-readable paper card of a method: what `efficientdnns methods --json` prints for each."""
    assert method.paper is not None
    return {
        **method.paper.model_dump(include={"id", "title", "authors", "venue", "year", "url"}),
        "name": method.__name__,
        "kind": method.kind,
        "needs": sorted(method.needs),
        "fields": list(fields(method)),
        "doc": inspect.getdoc(method) or "",
    }


def fields(method: type[Method]) -> Iterator[dict[str, Any]]:
    """Name, type, range, default and meaning of each field."""
    schema = method.model_json_schema()["properties"] if method.model_fields else {}
    shared = TrainingMethod.model_fields.keys() - method.__annotations__.keys()
    for name, info in sorted(method.model_fields.items(), key=lambda item: item[0] in shared):  # its own fields first
        entry = schema.get(name, {})
        variants = [v for v in entry.get("anyOf", [entry]) if v.get("type") != "null"]
        first = variants[0] if variants else {}
        limits = {"minimum": ">= ", "exclusiveMinimum": "> ", "maximum": "<= ", "exclusiveMaximum": "< "}
        bounds = [text + f"{first[key]:g}" for key, text in limits.items() if key in first]
        if "enum" in first or "const" in first:
            bounds = ["one of " + ", ".join(map(str, first.get("enum", [first.get("const")])))]
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        yield {
            "name": name,
            "type": " | ".join(dict.fromkeys(v.get("type", "any") for v in variants)),
            "range": " and ".join(bounds),
            "default": "required" if info.is_required() else default,
            "description": (info.description or "").strip(),
        }


def _one_line(method: type[Method], error: ErrorDetails) -> str:
    label = method.name or method.__name__
    where = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return f"{label} has no field '{where}'{suggest(where, method.model_fields)}"
    if error["type"] == "missing":
        return f"{label} needs the field '{where}'; write {label}:{where}=..."
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    default = method.model_fields[where].default if where in method.model_fields else None
    example = f"; the default is {default}" if isinstance(default, int | float | str) else ""
    return f"{label}: {where} is {error['input']!r}, expected {expected}{example}"
