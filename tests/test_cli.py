"""The command line as a newcomer meets it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import efficientdnns as ed
from efficientdnns.cli import app, main


def invoke(*arguments: str, capsys=None, monkeypatch=None):
    """Run `main` as the console script does and return (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["efficientdnns", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def cli(capsys, monkeypatch):
    return lambda *arguments: invoke(*map(str, arguments), capsys=capsys, monkeypatch=monkeypatch)


def test_methods_as_json(cli) -> None:
    code, out, _ = cli("methods", "--json")
    cards = json.loads(out)
    assert code == 0
    assert {"id", "name", "kind", "title", "authors", "venue", "year", "url", "needs", "fields"} <= cards[0].keys()
    assert len(cards) >= 16
    assert {c["kind"] for c in json.loads(cli("methods", "--kind", "pruning", "--json")[1])} == {"pruning"}


def test_show_prints_the_card(cli) -> None:
    code, out, _ = cli("show", "nisp")
    assert code == 0
    assert "arxiv.org" in out
    assert "pruning_ratio" in out


def test_compress_resume_measure_and_load(cli, tmp_path) -> None:
    base = tmp_path / "dense"
    code, out, err = cli("fit", "--model", "lenet5", "--task", "digits", "--epochs", 1, "--out", base, "--quiet")
    assert code == 0, err
    out_dir = tmp_path / "small"
    code, out, err = cli(
        *("compress", "--model", base, "--task", "digits", "--method", "nisp", "--budget", "macs=0.5"),
        *("--out", out_dir, "--quiet", "--training", "learning_rate=0.02"),
    )
    assert code == 0, err
    assert "MACs" in out
    report = json.loads((out_dir / "report.json").read_text())
    assert report["schema_version"] == 1
    assert report["after"]["macs"] <= 0.5 * report["before"]["macs"]
    assert report["budget"][0]["met"]
    assert not (out_dir / ".checkpoints").exists()
    code, out, _ = cli("measure", out_dir, "--task", "digits", "--json")
    assert json.loads(out)["macs"] == report["after"]["macs"]
    assert json.loads(out)["metric"]["value"] == report["after"]["metric"]["value"]
    assert isinstance(ed.load(out_dir), torch.nn.Module)


FACTORY = """
import torch
from torch import nn
def net(num_classes=3):
    head = nn.Linear(8 * 7 * 7, num_classes)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), head)
"""


def test_a_network_and_a_data_folder_of_the_users_own(cli, tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(("cats", "dogs", "owls")):
        for split, count in (("train", 24), ("test", 8)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (torch.rand(16, 16, 3, generator=generator) * 60 + 80 * label).byte().numpy()
                image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "net.py").write_text(FACTORY)
    out = tmp_path / "out"
    code, _, err = cli(
        *(
            "compress",
            "--model",
            f"{tmp_path}/net.py:net",
            "--task",
            tmp_path / "data",
            "--method",
            "fit:epochs=12,batch_size=16",
        ),
        *("--method", "nisp:pruning_ratio=0.5", "--method", "fit:epochs=1", "--out", out, "--quiet"),
        *("--runtimes", "eager"),
    )
    assert code == 0, err
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["params"] < 0.6 * report["before"]["params"]
    assert report["after"]["metric"]["value"] > 60
    assert ed.load(out)(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lenet5", "--task", "digits", "--method", "nips"], "did you mean 'nisp'"),
        (["--model", "lenet5", "--task", "digits", "--method", "nisp:pruning_ratio=2"], "pruning_ratio is 2"),
        (["--model", "lenet5", "--task", "digits", "--method", "nisp:ratio=0.2"], "no field 'ratio'"),
        (["--model", "lenet6", "--task", "digits", "--method", "nisp"], "did you mean 'lenet5'"),
        (["--model", "lenet5", "--task", "digit", "--method", "nisp"], "digits"),
        (
            ["--model", "lenet5", "--task", "digits", "--method", "nisp", "--weights", "nowhere.safetensors"],
            "nowhere.safetensors",
        ),
        (
            ["--model", "lenet5", "--task", "digits", "--method", "nisp", "--budget", "mac=1"],
            "no budget is called 'mac'",
        ),
        (
            ["--model", "lenet5", "--task", "digits", "--method", "lsuv", "--budget", "macs=0.5"],
            "budget 'macs' cannot be solved",
        ),
        (["--model", "nowhere.py:net", "--task", "digits", "--method", "nisp"], "nowhere.py"),
        (["--model", "cifar-resnet20", "--task", "digits", "--method", "nisp"], "1"),
        (["--model", "lenet5", "--task", "digits", "--method", "nisp", "--device", "tpu"], "device is 'tpu'"),
        (["--model", "lenet5", "--task", "digits", "--method", "nisp", "--threads", "0"], "threads is 0"),
    ],
)
def test_user_errors_are_one_line_with_exit_code_2_and_nothing_written(cli, tmp_path, arguments, message) -> None:
    out = tmp_path / "out"
    code, _, err = cli("compress", *arguments, "--out", out)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    assert not out.exists()


def test_recipe_errors(cli, tmp_path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: lenet5\ntask: digits\nmethods:\n  - nips\n")
    code, _, err = cli("run", recipe, "--out", tmp_path / "out")
    assert code == 2
    assert "line 4" in err
    code, _, err = cli("run", tmp_path / "no.yaml", "--out", tmp_path / "out")
    assert code == 2
    assert "no.yaml" in err


def test_help_lists_the_verbs() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    for verb in ("methods", "show", "fit", "compress", "run", "measure", "reproduce"):
        assert verb in text


def test_python_dash_m_works() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "efficientdnns", "methods"], capture_output=True, text=True, check=True
    ).stdout
    assert "nisp" in out
