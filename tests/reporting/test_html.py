"""Nothing gets onto a page unescaped, and a page needs nothing but itself."""

from __future__ import annotations

import re

import pytest

from efficientdnns.errors import ConfigurationError
from efficientdnns.reporting import html

HOSTILE = "<script>alert('x')</script>\"&"


def test_text_and_attributes_are_escaped_and_html_is_not_twice() -> None:
    inner = html.tag("b", HOSTILE, title=HOSTILE)
    assert "<script>" not in inner
    assert inner == html.tag("b", html.safe(HOSTILE), title=HOSTILE)
    assert html.tag("p", [inner, None, 3]) == f"<p>{inner}3</p>"
    assert html.tag("input", type="radio", name="axis", checked=True, disabled=False) == (
        '<input type="radio" name="axis" checked>'
    )


def test_only_web_addresses_become_links() -> None:
    assert html.link("https://arxiv.org/abs/1", "a paper").startswith('<a href="https://arxiv.org/abs/1"')
    assert html.link("javascript:alert(1)", "a <paper>") == "a &lt;paper&gt;"


def test_tables_say_what_their_headings_are_of() -> None:
    shown = html.table(["layer", "size"], [["fc1", 3]], label="layers")
    assert '<th scope="col" class="number">size</th>' in shown
    assert '<th scope="row">fc1</th><td class="number">3</td>' in shown
    assert 'aria-label="layers"' in shown


def test_a_page_loads_nothing() -> None:
    text = html.page("a title", html.tag("p", "text"), scripts=("page.js", "compare.js"))
    assert not re.search(r"""\ssrc\s*=|<link|@import|url\(|https?:""", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_write_page(tmp_path) -> None:
    assert html.write_page(tmp_path / "a.html", "é").read_text(encoding="utf-8") == "é"
    for wrong in (tmp_path, tmp_path / "nowhere" / "a.html"):
        with pytest.raises(ConfigurationError, match="--out"):
            html.write_page(wrong, "x")


def colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_contrast_is_that_of_wcag_aa(mode) -> None:
    blocks = re.findall(r":root \{(.*?)\}", html.asset("style.css"), re.S)
    found = colours(blocks[("light", "dark").index(mode)])
    for background in ("page", "surface"):
        for text in ("text", "muted", "accent", "good", "bad"):
            assert contrast(found[text], found[background]) >= 4.5, (text, background)
    for mark in ("accent", "before", "grey"):
        assert contrast(found[mark], found["page"]) >= 3, mark
