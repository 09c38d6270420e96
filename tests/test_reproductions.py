"""Every method has a reproduction, every recipe in the tree is valid, and every reproduction's smoke version runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import efficientdnns as ed
from efficientdnns.deployment import check_result
from efficientdnns.recipe import Recipe
from efficientdnns.reproduce import folder, names, recorded, reproduce_all
from efficientdnns.run import run as run_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_every_method_has_one_and_a_recorded_result() -> None:
    methods = {method.name for method in ed.methods()}
    assert methods <= set(names())
    assert {name for name in methods if not recorded(name)} == set()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid(path) -> None:
    assert Recipe.load(path).methods


@pytest.mark.parametrize("name", names())
def test_all_runs_are_valid_recipes(name) -> None:
    definition = yaml.safe_load((folder() / f"{name}.yaml").read_text())
    assert definition["id"] == name
    for run in definition["runs"]:
        assert run["paper"]["text"]
        for content in (run["recipe"], {**run["recipe"], **run["smoke"]}):
            assert Recipe.parse(yaml.safe_dump(content)).methods


@pytest.mark.parametrize("name", names())
def test_smoke_version_runs(name, tmp_path) -> None:
    definition = yaml.safe_load((folder() / f"{name}.yaml").read_text())
    (outcome,) = reproduce_all(name, out=tmp_path, smoke=True, only=definition["runs"][0]["name"], quiet=True)
    assert outcome["after"]["metric"]["n"] > 0
    json.dumps(outcome)
    check_result(tmp_path / name / "smoke" / f"{outcome['run']}-0")


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name == "recipes"], ids=lambda p: p.stem)
def test_results_of_recipes_pass_the_common_check(path, tmp_path) -> None:
    """A short run on the digits: the same methods on the same network, with random weights and few epochs."""
    content = yaml.safe_load(path.read_text()) | {"task": {"name": "digits", "limit": 256, "evaluation_limit": 100}}
    model = content["model"] if isinstance(content["model"], dict) else {"name": content["model"]}
    images = {} if "300-100" in model["name"] else {"in_channels": 1}
    content["model"] = {key: value for key, value in model.items() if key != "weights"} | images
    content["methods"] = [shortened(step) for step in content["methods"]]
    if "training" in content:
        content["training"] |= {"batch_size": 64, "mixed_precision": "no"}
    run_recipe(Recipe.parse(yaml.safe_dump(content)), tmp_path / "out", quiet=True, latency=False)
    check_result(tmp_path / "out")


def shortened(step: dict[str, Any]) -> dict[str, Any]:
    if "together" in step:
        return {"together": [shortened(member) for member in step["together"]]}
    short = {"epochs": 1, "prune_epochs": 1, "share_epochs": 1, "calibration_samples": 64}
    return {
        name: {key: short.get(key, value) for key, value in (fields or {}).items()} for name, fields in step.items()
    }


@pytest.mark.parametrize("name", names())
def test_records_belong_to_runs_that_exist(name) -> None:
    runs = {run["name"] for run in yaml.safe_load((folder() / f"{name}.yaml").read_text())["runs"]}
    for outcome in recorded(name):
        assert outcome["run"] in runs
        assert outcome["ours_text"]
        assert outcome["seconds"] > 0
