"""HTML from Python: text is escaped unless it is HTML already, and a page needs nothing but itself."""

from __future__ import annotations

import html
import os
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Any

from efficientdnns.errors import ConfigurationError

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""What the page may load: nothing. The browser refuses every request."""


class Html(str):
    """Text that is HTML already; everything else is escaped where it enters a page."""

    __slots__ = ()


def safe(value: Any) -> Html:
    """``value`` as HTML: HTML as it is, the members of a list one after the other, None as nothing, anything else escaped."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("")
    if isinstance(value, list | tuple):
        return Html("".join(safe(item) for item in value))
    return Html(html.escape(str(value)))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """One element; an attribute that is None or False is left out, ``_`` in its name is ``-``, ``class_`` is ``class``.

    >>> tag("p", "1 < 2", class_="note")
    '<p class="note">1 &lt; 2</p>'
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in ("input", "br", "meta", "rect", "line", "circle", "polyline"):
        return Html(f"<{name}{written}/>" if name in ("rect", "line", "circle", "polyline") else f"<{name}{written}>")
    return Html(f"<{name}{written}>{safe(children)}</{name}>")


def link(url: str, text: Any) -> Html:
    """A link, where ``url`` is one of the web; else the text alone."""
    if not url.startswith(("https://", "http://")):
        return safe(text)
    return tag("a", text, href=url, rel="noopener noreferrer")


def table(
    headings: list[Any],
    rows: list[list[Any]],
    *,
    words: Collection[int] = (0,),
    caption: str | None = None,
    label: str = "",
    **attributes: Any,
) -> Html:
    """A table that scrolls by itself where it is too wide; all columns but ``words`` are numbers."""

    def cell(kind: str, position: int, value: Any) -> Html:
        if value == "" and kind == "th":
            return tag("td")
        scope = ("col" if kind == "th" else "row") if kind == "th" or position == 0 else None
        name = "th" if scope else "td"
        return tag(name, value, scope=scope, class_=None if position in words else "number")

    head = tag("thead", tag("tr", [cell("th", i, heading) for i, heading in enumerate(headings)]))
    body = tag("tbody", [tag("tr", [cell("td", i, value) for i, value in enumerate(row)]) for row in rows])
    return scrolling(
        tag("table", tag("caption", caption) if caption else None, head, body, **attributes), label or caption
    )


def scrolling(content: Html, label: str | None) -> Html:
    """A box that scrolls sideways where its content is wider than the page, by keyboard too."""
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=label or "table")


def details(summary: Any, *content: Any, **attributes: Any) -> Html:
    """Content behind a click."""
    return tag("details", tag("summary", summary), *content, **attributes)


def page(title: str, *body: Any, scripts: tuple[str, ...] = ()) -> str:
    """A whole document with style and scripts inside."""
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        tag("style", Html(asset("style.css"))),
    ]
    code = [tag("script", Html(asset(name))) for name in scripts]
    document = tag("html", tag("head", head), tag("body", tag("main", *body), code), lang="en")
    return f"<!doctype html>\n{document}\n"


def write_page(path: str | Path, text: str) -> Path:
    """Write a page, whole or not at all.

    Raises:
        ConfigurationError: its folder is not there, or ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a folder" if path.is_dir() else f"lies in {path.parent}, which does not exist"
        raise ConfigurationError(
            f"--out {path} {wrong}; name a file such as {path.name or 'page'}.html in a folder that exists"
        )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def asset(name: str) -> str:
    """The text of a file in ``assets/``."""
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")
