"""Files: they agree with the network, are as small as they should be, and are listed with reasons when impossible."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import efficientdnns as ed
from efficientdnns.deployment import DEFAULT, export, export_all, open_onnx, open_pt2, write_onnx
from efficientdnns.deployment.export import check_format
from efficientdnns.deployment.opened import difference, in_batches
from efficientdnns.errors import ConfigurationError, FileFormatError, ModelError

INPUT = torch.randn(1, 1, 28, 28)


def weights(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def test_both_files_are_exact_small_and_quiet(trained, tmp_path, capfd, recwarn) -> None:
    for exported, network in export_all(trained, INPUT, tmp_path, DEFAULT):
        assert exported.error == ""
        assert exported.dynamic_batch
        assert exported.max_difference <= 1e-5
        assert exported.compared == 7
        assert exported.bytes == (tmp_path / exported.file).stat().st_size
        assert exported.bytes < 1.01 * weights(trained) + 20_000
        assert network(torch.randn(3, 1, 28, 28)).shape == (3, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt2"], "nothing half-written stays"
    assert capfd.readouterr() == ("", "")
    assert not [w for w in recwarn if "export" in str(w.message)]


def test_half_a_network_is_half_a_file(tmp_path) -> None:
    sizes = {}
    for width in (256, 128):
        network = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
        for exported, _ in export_all(network, torch.randn(1, 784), tmp_path, DEFAULT):
            sizes[exported.format, width] = exported.bytes
    for format in DEFAULT:
        assert 0.49 < sizes[format, 128] / sizes[format, 256] < 0.53


def test_the_pt2_file_needs_no_class_and_holds_no_pickle_and_no_paths(trained, tmp_path) -> None:
    import zipfile

    export(trained, INPUT, tmp_path, "pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
        assert archive.testzip() is None
    assert b"efficientdnns" not in content
    assert b"site-packages" not in content
    assert b"\x80\x02}" not in content
    torch.save(INPUT, tmp_path / "x.pt")
    code = (
        "import sys, torch; m = torch.export.load('model.pt2').module(); x = torch.load('x.pt', weights_only=True);"
        "assert 'efficientdnns' not in sys.modules; print(m(x.repeat(3, 1, 1, 1))[0].tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    with torch.no_grad():
        assert torch.allclose(torch.tensor(json.loads(out)), trained.eval()(INPUT)[0], atol=1e-6)


def test_onnx_names_and_metadata(trained, tmp_path) -> None:
    import onnx

    path = write_onnx(trained, INPUT, tmp_path / "x.onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model)
    (value,) = model.graph.input
    assert value.name == "input"
    assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert str(tmp_path.parents[1]).encode() not in path.read_bytes()
    assert b"/site-packages/" not in path.read_bytes()
    network = open_onnx(path, threads=1)
    with pytest.raises(ed.DataError, match="takes 1 inputs"):
        network((INPUT, INPUT))
    with pytest.raises(FileFormatError, match="is no file"):
        open_onnx(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not onnx")
    with pytest.raises(FileFormatError, match="cannot open"):
        open_onnx(tmp_path / "bad.onnx")
    (tmp_path / "bad.pt2").write_bytes(b"not pt2")
    with pytest.raises(FileFormatError, match="cannot open"):
        open_pt2(tmp_path / "bad.pt2")


class Detector(nn.Module):
    """Nested outputs: a list of dictionaries, one a sample, from a list of images."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"boxes": image.mean(0)[:2, :4], "scores": image.amax((0, 2))} for image in images]


class Heads(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x.relu(), "aux": x.sum(1)}


@pytest.mark.parametrize("format", DEFAULT)
def test_nested_outputs_survive(format, tmp_path) -> None:
    exported = export(Heads(), torch.randn(1, 4), tmp_path, format)
    network = {"onnx": open_onnx, "pt2": open_pt2}[format](exported.path)
    assert list(network(torch.randn(3, 4))) == ["out", "aux"]
    images = [torch.rand(3, 6, 8)]
    exported = export(Detector(), images, tmp_path, format, samples=[torch.rand(3, 6, 8) for _ in range(3)])
    assert exported.batch == 1
    assert "list of samples" in exported.note
    assert exported.max_difference < 1e-6


def test_a_fixed_batch_takes_any_number_of_samples_in_turns() -> None:
    seen = []

    def network(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(len(x))
        return x * 2, {"sum": x.sum(1)}

    x = torch.randn(7, 3)
    outputs = in_batches(network, 3)(x)
    assert seen == [3, 3, 3]
    assert torch.equal(outputs[0], x * 2)
    assert torch.equal(outputs[1]["sum"], x.sum(1))


def test_wrong_files_are_noticed() -> None:
    assert difference((torch.ones(2), {"a": torch.zeros(1)}), (torch.ones(2), {"a": torch.ones(1)})) == (1, 1 / 3, 1)
    with pytest.raises(ModelError, match="shape"):
        difference(torch.ones(2), torch.ones(3))
    nan = torch.tensor([float("nan"), 1.0])
    assert difference(nan, nan)[0] == 0


class Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_is_impossible_is_listed_and_older_files_go(tmp_path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"of an earlier network")
    found = export_all(Undecided(), torch.randn(1, 3), tmp_path)
    assert [exported.format for exported, _ in found] == list(DEFAULT)
    for exported, network in found:
        assert network is None
        assert "cannot trace" in exported.error
        assert "\n" not in exported.error
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_listed(trained, tmp_path, monkeypatch) -> None:
    from efficientdnns.deployment import extras

    importlib_find = extras.importlib.util.find_spec
    monkeypatch.setattr(
        extras.importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else importlib_find(name)
    )
    found = dict((e.format, e) for e, _ in export_all(trained, INPUT, tmp_path))
    assert found["pt2"].error == ""
    assert found["onnx"].error.endswith("are not installed; write pip install 'efficientdnns[onnx]'")
    with pytest.raises(ConfigurationError, match="not installed"):
        export(trained, INPUT, tmp_path, "onnx")


def test_bad_requests(trained, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'onnx'"):
        check_format("onxx")
    with pytest.raises(ConfigurationError, match="batch is 0"):
        export(trained, INPUT, tmp_path, "pt2", batch=0)


def test_a_fixed_batch(trained, tmp_path) -> None:
    exported = export(trained, INPUT, tmp_path, "onnx", batch=4)
    assert (exported.dynamic_batch, exported.batch) == (False, 4)
    assert open_onnx(exported.path).session.get_inputs()[0].shape == [4, 1, 28, 28]


def test_coded_weights_are_smaller_in_every_format_and_decoded_on_opening(trained, tmp_path) -> None:
    network = trained
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                step = parameter.abs().max() / 7
                parameter.copy_((parameter / step).round() * step)
    for exported, opened in export_all(network, INPUT, tmp_path, DEFAULT):
        assert exported.bytes < 0.17 * weights(network)
        assert exported.max_difference < 1e-6 * max(1.0, exported.largest_output)
        if exported.format == "pt2":
            names = [str(node.target) for node in opened.graph.graph.nodes if node.op == "call_function"]
            assert len(names) == 10, "as many operations as the network has, none that decodes"
            assert torch.equal(opened(INPUT), network.eval()(INPUT))
