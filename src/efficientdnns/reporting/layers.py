"""Where the size went: layers before and after beside each other, the largest as bars and all of them as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from efficientdnns.measurement.by_layer import LayerSize
from efficientdnns.reporting.charts import bars
from efficientdnns.reporting.html import Html, details, table, tag
from efficientdnns.reporting.numbers import MISSING, amount, percent

SHOWN = 24
"""Layers with bars of their own; the rest is one row."""
LISTED = 150
"""Layers in the table of numbers."""


class Change(NamedTuple):
    """One layer before and after; None where there is no such layer."""

    name: str
    before: LayerSize | None
    after: LayerSize | None

    @property
    def kind(self) -> str:
        """``"Conv2d"``, or ``"Conv2d → Sequential"`` where it was replaced."""
        kinds = [side.kind for side in (self.before, self.after) if side is not None]
        return " → ".join(dict.fromkeys(kinds)) + ("" if self.after else " → gone" if self.before else "")


def changes(before: Sequence[LayerSize], after: Sequence[LayerSize]) -> list[Change]:
    """The layers of both networks by name, in the order of the first; what a layer was taken apart into counts as it."""
    names = {layer.name for layer in before}, {layer.name for layer in after}
    old = _by_name(before, names[1] - names[0])
    new = _by_name(after, names[0] - names[1])
    return [Change(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new])]


def _by_name(layers: Sequence[LayerSize], outer: set[str]) -> dict[str, LayerSize]:
    """Layers by name; those below a name of ``outer`` are added up under it."""
    found: dict[str, list[LayerSize]] = {}
    for layer in layers:
        pieces = layer.name.split(".")
        above = (".".join(pieces[:depth]) for depth in range(1, len(pieces)))
        found.setdefault(next((name for name in above if name in outer), layer.name), []).append(layer)
    return {name: total(name, members) for name, members in found.items()}


def total(name: str, layers: Sequence[LayerSize]) -> LayerSize:
    """Several layers as one."""
    kinds = dict.fromkeys(layer.kind for layer in layers)
    sums = {key: sum(getattr(layer, key) for layer in layers) for key in ("params", "nonzero_params", "macs", "bytes")}
    return LayerSize(name=name, kind=", ".join(kinds) if len(kinds) <= 3 else f"{len(kinds)} kinds", **sums)


def largest(layers: Sequence[Change], count: int = SHOWN) -> tuple[list[Change], list[Change]]:
    """The ``count`` layers with the largest share of weights, MACs or bytes on either side, in order; and the others."""
    if len(layers) <= count:
        return list(layers), []
    weight = [0.0] * len(layers)
    for key in ("params", "macs", "bytes"):
        for side in ("before", "after"):
            amounts = [getattr(getattr(layer, side), key, 0) for layer in layers]
            whole = sum(amounts) or 1
            weight = [max(w, a / whole) for w, a in zip(weight, amounts)]
    kept = set(sorted(range(len(layers)), key=lambda i: -weight[i])[: count - 1])
    ours = [layer for i, layer in enumerate(layers) if i in kept]
    return ours, [layer for i, layer in enumerate(layers) if i not in kept]


def layer_chart(before: Sequence[LayerSize], after: Sequence[LayerSize]) -> Html:
    """The chart and, behind a click, the numbers."""
    every = changes(before, after)
    shown, folded = largest(every)
    if folded:
        sides = [[getattr(layer, side) for layer in folded] for side in ("before", "after")]
        rest = [total("", [layer for layer in side if layer is not None]) for side in sides]
        shown = [*shown, Change(f"{len(folded)} other layers", *rest)]
    most = {key: max((getattr(s, key) for c in shown for s in c[1:] if s), default=0) for key in ("params", "macs")}
    bits = max((s.bits or 0 for c in shown for s in c[1:] if s), default=0)
    rows = [_row(layer, most["params"], most["macs"], max(bits, 32)) for layer in shown]
    heading = tag("div", [tag("div", text) for text in ("layer", *_COLUMNS)], class_="layer head", aria_hidden="true")
    return Html(
        tag("div", _key(), heading, rows, class_="layers")
        + details(f"All {len(every)} layers as numbers", _numbers(every))
    )


_COLUMNS = ("parameters", "MACs", "zeros", "bits per weight")


def _key() -> Html:
    def entry(kind: str, text: str) -> Html:
        swatch = tag("rect", width="100%", height="100%", class_=kind)
        return tag("li", tag("svg", swatch, aria_hidden="true"), text)

    return tag(
        "ul",
        entry("before", "before"),
        entry("after", "after"),
        entry("zero", "after, weights that are zero"),
        class_="key",
    )


def _row(layer: Change, params: int, macs: int, bits: float) -> Html:
    old, new = layer.before, layer.after

    def cell(
        name: str,
        values: tuple[float | None, float | None],
        texts: tuple[str, str],
        most: float,
        inside: float | None = None,
    ) -> Html:
        if values[0] is None and values[1] is None:
            return tag("div", tag("span", name, class_="what"), tag("span", MISSING, class_="figures"))
        text = f"{texts[0]} → {texts[1]}"
        title = f"{layer.name}: {name} {text}"
        return tag(
            "div",
            tag("span", name, class_="what"),
            bars(*values, most, inside, title),
            tag("span", text, class_="figures"),
        )

    def both(key: str) -> tuple[float | None, float | None]:
        pair = (getattr(old, key, None), getattr(new, key, None))
        return pair if any(pair) else (None, None)

    def texts(pair: tuple[float | None, float | None], written) -> tuple[str, str]:  # type: ignore[no-untyped-def]
        return written(pair[0]), written(pair[1])

    weights, work, zeros, coded = both("params"), both("macs"), both("sparsity"), both("bits")
    if weights != (None, None) and zeros == (None, None):
        zeros = (0.0 if old else None, 0.0 if new else None)
    nonzero = new.nonzero_params if new is not None else None
    name = tag("div", layer.name or "(network)", tag("span", layer.kind, class_="kind"), class_="name")
    return tag(
        "div",
        name,
        cell("parameters", weights, texts(weights, amount), params, nonzero),
        cell("MACs", work, texts(work, amount), macs),
        cell("zeros", zeros, texts(zeros, percent), 1.0),
        cell("bits per weight", coded, texts(coded, _bits), bits),
        class_="layer",
    )


def _bits(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}" if value < 100 else amount(value)


def _numbers(layers: Sequence[Change]) -> Html:
    def pair(layer: Change, key: str, unit: str = "") -> list[str]:
        return [amount(getattr(side, key), unit) if side else MISSING for side in layer[1:]]

    rows = [
        [
            [layer.name or "(network)", tag("span", " ", layer.kind, class_="hint")],
            *pair(layer, "params"),
            amount(layer.after.nonzero_params) if layer.after else MISSING,
            *pair(layer, "macs"),
            *pair(layer, "bytes", "B"),
            *[_bits(side.bits) if side else MISSING for side in layer[1:]],
        ]
        for layer in layers[:LISTED]
    ]
    headings = ["layer", "parameters before", "after", "non-zero after", "MACs before", "after"]
    headings += ["file before", "after", "bits per weight before", "after"]
    cut = f"The first {LISTED}; all of them are in report.json." if len(layers) > LISTED else None
    return Html(table(headings, rows, label="layers") + (tag("p", cut, class_="hint") if cut else ""))
