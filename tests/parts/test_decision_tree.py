import ctypes
import math
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientdnns.measurement import count_macs
from efficientdnns.measurement.size import parameter_count
from efficientdnns.parts.decision_tree import DecisionTree, Node, between, prune, round_down
from efficientdnns.surgery.structure import apply_difference, difference


def random_nodes(depth, features, outputs, seed=0):
    g = torch.Generator().manual_seed(seed)
    nodes = []

    def index(node):
        return next(i for i, other in enumerate(nodes) if other is node)

    def grow(level):
        value = torch.rand(outputs, generator=g)
        node = Node(value / value.sum(), float(torch.rand((), generator=g)) / 2**level)
        nodes.append(node)
        if level < depth and (level == 0 or torch.rand((), generator=g) < 0.8):
            node.feature = int(torch.randint(features, (), generator=g))
            node.threshold = float(torch.randn((), generator=g))
            node.left = index(grow(level + 1))
            node.right = index(grow(level + 1))
        return node

    grow(0)
    return nodes


def walk(nodes, x):
    node = nodes[0]
    while not node.is_leaf:
        node = nodes[node.left if x[node.feature] <= node.threshold else node.right]
    return node.value


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 7])
def test_the_module_follows_the_nodes(labels, depth):
    nodes = random_nodes(depth, 5, 3)
    tree = DecisionTree.from_nodes(nodes, 5, labels)
    rows = torch.randn(50, 5, 1)
    expected = torch.stack([walk(nodes, x.flatten()) for x in rows])
    found = tree(rows)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    if labels:
        assert torch.equal(found.sum(1), torch.ones(50))
    else:
        assert torch.equal(found, expected)
    assert tree.leaves == sum(node.is_leaf for node in nodes)


def test_a_tree_has_no_macs_and_is_rebuilt_from_data():
    tree = DecisionTree.from_nodes(random_nodes(5, 4, 3), 4, True)
    rows = torch.randn(20, 4)
    assert count_macs(tree, rows).total == 0
    assert parameter_count(tree) == 2 * tree.leaves - 1
    again = apply_difference(torch.nn.Identity(), difference(tree, torch.nn.Identity()))
    again.load_state_dict(tree.state_dict())
    assert torch.equal(again(rows), tree(rows))


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 40))
def test_thresholds_separate_neighbouring_floats(low, steps):
    high = np.float32(low)
    for _ in range(steps):
        with np.errstate(over="ignore"):
            high = np.nextafter(high, np.float32(np.inf))
    if np.isfinite(high) and float(high) > low:
        assert low <= between(low, float(high)) < float(high)
    middle = (low + float(high)) / 2
    if math.isfinite(middle):
        rounded = round_down(middle)
        for value in (np.float32(low), high, np.float32(middle)):
            assert (float(value) <= middle) == (float(value) <= rounded)


def edges(tree, count):
    """Rows that lie on the thresholds, next to them and elsewhere."""
    rows = torch.randn(count, tree.features)
    for i in range(count):
        k = i % max(1, tree.splits)
        rows[i, int(tree.feature[k])] = tree.threshold[k]
        if i % 3 == 1:
            rows[i] = torch.nextafter(rows[i], torch.tensor(torch.inf))
    return rows


@pytest.mark.parametrize("labels", [True, False])
def test_python_code_predicts_bit_for_bit(labels):
    tree = DecisionTree.from_nodes(random_nodes(8, 6, 4, seed=3), 6, labels)
    space = {}
    exec(tree.to_code("python"), space)
    rows = edges(tree, 300)
    found = [space["predict"](x) for x in rows.tolist()]
    if labels:
        assert found == tree(rows).argmax(1).tolist()
    else:
        assert [list(values) for values in found] == tree(rows).tolist()
    double = 0.1 + torch.zeros(6, dtype=torch.float64)
    assert np.array_equal(
        np.ravel(space["predict"](double.tolist())), np.ravel(space["predict"](double.float().tolist()))
    )


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("labels", [True, False])
def test_c_code_predicts_bit_for_bit(tmp_path, labels):
    tree = DecisionTree.from_nodes(random_nodes(8, 6, 4, seed=3), 6, labels)
    (tmp_path / "tree.c").write_text(tree.to_code("c"))
    library = tmp_path / "tree.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, tmp_path / "tree.c"], check=True, timeout=60)
    predict = ctypes.CDLL(str(library)).predict
    predict.restype = ctypes.c_int if labels else ctypes.POINTER(ctypes.c_float)
    rows = edges(tree, 300)
    expected = tree(rows)
    for x, answer in zip(rows.tolist(), expected):
        found = predict((ctypes.c_float * 6)(*x))
        assert found == int(answer.argmax()) if labels else found[:4] == answer.tolist()


def test_pruning_cuts_what_a_fresh_sample_does_not_support():
    nodes = [
        Node(torch.tensor([0.5, 0.5]), 0.5, 0, 0.0, 1, 2),
        Node(torch.tensor([1.0, 0.0]), 0.1, 0, -1.0, 3, 4),
        Node(torch.tensor([0.0, 1.0]), 0.0),
        Node(torch.tensor([1.0, 0.0]), 0.0),
        Node(torch.tensor([0.0, 1.0]), 0.05),
    ]
    rows = torch.linspace(-2, 2, 101)[:, None]
    targets = torch.nn.functional.one_hot((rows[:, 0] > 0).long(), 2).float()
    pruned = prune(nodes, rows, targets, labels=True)
    assert len(pruned) == 3
    tree = DecisionTree.from_nodes(pruned, 1, True)
    assert torch.equal(tree(rows), targets)


def test_pruning_keeps_what_helps_and_never_does_worse():
    nodes = random_nodes(6, 3, 3, seed=5)
    rows = torch.randn(500, 3)
    full = DecisionTree.from_nodes(nodes, 3, True)
    kept = DecisionTree.from_nodes(prune(nodes, rows, full(rows), True), 3, True)
    assert torch.equal(kept(rows), full(rows))
    noise = torch.nn.functional.one_hot(torch.randint(3, (500,)), 3).float()
    less = DecisionTree.from_nodes(prune(nodes, rows, noise, True), 3, True)
    assert less.leaves <= full.leaves
    assert float((less(rows) * noise).sum()) >= float((full(rows) * noise).sum())
