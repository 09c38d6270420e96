"""`fit` and the step of the same name."""

from __future__ import annotations

import pytest
import torch

import efficientdnns as ed


def test_trains_in_place_and_returns_the_history(digits) -> None:
    model = ed.models.build("lenet-300-100")
    before = model.get_parameter("fc1.weight").detach().clone()
    history = ed.fit(model, digits, epochs=2, quiet=True, learning_rate=0.05, batch_size=32)
    assert [entry["epoch"] for entry in history] == [1, 2]
    assert not torch.equal(before, model.get_parameter("fc1.weight"))


def test_every_run_chooses_its_own_precision(digits) -> None:
    losses = {}
    for precision in ("no", "bf16", "no"):
        torch.manual_seed(0)
        model = ed.models.build("lenet-300-100")
        history = ed.fit(
            model, digits, epochs=3, quiet=True, learning_rate=0.05, batch_size=32, mixed_precision=precision
        )
        assert model.get_parameter("fc1.weight").dtype == torch.float32
        losses.setdefault(precision, history[-1]["loss"])
        assert history[-1]["loss"] == pytest.approx(losses["no"], rel=0.05)
    assert losses["bf16"] != losses["no"]


def test_unknown_devices_and_settings_are_refused(digits) -> None:
    model = ed.models.build("lenet-300-100")
    with pytest.raises(ed.ConfigurationError, match="device is 'tpu'"):
        ed.fit(model, digits, device="tpu", quiet=True)
    with pytest.raises(ed.ConfigurationError, match="no setting 'momentun'"):
        ed.fit(model, digits, momentun=0.5, quiet=True)
