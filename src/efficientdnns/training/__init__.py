"""The training loop that every method shares."""

from efficientdnns.training.callback import Callback
from efficientdnns.training.checkpoint import load_state, save_state
from efficientdnns.training.ema import ExponentialMovingAverage
from efficientdnns.training.schedule import factor
from efficientdnns.training.settings import TrainingSettings
from efficientdnns.training.trainer import Trainer

__all__ = [
    "Callback",
    "ExponentialMovingAverage",
    "Trainer",
    "TrainingSettings",
    "factor",
    "load_state",
    "save_state",
]
