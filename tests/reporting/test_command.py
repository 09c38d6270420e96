"""`efficientdnns report` and `efficientdnns compare`."""

from __future__ import annotations

import json

import pytest

from efficientdnns.cli import main


@pytest.fixture
def cli(capsys, monkeypatch):
    def invoke(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["efficientdnns", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return invoke


def test_report(cli, write, make_report, tmp_path) -> None:
    folder = write("one", make_report())
    assert cli("report", folder)[0] == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert cli("report", folder, "--out", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert "Can I trust it?" in page


def test_compare(cli, write, make_report, tmp_path) -> None:
    folders = [write(f"half-{s}", make_report(97 + s, 0.5, s)) for s in (0, 1)] + [write("few", make_report(90, 0.1))]
    code, out, err = cli("compare", *folders, "--out", tmp_path / "compare.html")
    assert code == 0, err
    assert "97.50 ± 0.71" in out
    assert "10.00x*" in out
    assert "not comparable" not in out
    assert "<!doctype html>" in (tmp_path / "compare.html").read_text(encoding="utf-8")
    code, out, _ = cli("compare", *folders, "--json")
    assert [group["seeds"] for group in json.loads(out)["groups"]] == [[0, 1], [0]]
    code, out, _ = cli("compare", folders[0], write("other", make_report(task="mnist")))
    assert "warning: not comparable, the task differs" in out


def test_wrong_folders_are_one_line_with_exit_code_2(cli, write, make_report, tmp_path) -> None:
    good = write("good", make_report())
    for arguments in (
        ("report", tmp_path / "nowhere"),
        ("compare", good, tmp_path / "nowhere", "--out", tmp_path / "c.html"),
        ("compare", good, "--out", tmp_path / "nowhere" / "c.html"),
        ("report", good, "--out", tmp_path),
    ):
        code, _, err = cli(*arguments)
        assert code == 2
        assert len(err.strip().splitlines()) == 1
        assert "Traceback" not in err
        assert str(tmp_path) in err
    assert not (tmp_path / "c.html").exists()
