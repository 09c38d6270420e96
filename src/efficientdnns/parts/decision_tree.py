"""Axis-aligned decision trees: nodes, cost-complexity pruning, a module that predicts and prints itself as code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficientdnns.surgery.structure import rebuildable


@dataclass
class Node:
    """A node of a tree in the making; a tree is a list of nodes, the root first and children after their parent."""

    value: Tensor
    """Mean target of the samples in it, (outputs,): class shares, or numbers."""
    cost: float
    """Cost as a leaf, weighted with the probability of reaching it."""
    feature: int = -1
    threshold: float = 0.0
    left: int = -1
    """Child for x[feature] <= threshold; -1 in a leaf."""
    right: int = -1

    @property
    def is_leaf(self) -> bool:
        """Whether it has no children."""
        return self.left < 0


@rebuildable
class DecisionTree(nn.Module):
    """A binary tree on float32 features: no multiplications, as many comparisons as its depth.

    Takes (batch, ...), flattened to ``features`` values a sample; returns (batch, outputs): one-hot classes where
    leaves hold labels, else the leaf's values. A sample goes left where ``x[feature] <= threshold``; NaN goes right.
    """

    def __init__(self, features: int, splits: int, outputs: int, depth: int, labels: bool) -> None:
        super().__init__()
        self.features, self.splits, self.outputs, self.depth, self.labels = features, splits, outputs, depth, labels
        small = torch.int16 if max(features, 2 * splits + 1, outputs) < 1 << 15 else torch.int32
        self.feature: Tensor
        self.threshold: Tensor
        self.left: Tensor
        self.right: Tensor
        self.value: Tensor
        self.register_buffer("feature", torch.zeros(splits, dtype=small))
        self.register_buffer("threshold", torch.zeros(splits))
        # Numbers below ``splits`` are inner nodes, the rest leaves.
        self.register_buffer("left", torch.zeros(splits, dtype=small))
        self.register_buffer("right", torch.zeros(splits, dtype=small))
        shape = (splits + 1,) if labels else (splits + 1, outputs)
        self.register_buffer("value", torch.zeros(shape, dtype=small if labels else torch.float32))

    @classmethod
    def from_nodes(cls, nodes: Sequence[Node], features: int, labels: bool) -> DecisionTree:
        """The module of a finished tree; with ``labels`` a leaf keeps its most frequent class alone."""
        inner = [i for i, node in enumerate(nodes) if not node.is_leaf]
        leaves = [i for i, node in enumerate(nodes) if node.is_leaf]
        number = {old: new for new, old in enumerate([*inner, *leaves])}
        depths = [0] * len(nodes)
        for i in inner:
            depths[nodes[i].left] = depths[nodes[i].right] = depths[i] + 1
        tree = cls(features, len(inner), len(nodes[0].value), max(depths), labels)
        for k, i in enumerate(inner):
            node = nodes[i]
            tree.feature[k], tree.threshold[k] = node.feature, node.threshold
            tree.left[k], tree.right[k] = number[node.left], number[node.right]
        for k, i in enumerate(leaves):
            tree.value[k] = nodes[i].value.argmax() if labels else nodes[i].value
        return tree

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {name: getattr(self, name) for name in ("features", "splits", "outputs", "depth", "labels")}

    @property
    def leaves(self) -> int:
        """Number of leaves."""
        return self.splits + 1

    def count_parameters(self) -> tuple[int, int]:
        """A threshold for each split and the values of the leaves."""
        total = self.splits + self.value.numel()
        return total, total

    def leaf(self, x: Tensor) -> Tensor:
        """Number of the leaf of each sample, (batch,)."""
        x = x.flatten(1).float()
        feature, left, right = self.feature.long(), self.left.long(), self.right.long()
        node = torch.zeros(len(x), dtype=torch.long, device=x.device)
        for _ in range(self.depth):
            split = node.clamp(max=self.splits - 1)
            goes_left = x.gather(1, feature[split, None])[:, 0] <= self.threshold[split]
            node = torch.where(node < self.splits, torch.where(goes_left, left[split], right[split]), node)
        return node - self.splits

    def forward(self, x: Tensor) -> Tensor:
        value = self.value[self.leaf(x)]
        return F.one_hot(value.long(), self.outputs).float() if self.labels else value

    def to_code(self, language: Literal["c", "python"]) -> str:
        """A function ``predict`` that gives the class (or the values) of one sample, bit for bit as this module does.

        C: ``int predict(const float *x)``, or ``const float *predict(const float *x)`` for values. Python: ``x`` is a
        sequence of numbers, which are rounded to float32 first as a tensor's are.
        """
        return "\n".join(_c(self) if language == "c" else _python(self)) + "\n"


def between(low: float, high: float) -> float:
    """A float32 threshold t with low <= t < high, the middle where there is one."""
    middle = float(torch.tensor(low + (high - low) / 2, dtype=torch.float32))
    return middle if low <= middle < high else low


def round_down(threshold: float) -> float:
    """The largest float32 that is not above ``threshold``: it splits float32 values as ``threshold`` does."""
    nearest = torch.tensor(threshold, dtype=torch.float32)
    return float(nearest if float(nearest) <= threshold else torch.nextafter(nearest, torch.tensor(-math.inf)))


def prune(nodes: Sequence[Node], rows: Tensor, targets: Tensor, labels: bool) -> list[Node]:
    r"""Minimal cost-complexity pruning, :math:`R_\alpha(T) = \sum_{leaves} cost + \alpha\,|leaves|`.

    The weakest links are cut one after the other; of that sequence of trees the one with the least error on a fresh
    sample is returned, of equally good ones the smallest.

    Args:
        nodes: the grown tree.
        rows: fresh samples, (n, features).
        targets: what the oracle says of them, (n, outputs): one-hot where ``labels``.
        labels: the error is the share of wrong classes; else the squared error.
    """
    size = len(nodes)
    parent = [-1] * size
    fresh = _errors(nodes, rows, targets, labels)
    cost, error, leaves = [node.cost for node in nodes], list(fresh), [1] * size
    for i in reversed(range(size)):
        if not nodes[i].is_leaf:
            children = (nodes[i].left, nodes[i].right)
            parent[children[0]] = parent[children[1]] = i
            cost[i], error[i], leaves[i] = (sum(part[c] for c in children) for part in (cost, error, leaves))  # type: ignore[assignment]

    def strength(i: int) -> float:
        return (nodes[i].cost - cost[i]) / (leaves[i] - 1)

    links = torch.full((size,), math.inf, dtype=torch.float64)
    for i in range(size):
        if not nodes[i].is_leaf:
            links[i] = strength(i)
    cuts: list[int] = []
    best, best_error = 0, error[0]
    while leaves[0] > 1:
        weakest = int(links.argmin())
        cuts.append(weakest)
        for i in _subtree(nodes, weakest):
            links[i] = math.inf
        lost = leaves[weakest] - 1
        changes = nodes[weakest].cost - cost[weakest], fresh[weakest] - error[weakest]
        i = weakest
        while i >= 0:
            cost[i], error[i], leaves[i] = cost[i] + changes[0], error[i] + changes[1], leaves[i] - lost
            if leaves[i] > 1:
                links[i] = strength(i)
            i = parent[i]
        if error[0] <= best_error + 1e-9:
            best, best_error = len(cuts), error[0]
    return _without(nodes, set(cuts[:best]))


def _errors(nodes: Sequence[Node], rows: Tensor, targets: Tensor, labels: bool) -> list[float]:
    """The error of every node on the samples that reach it, were it a leaf."""
    reached = {0: torch.arange(len(rows))}
    errors = [0.0] * len(nodes)
    for i, node in enumerate(nodes):
        here = reached.pop(i)
        own = targets[here]
        wrong = (own.argmax(1) != node.value.argmax()) if labels else (own - node.value).square().sum(1)
        errors[i] = float(wrong.sum())
        if not node.is_leaf:
            goes_left = rows[here, node.feature] <= node.threshold
            reached[node.left], reached[node.right] = here[goes_left], here[~goes_left]
    return errors


def _subtree(nodes: Sequence[Node], root: int) -> Iterator[int]:
    pending = [root]
    while pending:
        i = pending.pop()
        yield i
        if not nodes[i].is_leaf:
            pending += [nodes[i].left, nodes[i].right]


def _without(nodes: Sequence[Node], cut: set[int]) -> list[Node]:
    """The tree with the nodes of ``cut`` as leaves, renumbered."""
    kept: list[Node] = []
    pending = [(0, -1, "")]
    while pending:
        i, above, side = pending.pop()
        leaf = nodes[i].is_leaf or i in cut
        kept.append(replace(nodes[i], feature=-1, left=-1, right=-1) if leaf else replace(nodes[i]))
        if above >= 0:
            setattr(kept[above], side, len(kept) - 1)
        if not leaf:
            pending += [(nodes[i].right, len(kept) - 1, "right"), (nodes[i].left, len(kept) - 1, "left")]
    return kept


def _c(tree: DecisionTree) -> Iterator[str]:
    def number(value: float) -> str:
        text = f"{value:.9g}"
        return text + ("f" if any(mark in text for mark in ".en") else ".0f")

    yield f"/* Decision tree: {tree.features} features, {tree.leaves} leaves, depth {tree.depth}. */"
    if not tree.labels:
        yield f"static const float value[{tree.leaves}][{tree.outputs}] = {{"
        for values in tree.value.tolist():
            yield "    {" + ", ".join(number(v) for v in values) + "},"
        yield "};"
    yield ("int" if tree.labels else "const float *") + " predict(const float *x) {"
    for depth, kind, what in _walk(tree):
        indent = "    " * (depth + 1)
        if kind == "split":
            yield f"{indent}if (x[{int(tree.feature[what])}] <= {number(float(tree.threshold[what]))}) {{"
        elif kind == "else":
            yield f"{indent}}} else {{"
        elif kind == "end":
            yield f"{indent}}}"
        else:
            yield f"{indent}return {int(tree.value[what]) if tree.labels else f'value[{what}]'};"
    yield "}"


def _python(tree: DecisionTree) -> Iterator[str]:
    yield "from array import array"
    yield ""
    yield ""
    yield "def predict(x):"
    yield f'    """Decision tree: {tree.features} features, {tree.leaves} leaves, depth {tree.depth}."""'
    yield '    x = array("f", x)'
    for depth, kind, what in _walk(tree):
        indent = "    " * (depth + 1)
        if kind == "split":
            yield f"{indent}if x[{int(tree.feature[what])}] <= {float(tree.threshold[what])!r}:"
        elif kind == "else":
            yield f"{indent}else:"
        elif kind == "leaf":
            value = int(tree.value[what]) if tree.labels else tuple(tree.value[what].tolist())
            yield f"{indent}return {value!r}"


def _walk(tree: DecisionTree) -> Iterator[tuple[int, str, int]]:
    """(depth, "split" | "else" | "end" | "leaf", number of the split or leaf) in the order of the code."""
    pending = [(0, "node", 0)]
    while pending:
        depth, kind, node = pending.pop()
        if kind == "node" and node >= tree.splits:
            yield depth, "leaf", node - tree.splits
        elif kind == "node":
            left, right = int(tree.left[node]), int(tree.right[node])
            pending += [
                (depth, "end", node),
                (depth + 1, "node", right),
                (depth, "else", node),
                (depth + 1, "node", left),
            ]
            yield depth, "split", node
        else:
            yield depth, kind, node
