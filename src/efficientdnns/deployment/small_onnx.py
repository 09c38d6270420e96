"""ONNX files without what only a person would read: names, notes and shapes between the layers."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from typing import Any

DEFAULTS: dict[str, Any] = {"auto_pad": b"NOTSET", "group": 1, "alpha": 1.0, "beta": 1.0, "transA": 0, "allowzero": 0}
"""Attributes with these values mean what their absence means."""


def shrink(file: Any) -> None:
    """Make an ONNX model small, in place: nodes and initialisers that nothing reads go, equal small initialisers become
    one, inner tensors get the shortest names, and notes, inferred shapes and default attributes are left out.

    Inputs and outputs keep their names, and what the graph computes is the same.
    """
    graph = file.graph
    _drop_dead(graph)
    _share_equal(graph)
    for node in graph.node:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
        kept = [attribute for attribute in node.attribute if not _is_default(node, attribute)]
        del node.attribute[:]
        node.attribute.extend(kept)
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    del graph.value_info[:], graph.metadata_props[:], graph.quantization_annotation[:]
    graph.name, graph.doc_string, file.doc_string = "g", "", ""
    if not file.functions and not any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        _rename(graph)


def _drop_dead(graph: Any) -> None:
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            needed.update(_captured(node))
            kept.append(node)
    kept.reverse()
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(initializers)


def _captured(node: Any) -> set[str]:
    """Names that the bodies of a loop or a condition read from around it."""
    inner = [part for attribute in node.attribute if attribute.HasField("g") for part in attribute.g.node]
    return {name for part in inner for name in (*part.input, *_captured(part))}


def _share_equal(graph: Any, most_bytes: int = 256) -> None:
    same: dict[bytes, str] = {}
    other: dict[str, str] = {}
    kept = []
    for tensor in graph.initializer:
        name = tensor.name
        if tensor.ByteSize() <= most_bytes:
            tensor.name = ""
            first = same.setdefault(tensor.SerializeToString(deterministic=True), name)
            tensor.name = name
            if first != name:
                other[name] = first
                continue
        kept.append(tensor)
    if not other or any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return
    outputs = {value.name for value in graph.output}
    if outputs & other.keys():
        return
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        node.input[:] = [other.get(name, name) for name in node.input]


def _is_default(node: Any, attribute: Any) -> bool:
    from onnx import helper

    value = helper.get_attribute_value(attribute)
    if attribute.name in ("dilations", "strides") and "Pool" not in node.op_type:
        return all(number == 1 for number in value)
    if attribute.name == "pads":
        return not any(value)
    # LeakyRelu, Elu and others have another default.
    if attribute.name in ("alpha", "beta") and node.op_type != "Gemm":
        return False
    return attribute.name in DEFAULTS and DEFAULTS[attribute.name] == value


def _rename(graph: Any) -> None:
    fixed = {value.name for value in (*graph.input, *graph.output)}
    new: dict[str, str] = {"": ""} | {name: name for name in fixed}
    names = (name for name in _short_names() if name not in fixed)
    for node in graph.node:  # in order of use, so that names are short where there are many
        for name in (*node.input, *node.output):
            if name not in new:
                new[name] = next(names)
        node.input[:] = [new[name] for name in node.input]
        node.output[:] = [new[name] for name in node.output]
    for tensor in graph.initializer:
        tensor.name = new[tensor.name]


def _short_names() -> Iterator[str]:
    """a, b, ..., Z, aa, ab, ..."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_letters, repeat=length):
            yield "".join(letters)
