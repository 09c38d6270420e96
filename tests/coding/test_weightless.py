"""Weightless: layers that were stored with errors, the rest retrained around them, and the file that holds them."""

from __future__ import annotations

import pytest
import torch

import efficientdnns as ed
from efficientdnns.coding.weightless import Frozen, Weightless
from efficientdnns.measurement.size import nonzero_parameters
from efficientdnns.session import Session

QUICK = {"prune_rounds": 1, "prune_epochs": 1, "retrain_epochs": 1, "learning_rate": 0.01}


def compress(model, task, methods, **options):
    return ed.compress(model, task, methods, quiet=True, latency=False, **options)


def test_large_layer_is_stored_with_the_expected_errors_and_loads_to_the_bit(trained, digits, tmp_path) -> None:
    result = compress(trained, digits, [Weightless(sparsity=0.98, **QUICK)])
    finding = result.report.methods[0].findings
    assert list(finding["layers"]) == ["fc1.weight"]
    entry = finding["layers"]["fc1.weight"]
    assert entry["nonzero"] == 8000
    expected = entry["false_positives_expected"]
    clusters = len(result.model.fc1.weight.unique()) - 1  # some of the 16 can be empty
    assert 2 < clusters <= 16
    assert expected == pytest.approx(392_000 * clusters / 256)
    assert abs(entry["false_positives"] - expected) < 5 * expected**0.5
    assert entry["bytes"] == pytest.approx(1.25 * 8000 + 30 + 4 * clusters, abs=15)
    assert entry["bytes_exact"] <= entry["bytes_deep_compression"]
    weight = result.model.fc1.weight
    assert int(weight.count_nonzero()) == 8000 + entry["false_positives"]
    assert finding["accuracy"].keys() == {"pruned", "fc1.weight encoded", "fc1.weight retrained"}
    result.save(tmp_path / "out")
    sizes = {
        info.name: (info.codec, info.bytes)
        for info in ed.coding.describe_weights(tmp_path / "out" / "model.safetensors")
    }
    assert sizes["fc1.weight"] == ("weightless", entry["bytes"])
    assert torch.equal(ed.load(tmp_path / "out").fc1.weight, weight)


def test_several_layers_in_order_each_left_as_it_was_decoded(trained, digits) -> None:
    method = Weightless(sparsity=0.9, layers=("conv2", "fc1"), **QUICK)
    result = compress(trained, digits, [method])
    entries = result.report.methods[0].findings["layers"]
    assert list(entries) == ["conv2.weight", "fc1.weight"]
    for name, entry in entries.items():
        weight = result.model.get_parameter(name)
        assert int(weight.count_nonzero()) == entry["nonzero"] + entry["false_positives"], "retraining left it alone"


def test_frozen_weights_do_not_move_and_move_again_later(trained, digits) -> None:
    session = Session(trained, digits, trained)
    before = trained.fc1.weight.detach().clone()
    session.train([Frozen(["fc1.weight"])], epochs=1, learning_rate=0.05)
    assert torch.equal(session.model.fc1.weight, before)
    session.train(epochs=1, learning_rate=0.05)
    assert not torch.equal(session.model.fc1.weight, before)


def test_weights_that_a_later_step_changed_are_coded_exactly(trained, digits, tmp_path) -> None:
    result = compress(trained, digits, [Weightless(**QUICK), ed.Fit(epochs=1, learning_rate=0.01)])
    result.save(tmp_path / "out")
    assert torch.equal(ed.load(tmp_path / "out").fc1.weight, result.model.fc1.weight)


def test_meets_a_budget_with_its_false_positives(trained, digits) -> None:
    result = compress(trained, digits, [Weightless(**QUICK)], budget="params=0.5")
    assert 0.48 * nonzero_parameters(trained) < nonzero_parameters(result.model) <= 0.5 * nonzero_parameters(trained)


def test_refuses_what_cannot_work(trained, digits) -> None:
    with pytest.raises(ed.ConfigurationError, match="leave no answer for 'zero' in 4 bits"):
        compress(trained, digits, [Weightless(bits=4, clusters=16)])
    with pytest.raises(ed.ConfigurationError, match="layers: no layer is called 'fc9'"):
        compress(trained, digits, [Weightless(layers=("fc9",))])
    with pytest.raises(ed.ConfigurationError, match=r"c is 1\.0"):
        Weightless(c=1.0)
