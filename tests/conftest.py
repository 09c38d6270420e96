"""Fixtures of all tests: one thread, a small task, a small trained network."""

from __future__ import annotations

import copy
import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of minutes run only with ``-m long``."""
    if "long" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """What is there by now stays: the garbage collector need not walk through all of PyTorch in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits():
    """Digits with few samples: enough to learn something in a second."""
    from efficientdnns.task import Task

    return Task.from_name("digits", limit=512, evaluation_limit=200)


@pytest.fixture(scope="session")
def _trained(digits) -> nn.Module:
    import efficientdnns as ed

    torch.manual_seed(0)
    model = ed.models.build("lenet5")
    ed.fit(model, digits, epochs=6, quiet=True, learning_rate=0.05, batch_size=32)
    return model


@pytest.fixture
def trained(_trained: nn.Module) -> nn.Module:
    """A LeNet-5 that has seen the digits."""
    return copy.deepcopy(_trained)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with the real data sets; tests that ask for it are skipped where there is none."""
    folder = os.environ.get("EFFICIENTDNNS_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("EFFICIENTDNNS_DATA is not set")
    return Path(folder)
