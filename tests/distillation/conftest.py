"""A teacher that is trained in a fraction of a second."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from efficientdnns.fit import fit
from efficientdnns.models import build
from efficientdnns.session import Session
from efficientdnns.task import Task


@pytest.fixture(scope="session")
def _teacher(digits: Task) -> nn.Module:
    torch.manual_seed(0)
    model = build("mlp", hidden=[64, 48])
    fit(model, digits, epochs=12, quiet=True, learning_rate=0.1, batch_size=64)
    return model.eval()


@pytest.fixture
def teacher(_teacher: nn.Module) -> nn.Module:
    """A perceptron 784-64-48-10 that has seen the digits."""
    return copy.deepcopy(_teacher)


@pytest.fixture
def session(teacher: nn.Module, digits: Task) -> Any:
    """Makes sessions: ``session(model=None, task=None)`` with the teacher as the original."""

    def make(model: nn.Module | None = None, task: Task | None = None, **options: Any) -> Session:
        return Session(
            model=copy.deepcopy(model or teacher), task=task or digits, original=copy.deepcopy(teacher), **options
        )

    return make
