"""The pages in a real browser: one start of headless Chromium, all pages in frames of a phone's and a screen's width."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from efficientdnns.reporting import compare, compare_page, report_page
from efficientdnns.reporting.html import asset
from efficientdnns.reporting.numbers import amount

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
    ),
)
LISTEN = """<script>
const problems = [];
addEventListener("error", (event) => problems.push(event.message), true);
addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", (event) => problems.push("blocked " + event.blockedURI));
for (const level of ["error", "warn"]) console[level] = (...words) => problems.push(words.join(" "));
window.problems = problems;
</script>"""
PHONES = (320, 360, 400)


def frame(name: str, page: str, width: int, dark: bool = False, used: bool = False) -> str:
    listening = page.replace("<head>", f"<head>{LISTEN}", 1)
    scheme = "dark" if dark else "light"
    return (
        f'<iframe id="{name}" style="width:{width}px;height:900px;color-scheme:{scheme}"'
        f'{" data-use=1" if used else ""} srcdoc="{html.escape(listening)}"></iframe>'
    )


@pytest.fixture(scope="module")
def found(make_report, tmp_path_factory) -> dict[str, Any]:
    """What the browser saw of every page."""
    folder = tmp_path_factory.mktemp("browser")
    hostile = "a-very-long-name<script>problems.push('ran')</script>" + "x" * 80
    layered = make_report(count=60)
    layered.methods[0] = layered.methods[0].model_copy(update={"id": hostile})
    report = report_page(layered)
    folders = []
    for name, accuracy, share in (
        ("half", 97.0, 0.5),
        ("quarter", 95.5, 0.25),
        ("third", 80.0, 0.33),
        ("most", 97.2, 0.8),
    ):
        for seed in (0, 1, 2):
            path = folder / f"{name}-{seed}"
            path.mkdir()
            made = make_report(accuracy + seed / 10, share, seed)
            (path / "report.json").write_text(made.model_dump_json())
            folders.append(path)
    comparison = compare_page(compare(folders))
    control = (
        '<head></head><body style="width:900px"><script>nowhere()</script><img src="http://localhost:9/a.png"></body>'
    )
    pages = {"report": report, "compare": comparison}
    frames = [frame(f"{name}-{width}", page, width) for name, page in pages.items() for width in PHONES]
    frames += [frame(f"{name}-1200", page, 1200, used=name == "compare") for name, page in pages.items()]
    frames += [frame(f"{name}-dark", page, 360, dark=True) for name, page in pages.items()]
    frames.append(frame("control", control, 360))
    script = (Path(__file__).parent / "browser.js").read_text()
    harness = folder / "harness.html"
    harness.write_text(f"<!doctype html><meta charset=utf-8><body>{''.join(frames)}<script>{script}</script></body>")
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", harness.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout
    body = re.search(r"<body>(\{.*\})\s*</body>", shown, re.S)
    assert body is not None, shown[-2000:]
    return json.loads(html.unescape(body[1]))


NAMES = [f"{page}-{kind}" for page in ("report", "compare") for kind in (*PHONES, 1200, "dark")]


def test_the_probe_sees_what_is_wrong(found) -> None:
    control = found["control"]
    assert any("nowhere" in problem for problem in control["problems"])
    assert control["requests"] == 1
    assert control["needed"] > control["width"]


@pytest.mark.parametrize("name", NAMES)
def test_no_errors_no_requests_no_sideways_scrolling(found, name) -> None:
    page = found[name]
    assert page["problems"] == []
    assert page["requests"] == 0
    assert page["needed"] <= page["width"]
    assert page["text"] >= 11


@pytest.mark.parametrize("name", NAMES)
def test_charts_are_drawn(found, name) -> None:
    page = found[name]
    figures = 2 if name.startswith("report") else 1
    assert len(page["figures"]) == figures
    assert all(width > 200 and height > 100 for width, height in page["figures"])
    assert len(page["marks"]) >= 5
    assert all(width > 0 and height >= 0 for width, height in page["marks"])
    if name.startswith("report"):
        assert len(page["bars"]) >= 24 * 4
        assert all(width > 50 and height > 5 for width, height in page["bars"])


def test_dark_and_light(found) -> None:
    for name, page in found.items():
        if name != "control":
            colour = "#14171b" if name.endswith("dark") else "#ffffff"
            assert page["background"] == f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"
            assert colour in asset("style.css")


def test_sorting(found) -> None:
    used = found["compare-1200"]["use"]
    assert used["given"] == ["1", "2", "3", "4"]
    expected = {"size of the file": ["2", "3", "1", "4"], "accuracy": ["3", "2", "1", "4"], "run": ["1", "4", "2", "3"]}
    for column, order in expected.items():
        clicked = used["sorted"][column]
        assert clicked["focused"], "headings are reached by keyboard"
        assert clicked["up"] == [order, "ascending"]
        assert clicked["down"] == [order[::-1], "descending"]
        assert clicked["marked"] == 1


def test_axes_points_and_recipes(found) -> None:
    used = found["compare-1200"]["use"]
    assert used["axis"] == ["bytes"]
    assert used["other"] == ["macs"]
    assert used["readout"].startswith("2 · quarter: 95.60 ± 0.10 %, MACs ")
    assert amount(250_000) in used["readout"]
    assert used["chosen"] == ["2"]
    assert used["open"] == ["run-2"]
    assert used["recipe"]
