"""What every registered method must satisfy; a new method goes through all of it by being registered."""

from __future__ import annotations

import copy
import inspect
import json
import re
import subprocess
import sys

import pytest
import torch

import efficientdnns as ed
from efficientdnns.deployment import check_result
from efficientdnns.method import card, fields
from efficientdnns.result import state_of
from efficientdnns.training import Trainer

METHODS = ed.methods()
TRAINING = [m for m in METHODS if issubclass(m, ed.TrainingMethod)]


def ident(method: type[ed.Method]) -> str:
    return method.name


def small(method: type[ed.Method]) -> ed.Method:
    return method(**method.contract_fields)


def compress(model, task, methods, **options):
    return ed.compress(model, task, methods, quiet=True, latency=False, **options)


def assert_same_state(a, b) -> None:
    left, right = state_of(a), state_of(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("method", METHODS, ids=ident)
def test_runs_and_reloads_to_equal_outputs(method, trained, digits, tmp_path) -> None:
    before = copy.deepcopy(trained.state_dict())
    result = compress(trained, digits, [small(method)])
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name]), f"the user's model was changed: {name}"
    # Memory is shared while methods work (`Method.in_place`), but not in what is handed over.
    given = {tensor.untyped_storage().data_ptr() for tensor in (*trained.parameters(), *trained.buffers())}
    assert not given & {t.untyped_storage().data_ptr() for t in (*result.model.parameters(), *result.model.buffers())}
    assert result.after.metric.n == 200
    assert result.after.metric.split == digits.evaluation.name
    assert result.before.bytes > 0
    assert result.after.bytes > 0
    json.dumps(result.report.model_dump())

    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == result.after.bytes
    loaded = ed.load(tmp_path / "out")
    images = next(iter(digits.evaluation.batches(32))).inputs
    check_result(tmp_path / "out", inputs=images[:7])
    with torch.inference_mode():
        assert torch.equal(result.model.eval()(images), loaded(images))


@pytest.mark.parametrize("method", METHODS, ids=ident)
def test_follows_another_method(method, trained, digits) -> None:
    first = ed.KnowledgeDistillation(epochs=1)
    result = compress(trained, digits, [first, small(method)])
    assert [record.id.split(" ")[0] for record in result.report.methods] == ["knowledge-distillation", method.name]


@pytest.mark.parametrize("method", [m for m in TRAINING if m is not ed.KnowledgeDistillation], ids=ident)
def test_shares_a_run_with_distillation(method, trained, digits) -> None:
    member = small(method)
    if type(member).apply is not ed.TrainingMethod.apply:
        pytest.skip("has phases of its own")
    result = compress(trained, digits, [[ed.KnowledgeDistillation(epochs=1), member]])
    assert result.report.methods[0].id == f"knowledge-distillation + {method.name}"


@pytest.mark.parametrize("method", METHODS, ids=ident)
def test_is_deterministic_and_resumes_to_the_same_result(method, trained, digits, tmp_path, monkeypatch) -> None:
    chain = [ed.Fit(epochs=1), small(method)]
    whole = compress(trained, digits, chain)
    saves = 0
    save = Trainer._save

    def save_then_die(self) -> None:
        nonlocal saves
        save(self)
        saves += 1
        if saves == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save", save_then_die)
        try:
            compress(trained, digits, chain, checkpoints=tmp_path)
        except KeyboardInterrupt:
            assert saves == 2
    torch.manual_seed(123)
    resumed = compress(trained, digits, chain, checkpoints=tmp_path)
    assert_same_state(whole.model, resumed.model)


@pytest.mark.parametrize("method", METHODS, ids=ident)
def test_validates_its_fields(method) -> None:
    with pytest.raises(ed.ConfigurationError, match=f"{method.name} has no field 'no_such_field'"):
        method(no_such_field=1)
    for field in fields(method):
        text = field["range"]
        for pattern, wrong in ((r">=? (-?[\d.]+)", -1.0), (r"<=? (-?[\d.]+)", 1.0)):
            if match := re.search(pattern, text):
                value = float(match[1]) + wrong * 1000
                with pytest.raises(ed.ConfigurationError) as error:
                    method(**{field["name"]: value})
                assert "\n" not in str(error.value)
                assert field["name"] in str(error.value)


@pytest.mark.parametrize("method", METHODS, ids=ident)
def test_has_a_complete_paper_card(method) -> None:
    data = card(method)
    for key in ("id", "title", "authors", "venue", "url"):
        assert data[key], key
    assert 1990 <= data["year"] <= 2026
    assert data["url"].startswith("http")
    assert data["kind"] in ed.method.KINDS
    doc = inspect.getdoc(method) or ""
    assert "<http" in doc, "the class docstring links the paper"
    assert ".. math::" in doc or ":math:" in doc, "the class docstring carries the formula"
    for field in data["fields"]:
        assert field["description"], f"{method.name}.{field['name']} has no description"
    module = inspect.getmodule(method)
    assert module is not None
    assert module.__doc__
    assert module.__name__.split(".")[-1] == method.name.replace("-", "_"), "one file, one method, named like the paper"


@pytest.mark.parametrize("method", METHODS, ids=ident)
def test_can_be_written_in_a_recipe(method) -> None:
    from efficientdnns.recipe import parse_method_text

    instance = method()
    assert parse_method_text(method.name) == instance
    json.dumps(instance.fields_as_data())


def test_loads_in_a_fresh_process(trained, digits, tmp_path) -> None:
    result = compress(
        trained,
        digits,
        [ed.NISP(**ed.NISP.contract_fields), ed.Int8Quantization(**ed.Int8Quantization.contract_fields)],
    )
    result.save(tmp_path)
    images = next(iter(digits.evaluation.batches(8))).inputs
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch, efficientdnns as ed; torch.set_num_threads(1);"
        "m = ed.load(sys.argv[1]); x = torch.load(sys.argv[1] + '/images.pt', weights_only=True);"
        "print(m(x).double().sum().item().hex())"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    with torch.inference_mode():
        assert out.strip() == result.model(images).double().sum().item().hex()
