"""The recipes under recipes/compare: they can be read, and every arm spends the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import efficientdnns as ed

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "recipes" / "compare").glob("*.yaml"))


def comparison():
    spec = importlib.util.spec_from_file_location("comparison", ROOT / "benchmarks" / "comparison.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_arm_has_the_same_allowance_and_budget(path) -> None:
    arms, seeds = comparison().recipes(path)
    assert len(seeds) >= 3
    assert {"magnitude (control)", "random (control)", "from scratch (control)"} <= arms.keys()
    assert len({str(recipe.budget) for recipe in arms.values()}) == 1
    assert len({str(recipe.task) for recipe in arms.values()}) == 1


def test_an_arm_that_trains_longer_is_refused(tmp_path) -> None:
    path = tmp_path / "unfair.yaml"
    path.write_text(
        "model: lenet5\ntask: digits\nseeds: [0]\nepochs: 2\narms:\n"
        "  fair: [prune-channels: {retrain_epochs: 2}]\n  longer: [prune-channels: {epochs: 2, retrain_epochs: 1}]\n"
    )
    with pytest.raises(ed.ConfigurationError, match="'longer' trains 3 epochs, the allowance is 2"):
        comparison().recipes(path)


def test_runs_every_arm_and_sets_them_side_by_side(tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: lenet-300-100\ntask: {name: digits, limit: 100, evaluation_limit: 50}\nbudget: {params: 0.5}\n"
        "seeds: [0, 1]\nepochs: 1\narms:\n"
        "  magnitude: [prune-weights, fit: {epochs: 1}]\n  from scratch: [prune-weights, reinitialise, fit: {epochs: 1}]\n"
    )
    monkeypatch.setattr("sys.argv", ["comparison", str(path), "--out", str(tmp_path / "runs"), "--markdown"])
    comparison().main()
    shown = capsys.readouterr().out
    assert "| magnitude |" in shown
    assert "| from scratch |" in shown
    assert (tmp_path / "runs" / "compare.html").is_file()
    assert (tmp_path / "runs" / "from-scratch-1" / "model.onnx").is_file()
