"""Times of layers in integers and in real numbers."""

from __future__ import annotations

import copy

import pytest

import efficientdnns as ed
from efficientdnns.deployment.int8_latency import LayerLatency, layer_latencies, slower_layers
from efficientdnns.quantization import int8_quantization
from efficientdnns.quantization.int8_quantization import Int8Quantization
from efficientdnns.session import Session

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_slower_means_beyond_noise_and_resolution() -> None:
    times = [
        LayerLatency("faster", 0.050, 0.020),
        LayerLatency("slower", 0.020, 0.060),
        LayerLatency("within noise", 1.000, 1.020),
        LayerLatency("within the profiler's resolution", 0.004, 0.006),
    ]
    assert slower_layers(times) == ["slower"]


def test_every_integer_layer_has_both_times(digits) -> None:
    session = Session(model=ed.models.build("small-resnet"), task=digits, original=ed.models.build("small-resnet"))
    Int8Quantization(calibration_samples=32).apply(session)
    times = layer_latencies(session.model.eval(), digits.example_input, threads=1, repeats=3)
    names = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "linear"]
    assert [layer.name for layer in times] == names
    assert all(layer.real_ms > 0 and layer.int8_ms > 0 for layer in times)


@pytest.mark.parametrize(("field", "budget"), [({"skip_slower": True}, None), ({}, "latency=0.9"), ({}, None)])
def test_slower_layers_stay_real_where_asked(digits, trained, monkeypatch, field, budget) -> None:
    monkeypatch.setattr(int8_quantization, "layer_latencies", lambda *a, **k: [LayerLatency("conv2", 0.1, 0.3)])
    session = Session(model=copy.deepcopy(trained), task=digits, original=trained, label="int8-quantization")
    if budget:
        session.budget = ed.Budget.parse(budget)
    Int8Quantization(calibration_samples=32, **field).apply(session)
    found = session.findings["int8-quantization"]
    asked = bool(field or budget)
    assert ("conv2" in found["left_real"]) == asked
    assert found.get("slower", {}) == ({"conv2": [0.1, 0.3]} if asked else {})
