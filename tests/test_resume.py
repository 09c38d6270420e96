"""A run that is killed at any moment is resumed by the same command and ends with the same result."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

import efficientdnns as ed

RECIPE = """\
model: lenet-300-100
task: {name: digits, limit: 300, evaluation_limit: 100}
methods:
  - fit: {epochs: 3}
  - together:
      - knowledge-distillation: {epochs: 2}
      - admm-pruning: {sparsity: 0.8, epochs: 4, retrain_epochs: 3, every: 1}
  - nisp: {pruning_ratio: 0.3, epochs: 2}
"""


def command(recipe, out, *options):
    return [
        sys.executable,
        "-m",
        "efficientdnns",
        "run",
        str(recipe),
        "--out",
        str(out),
        "--quiet",
        "--threads",
        "1",
        *options,
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of the run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(RECIPE)
    subprocess.run(command(folder / "recipe.yaml", folder / "out"), check=True, stdout=subprocess.DEVNULL)
    return folder / "out"


@pytest.mark.parametrize("run", ["run-001", "run-002", "run-003"])
def test_kill_and_resume(run, whole, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    process = subprocess.Popen(command(recipe, tmp_path / "out"), stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "out" / ".checkpoints" / f"{run}.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "out" / "report.json").exists()
    subprocess.run(command(recipe, tmp_path / "out", "--resume"), check=True, stdout=subprocess.DEVNULL)
    for file in ("model.safetensors", "structure.json"):
        assert (tmp_path / "out" / file).read_bytes() == (whole / file).read_bytes()
    assert not (tmp_path / "out" / ".checkpoints").exists()


def test_checkpoints_of_another_recipe_are_refused(tmp_path) -> None:
    folder = tmp_path / "out" / ".checkpoints"
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text("another")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(ed.ConfigurationError, match="checkpoints of another recipe"):
        ed.run(ed.Recipe.load(recipe), tmp_path / "out", resume=True)
