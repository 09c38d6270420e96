"""How every benchmark prints its table: for the terminal, or as Markdown for the docs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show(titles: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool, caption: str = "") -> None:
    """Print a table; rows may be shorter than the titles."""
    rows = [[*row, *[""] * (len(titles) - len(row))] for row in rows]
    if markdown:
        for line in (titles, ["---"] * len(titles), *rows):
            print("| " + " | ".join(line) + " |")
        return
    table = Table(*titles, title=caption or None, title_justify="left")
    for line in rows:
        table.add_row(*line)
    Console(width=max(Console().width, 18 * len(titles))).print(table)
