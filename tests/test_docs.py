"""What the documents say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import efficientdnns as ed
from efficientdnns.cli import methods_markdown
from efficientdnns.measurement.profile import Profile
from efficientdnns.method import card
from efficientdnns.result import Report

ROOT = Path(__file__).parents[1]


def test_the_readme_lists_every_method() -> None:
    text = (ROOT / "README.md").read_text()
    table = re.search(r"<!-- methods -->\n(.*?)\n<!-- /methods -->", text, re.S)
    assert table is not None
    assert table[1] == methods_markdown([card(m) for m in ed.methods()]), "run: efficientdnns methods --markdown"


def test_the_report_schema_is_documented() -> None:
    text = (ROOT / "docs" / "report.md").read_text()
    for field in (*Report.model_fields, *Profile.model_fields):
        assert f"`{field}`" in text, field


def test_the_recipe_in_the_readme_is_valid() -> None:
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", text, re.S)
    assert block is not None
    assert [m.name for m in ed.Recipe.parse(block[1]).methods] == ["fit", "nisp", "together"]


def test_kind_rooms_do_not_import_each_other() -> None:
    source = ROOT / "src" / "efficientdnns"
    rooms = [kind for kind in ed.method.KINDS if kind != "coding"]
    for path in source.rglob("*.py"):
        room = path.relative_to(source).parts[0]
        if path.parent == source and path.stem in ("__init__", "cli"):
            continue
        for other in re.findall(r"^\s*(?:from|import) efficientdnns\.(\w+)", path.read_text(), re.M):
            assert other not in rooms or other == room, f"{path.relative_to(ROOT)} imports the kind room '{other}'"
