"""Results: the files that come with them, exporting a saved one, the one check, training on."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

import efficientdnns as ed
from efficientdnns.cli import main
from efficientdnns.deployment import check_result
from efficientdnns.deployment.inputs import describe, noise
from efficientdnns.deployment.saved import export_saved
from efficientdnns.errors import ConfigurationError, ModelError
from efficientdnns.result import Report


@pytest.fixture(scope="module")
def result(_trained, digits):
    return ed.compress(_trained, digits, [ed.NISP(pruning_ratio=0.5)], quiet=True, latency=False)


@pytest.fixture
def folder(result, tmp_path):
    return result.save(tmp_path / "out")


def test_a_result_comes_with_files_and_the_metric_of_the_deployed_one(result, folder) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert Report(**report).exports == [e.model_copy(update={"path": None}) for e in result.exports]
    pt2, onnx = report["exports"]
    assert (pt2["format"], onnx["format"]) == ("pt2", "onnx")
    for entry in (pt2, onnx):
        assert entry["bytes"] == (folder / entry["file"]).stat().st_size
        assert entry["dynamic_batch"]
        assert entry["max_difference"] < 1e-5 < entry["largest_output"]
        assert entry["opened_with"].split()[1]
    metric = onnx["metric"]
    assert metric["n"] == result.after.metric.n == 200
    assert metric["network"] == result.after.metric.value
    assert abs(metric["value"] - metric["network"]) < 0.6
    text = str(result)
    assert "bytes of model.pt2" in text
    assert "accuracy of model.onnx (n = 200)" in text


def test_the_files_of_an_earlier_result_go(result, folder) -> None:
    result.save(folder, exports=())
    assert sorted(p.name for p in folder.iterdir()) == [
        "model.safetensors",
        "report.html",
        "report.json",
        "structure.json",
    ]
    assert json.loads((folder / "report.json").read_text())["exports"] == []
    result.save(folder)


def test_an_impossible_export_is_listed_and_does_not_fail_the_save(result, tmp_path, monkeypatch) -> None:
    export = importlib.import_module("efficientdnns.deployment.export")

    def impossible(*_, **__):
        raise ModelError("torch.export cannot trace the network: it asks the weather")

    with monkeypatch.context() as patched:
        patched.setattr(export, "trace", impossible)
        result.save(tmp_path)
    assert [e.error for e in result.exports] == ["torch.export cannot trace the network: it asks the weather"] * 2
    assert "no model.onnx: torch.export cannot trace the network: it asks the weather" in result.notes()
    with pytest.raises(ModelError, match="asks the weather"):
        check_result(tmp_path)


def test_reports_of_earlier_versions_are_read(folder) -> None:
    report = json.loads((folder / "report.json").read_text())
    for key in ("exports", "inputs"):
        del report[key]
    assert Report(**report).exports == []


def test_the_one_check(result, folder) -> None:
    for exports in (check_result(result), check_result(folder)):
        assert [e.error for e in exports] == ["", ""]
    other = ed.models.build("lenet5")
    with torch.no_grad():
        other.conv1.weight.mul_(3)
    from efficientdnns.deployment.onnx import write_onnx

    write_onnx(other, torch.randn(1, 1, 28, 28), folder / "model.onnx")
    with pytest.raises(ModelError, match="differs from the network"):
        check_result(folder)
    (folder / "model.pt2").unlink()
    with pytest.raises(ed.FileFormatError, match="not there"):
        check_result(folder)


def test_a_loaded_result_trains_on(folder, digits) -> None:
    network = ed.load(folder)
    batch = next(iter(digits.train.batches(64)))
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    network.train()
    losses = []
    for _ in range(3):
        loss = digits.loss(network(batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    network.eval()
    assert not any(module.training for module in network.modules())
    assert network(batch.inputs).shape == (64, 10)


def run(capsys, *arguments: str) -> tuple[int, str]:
    import sys

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["efficientdnns", *arguments])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_command(folder, tmp_path, capsys) -> None:
    code, out = run(capsys, "export", str(folder), "--format", "pt2", "--batch", "4", "--out", str(tmp_path / "x.pt2"))
    assert code == 0
    assert "batch 4, opened with torch" in out
    assert (tmp_path / "x.pt2").is_file()
    code, out = run(capsys, "export", str(folder), "--json")
    assert code == 0
    assert json.loads(out)["format"] == "onnx"
    entries = json.loads((folder / "report.json").read_text())["exports"]
    assert [entry["format"] for entry in entries] == ["pt2", "onnx"], "the new one stands for the old one"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "onxx"], "did you mean 'onnx'"),
        (["--batch", "0"], "batch is 0"),
        (["--task", "no-such-task"], "no-such-task"),
    ],
)
def test_bad_requests_are_one_line_and_two(arguments, says, folder, capsys) -> None:
    code, out = run(capsys, "export", str(folder), *arguments)
    assert code == 2
    assert out.startswith("error: ")
    assert says in out
    assert out.count("\n") == 1


def test_a_folder_without_a_result_and_a_missing_package(folder, tmp_path, capsys, monkeypatch) -> None:
    code, out = run(capsys, "export", str(tmp_path / "nothing"))
    assert (code, out.count("\n")) == (2, 1)
    assert "no saved result" in out
    from efficientdnns.deployment import extras

    monkeypatch.setattr(extras, "missing", lambda *packages: list(packages))
    code, out = run(capsys, "export", str(folder), "--format", "executorch")
    assert (code, out) == (2, "error: executorch is not installed; write pip install 'efficientdnns[executorch]'\n")


def test_without_the_data_the_comparison_is_on_noise(folder) -> None:
    report = json.loads((folder / "report.json").read_text())
    report["task"] = "somebody's"
    (folder / "report.json").write_text(json.dumps(report))
    assert "noise" in export_saved(folder, "pt2").note
    del report["inputs"]
    (folder / "report.json").write_text(json.dumps(report))
    with pytest.raises(ConfigurationError, match="add --task"):
        export_saved(folder, "pt2")


def test_inputs_are_described_and_made_again() -> None:
    inputs = {
        "tokens": torch.randint(3, 9, (1, 5)),
        "pictures": [torch.rand(3, 4, 6)],
        "pair": (torch.rand(1, 2), None),
    }
    description = json.loads(json.dumps(describe(inputs)))
    made = noise(description, 4)
    assert made["tokens"].shape == (4, 5)
    assert made["tokens"].dtype == torch.int64
    assert 3 <= int(made["tokens"].min()) <= int(made["tokens"].max()) <= 8
    assert [picture.shape for picture in made["pictures"]] == [(3, 4, 6)] * 4
    assert made["pair"][0].shape == (4, 2)
    assert made["pair"][1] is None
    assert torch.equal(noise(description, 4)["tokens"], made["tokens"])
