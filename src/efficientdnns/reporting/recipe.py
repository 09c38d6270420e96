"""What exactly was done: the recipe, the seed, the machine, and the papers behind the methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from efficientdnns.method import registered
from efficientdnns.recipe import text
from efficientdnns.reporting.html import Html, details, link, safe, table, tag
from efficientdnns.reporting.numbers import plain, seconds

if TYPE_CHECKING:
    from efficientdnns.result import MethodRecord, Report

LONGEST = 3000
"""Characters of a method's findings that are shown."""


def done(report: Report) -> Html:
    """The section."""
    parts = [
        tag("h3", "Recipe"),
        recipe_block(report),
        tag(
            "p", "Save it as recipe.yaml; ", tag("code", "efficientdnns run recipe.yaml --out again"), " does it again."
        ),
        tag("h3", "Methods"),
        [_method(record) for record in report.methods],
        tag("h3", "Where it ran"),
        _environment(report),
    ]
    return safe(parts)


def recipe_of(report: Report) -> dict[str, Any]:
    """The recipe as data; of a result from before recipes were recorded, what its methods say with all their fields."""
    if report.recipe is not None:
        return report.recipe
    methods = [{base(record.id): record.fields} for record in report.methods]
    return {"model": report.model, "task": report.task, "seed": report.seed, "methods": methods}


def recipe_block(report: Report) -> Html:
    """The recipe in YAML, to be copied."""
    button = tag("button", "Copy", type="button", class_="copy", hidden=True)
    return tag("div", button, tag("pre", text(recipe_of(report)), tabindex="0", aria_label="recipe"))


def base(label: str) -> str:
    """The method's id of a record: ``"nisp #3"`` is ``"nisp"`` for the third step."""
    return label.partition(" #")[0]


def names(label: str) -> list[str]:
    """The ids of the methods of a record; several that shared a training run are joined by ``+``."""
    return [name.strip() for name in base(label).split(" + ")]


def _method(record: MethodRecord) -> Html:
    known = registered()
    papers = [paper for name in names(record.id) if name in known and (paper := known[name].paper) is not None]
    cards = [
        tag(
            "p",
            link(paper.url, paper.title),
            tag("br"),
            tag("span", f"{paper.authors}, {paper.venue} {paper.year}", class_="muted"),
        )
        for paper in papers
    ]
    if not papers:
        plain_step = "plain training" if base(record.id) == "fit" else "a step of the library, without a paper"
        cards = [tag("p", plain_step, class_="muted")]
    fields = [(key, value) for key, value in record.fields.items() if value is not None]
    rows = [[key, plain(value)] for key, value in fields if key != "methods"]
    for member in record.fields.get("methods", []) if isinstance(record.fields.get("methods"), list) else []:
        for name, values in member.items():
            rows += [[f"{name}: {key}", plain(value)] for key, value in values.items() if value is not None]
    found = text(record.findings) if record.findings else ""
    return tag(
        "div",
        tag("p", tag("b", record.id), tag("span", f" · {seconds(record.seconds)}", class_="muted")),
        cards,
        details("Fields", table(["field", "value"], rows, words=(0, 1), label=f"fields of {record.id}"))
        if rows
        else None,
        details("What it found", tag("pre", _cut(found), tabindex="0", aria_label=f"findings of {record.id}"))
        if found
        else None,
        class_="card",
    )


def _cut(found: str) -> str:
    if len(found) <= LONGEST:
        return found
    return found[:LONGEST].rpartition("\n")[0] + "\n... the rest is in report.json"


_NAMES = {"cpu": "processor", "cpu_capability": "vector instructions", "cpu_count": "processors", "platform": "system"}


def _environment(report: Report) -> Html:
    rows = [["seed", str(report.seed)]]
    rows += [[_NAMES.get(key, key), plain(value)] for key, value in report.environment.items() if value is not None]
    return tag(
        "table",
        tag("tbody", [tag("tr", tag("th", key, scope="row"), tag("td", value)) for key, value in rows]),
        class_="plain",
    )
