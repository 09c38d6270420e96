"""Every method has a reproduction, every recipe in the tree is valid, and every reproduction's smoke version runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import efficientdnns as ed
from efficientdnns.recipe import Recipe
from efficientdnns.reproduce import folder, names, recorded, reproduce_all

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


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


@pytest.mark.parametrize("name", names())
def test_records_belong_to_runs_that_exist(name) -> None:
    runs = {run["name"] for run in yaml.safe_load((folder() / f"{name}.yaml").read_text())["runs"]}
    for outcome in recorded(name):
        assert outcome["run"] in runs
        assert outcome["ours_text"]
        assert outcome["seconds"] > 0
