"""Recipes are data, and errors name the line."""

from __future__ import annotations

import pytest

import efficientdnns as ed
from efficientdnns.recipe import Recipe, parse_method_text

GOOD = """\
model: lenet5
task: {name: digits, limit: 100}
training: {learning_rate: 0.1}
budget: {macs: 0.5}
seed: 3
methods:
  - fit: {epochs: 2}
  - together:
      - knowledge-distillation: {epochs: 1}
      - admm-pruning
  - nisp: {}
"""


def test_reads_what_it_says() -> None:
    recipe = Recipe.parse(GOOD)
    assert recipe.model == {"name": "lenet5"}
    assert recipe.task == {"name": "digits", "limit": 100}
    assert recipe.training.learning_rate == 0.1
    assert recipe.budget.macs == 0.5
    assert recipe.seed == 3
    assert [m.name for m in recipe.methods] == ["fit", "together", "nisp"]
    assert recipe.methods[0] == ed.Fit(epochs=2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nisp", "nips", r"line 11: no method is called 'nips' \(did you mean 'nisp'"),
        ("epochs: 2", "epoch: 2", r"line 7: fit has no field 'epoch' \(did you mean 'epochs'"),
        ("epochs: 2", "epochs: -2", r"line 7: fit: epochs is -2"),
        ("seed: 3", "sead: 3", r"line 5: a recipe has no key 'sead' \(did you mean 'seed'"),
        ("seed: 3", "seed: x", r"line 5: seed is 'x'"),
        ("macs: 0.5", "mac: 0.5", r"line 4: no budget is called 'mac'"),
        ("learning_rate: 0.1", "lr: 0.1", r"line 3: training has no setting 'lr'"),
        ("model: lenet5\n", "", r"lacks 'model'"),
        ("model: lenet5", "model: [1]", r"line 1: model is \[1\]"),
        ("task: {", "task: {{", r"line \d+: "),
        ("- admm-pruning", "- nisp", r"nisp does not act during training"),
    ],
)
def test_errors_name_the_line(old, new, message) -> None:
    with pytest.raises(ed.ConfigurationError, match=message) as error:
        Recipe.parse(GOOD.replace(old, new), "r.yaml")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("r.yaml")


@pytest.mark.parametrize(
    "text", ["", "just text", "- a\n- b", "a: [", "model: !!python/object/apply:os.system ['true']"]
)
def test_what_is_no_recipe_is_refused(text) -> None:
    with pytest.raises(ed.ConfigurationError):
        Recipe.parse(text)


def test_methods_on_the_command_line() -> None:
    assert parse_method_text("fit:epochs=3,learning_rate=0.5") == ed.Fit(epochs=3, learning_rate=0.5)
    together = parse_method_text("knowledge-distillation:epochs=1+admm-pruning:epochs=2")
    assert [m.name for m in together.methods] == ["knowledge-distillation", "admm-pruning"]
    with pytest.raises(ed.ConfigurationError, match="is not field=value"):
        parse_method_text("fit:epochs")


def test_numbers_are_those_of_a_person() -> None:
    method = parse_method_text("admm-pruning:constraint=2:4,rho=1e-3,epochs=1_0")
    assert method.constraint == "2:4", "not 124 seconds"
    assert method.rho == 0.001
    assert method.epochs == 10
