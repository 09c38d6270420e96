"""How a training run is done where the method does not say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from efficientdnns.errors import ConfigurationError, suggest


class TrainingSettings(BaseModel):
    """Optimizer, schedule and batch of a training run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    optimizer: Literal["sgd", "nesterov", "adam", "adamw", "rmsprop"] = "sgd"
    """'sgd' and 'nesterov' use the momentum."""
    learning_rate: PositiveFloat = 0.05
    """Peak learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of 'sgd' and 'nesterov'."""
    weight_decay: NonNegativeFloat = 1e-4
    """L2 coefficient (decoupled for 'adamw')."""
    batch_size: PositiveInt = 128
    """Samples per step, over all processes."""
    schedule: Literal["constant", "cosine", "linear", "step"] = "cosine"
    """Learning rate over the run; 'step' divides by 10 at 50 % and 75 %."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the learning rate rises linearly from 0."""
    clip_norm: PositiveFloat | None = None
    """Largest global gradient norm; None does not clip."""
    augment: bool = True
    """Change training images at random as the task says; a network with few weights left may do better without."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of forward and backward passes."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = str(first["loc"][0]) if first["loc"] else ""
            if first["type"] == "extra_forbidden":
                message = f"training has no setting '{where}'{suggest(where, type(self).model_fields)}"
            else:
                expected = first["msg"].removeprefix("Input should be ")
                message = f"training: {where} is {first['input']!r}, expected {expected}"
            raise ConfigurationError(message) from None

    def override(self, **changes: Any) -> TrainingSettings:
        """A copy with the given settings changed and validated."""
        return TrainingSettings(**{**self.model_dump(), **changes})
