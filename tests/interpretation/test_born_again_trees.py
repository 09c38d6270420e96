import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from efficientdnns.compress import compress
from efficientdnns.errors import ConfigurationError, DataError
from efficientdnns.fit import fit
from efficientdnns.interpretation.born_again_trees import (
    BornAgainTrees,
    as_oracle,
    best_split,
    fidelity,
    fit_batch,
    grow,
    smear,
    smear_in_box,
)
from efficientdnns.models import build
from efficientdnns.parts.decision_tree import DecisionTree
from efficientdnns.result import load
from efficientdnns.session import Session
from efficientdnns.task import Task


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_every_value_comes_from_its_column(seed, p_alt):
    data = torch.randn(20, 3, generator=seeded(seed))
    rows = smear(data, 50, p_alt, seeded(seed))
    for column in range(3):
        assert bool(torch.isin(rows[:, column], data[:, column]).all())


def test_nothing_altered_gives_training_rows_and_all_altered_independent_columns():
    data = torch.arange(30.0)[:, None].repeat(1, 2)
    assert bool((smear(data, 200, 0, seeded())[:, 0] == smear(data, 200, 0, seeded())[:, 1]).all())
    rows = smear(data, 20_000, 1, seeded())
    assert abs(float(torch.corrcoef(rows.T)[0, 1])) < 0.03
    pairs = smear(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 20_000, 1, seeded())
    for corner in itertools.product((0.0, 1.0), repeat=2):
        assert float((pairs == torch.tensor(corner)).all(1).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_the_expected_share_of_coordinates_is_kept():
    data = torch.arange(10.0)[:, None].repeat(1, 40)
    rows = smear(data, 5_000, 0.3, seeded())
    source = rows.mode(1).values
    assert float((rows == source[:, None]).float().mean()) == pytest.approx(0.7 + 0.3 / 10, abs=0.01)


@pytest.mark.parametrize("p_alt", [0.0, 0.25, 1.0])
def test_rows_of_a_box_are_those_that_rejection_keeps(p_alt):
    data = torch.randn(200, 4, generator=seeded(1))
    data[:, 1] += data[:, 0]
    box = {0: (-0.5, 1.0), 1: (0.0, torch.inf)}
    rows, probability = smear_in_box(data, box, 20_000, p_alt, seeded(2))
    free = smear(data, 60_000, p_alt, seeded(3))
    kept = free[(free[:, 0] > -0.5) & (free[:, 0] <= 1) & (free[:, 1] > 0)]
    assert bool(((rows[:, 0] > -0.5) & (rows[:, 0] <= 1) & (rows[:, 1] > 0)).all())
    assert probability == pytest.approx(len(kept) / len(free), abs=0.01)
    torch.testing.assert_close(rows.mean(0), kept.mean(0), atol=0.04, rtol=0)
    torch.testing.assert_close(rows.T.cov(), kept.T.cov(), atol=0.06, rtol=0)
    left = smear_in_box(data, {**box, 2: (-torch.inf, 0.3)}, 10, p_alt)[1]
    right = smear_in_box(data, {**box, 2: (0.3, torch.inf)}, 10, p_alt)[1]
    assert left + right == pytest.approx(probability)


@pytest.mark.parametrize("criterion", ["gini", "entropy"])
def test_the_best_split_is_the_best_of_all(criterion):
    rows = torch.randint(0, 6, (60, 3), generator=seeded(4)).float()
    targets = nn.functional.one_hot(torch.randint(0, 3, (60,), generator=seeded(5)), 3).double()

    def impurity(part):
        p = part.mean(0)
        return float(1 - p.square().sum()) if criterion == "gini" else -float(torch.xlogy(p, p).sum())

    gains = {}
    for feature, cut in itertools.product(range(3), range(5)):
        left = rows[:, feature] <= cut
        if 0 < int(left.sum()) < 60:
            parts = sum(float(side.double().mean()) * impurity(targets[side]) for side in (left, ~left))
            gains[feature, cut] = impurity(targets) - parts
    feature, threshold, decrease = best_split(rows, targets, criterion)
    assert decrease == pytest.approx(max(gains.values()))
    assert gains[feature, int(threshold)] == pytest.approx(max(gains.values()))
    assert best_split(torch.ones(5, 2), targets[:5]) is None


def shallow(rows):
    """A tree of depth 3 on four features of four values each."""
    inner = torch.where(rows[:, 1] <= 1, rows[:, 2] <= 0, rows[:, 3] <= 2)
    classes = torch.where(rows[:, 0] <= 1, inner.long(), 2 * (rows[:, 2] <= 1).long())
    return nn.functional.one_hot(classes, 3).float()


def test_a_shallow_tree_is_found_again():
    everything = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float32)
    data = everything[torch.randint(256, (60,), generator=seeded(6))]
    oracle = as_oracle(shallow)
    nodes = grow(data, oracle, p_alt=0.5, samples_per_node=2000, require_training_instance=False, random=seeded(7))
    tree = DecisionTree.from_nodes(nodes, 4, True)
    assert torch.equal(tree(everything), oracle(everything))


def test_every_leaf_holds_a_training_instance_under_the_stop_rule():
    data = torch.randn(40, 3, generator=seeded(8))
    oracle = as_oracle(lambda rows: torch.stack([rows.prod(1), -rows.prod(1)], 1))
    options = {"samples_per_node": 300, "max_leaves": 60}
    strict = DecisionTree.from_nodes(grow(data, oracle, random=seeded(), **options), 3, True)
    assert set(strict.leaf(data).tolist()) == set(range(strict.leaves))
    free = grow(data, oracle, require_training_instance=False, random=seeded(), **options)
    assert strict.leaves < len(free) // 2 + 1


def test_more_leaves_fit_a_linear_oracle_better():
    data = torch.randn(300, 4, generator=seeded(9))
    oracle = as_oracle(lambda rows: rows @ torch.tensor([1.0, -2.0, 0.5, 0.0])[:, None], labels=False)
    scores = {size: 0.0 for size in (4, 16, 64)}
    for seed, size in itertools.product(range(5), scores):
        nodes = grow(data, oracle, samples_per_node=10 * size, max_leaves=size, labels=False, random=seeded(seed))
        tree = DecisionTree.from_nodes(nodes, 4, False)
        scores[size] += fidelity(tree, oracle, smear(data, 500, 0.25, seeded(99)), labels=False) / 5
    assert scores[4] < scores[16] < scores[64]
    assert scores[64] > 0.7


def test_the_batch_variant_grows_best_first_on_one_sample():
    data = torch.randn(100, 3, generator=seeded(10))
    oracle = as_oracle(lambda rows: rows[:, :1] + 2 * rows[:, 1:2], labels=False)
    sample = torch.cat([data, smear(data, 1000, 0.25, seeded(1))])
    scores = []
    for leaves in (4, 8, 16, 32):
        nodes = fit_batch(data, oracle, samples=1000, max_leaves=leaves, labels=False, random=seeded(1))
        scores.append(fidelity(DecisionTree.from_nodes(nodes, 3, False), oracle, sample, labels=False))
    assert scores == sorted(scores)


def test_oracles_of_any_kind_answer_alike():
    class Predictor:
        n_classes_ = 3

        def predict(self, rows):
            return shallow(torch.from_numpy(rows)).argmax(1).numpy()

    rows = torch.randint(0, 4, (30, 4)).float()
    assert torch.equal(as_oracle(Predictor())(rows), as_oracle(shallow)(rows))


@pytest.fixture(scope="module")
def digits():
    return Task.from_name("digits", size=8)


@pytest.fixture(scope="module")
def network(digits):
    torch.manual_seed(0)
    model = build("mlp", in_features=64, hidden=[64])
    fit(model, digits, epochs=15, quiet=True, optimizer="adam", learning_rate=5e-3)
    return model


@pytest.mark.parametrize(
    ("fields", "least"),
    [
        ({"samples_per_node": 200, "max_leaves": 40}, 0.6),
        ({"variant": "batch", "samples": 5000, "max_leaves": 100}, 0.7),
        ({"variant": "batch", "samples": 5000, "max_leaves": 100, "soft_labels": True}, 0.7),
    ],
)
def test_the_tree_takes_the_networks_place_and_is_saved(digits, network, fields, least, tmp_path):
    result = compress(network, digits, BornAgainTrees(**fields), quiet=True, latency=False)
    finding = result.report.methods[0].findings
    assert isinstance(result.model, DecisionTree)
    assert result.model.leaves == finding["leaves"] <= fields["max_leaves"]
    assert least < finding["fidelity"] <= 1
    assert result.after.macs == 0
    result.save(tmp_path)
    inputs = digits.evaluation.take(range(50)).inputs
    assert torch.equal(load(tmp_path)(inputs), result.model(inputs))


def test_more_samples_than_the_data_make_a_more_faithful_tree(digits, network):
    """The point of the method: at the same size, smeared samples beat the training inputs alone."""
    data = torch.cat([batch.inputs.flatten(1) for batch in digits.train.batches(512)])
    oracle = as_oracle(lambda rows: network(rows))
    test = digits.evaluation.take(range(500)).inputs.flatten(1)
    scores = []
    for samples in (1, 10_000):
        nodes = fit_batch(data, oracle, samples=samples, max_leaves=200, random=seeded())
        scores.append(fidelity(DecisionTree.from_nodes(nodes, 64, True), oracle, test))
    assert scores[1] > scores[0] + 0.01


def test_the_control_is_a_plain_tree_on_the_true_labels(digits, network):
    method = BornAgainTrees(variant="cart", max_leaves=30, prune=False)
    tree = compress(network, digits, method, quiet=True, latency=False).model
    batches = list(digits.train.batches(512))
    inputs, labels = torch.cat([b.inputs.flatten(1) for b in batches]), torch.cat([b.targets for b in batches])
    peer = DecisionTreeClassifier(max_leaf_nodes=30, random_state=0).fit(inputs.numpy(), labels.numpy())
    test = digits.evaluation.take(range(200)).inputs.flatten(1)
    assert tree(test).argmax(1).tolist() == peer.predict(test.numpy()).tolist()
    whole, pruned = (
        compress(network, digits, BornAgainTrees(variant="cart", prune=prune), quiet=True, latency=False).model
        for prune in (False, True)
    )
    assert pruned.leaves < whole.leaves
    inputs, labels = torch.randn(40, 3), torch.arange(40) % 2
    uncalibrated = Task((inputs, labels), num_classes=2, calibration_share=0.0)
    session = Session(model=network, task=uncalibrated, original=network)
    with pytest.raises(DataError, match="calibration split"):
        BornAgainTrees(variant="cart").check(session)
    unlabelled = Task(inputs, kind="classification", num_classes=2)
    session = Session(model=network, task=unlabelled, original=network)
    with pytest.raises(DataError, match="needs labels"):
        BornAgainTrees(variant="cart").check(session)


def test_what_cannot_work_is_refused_before_work(digits, network):
    with pytest.raises(ConfigurationError, match="max_leaves"):
        compress(network, digits, BornAgainTrees(require_training_instance=False), quiet=True)
    tokens = Task((torch.zeros(20, 6).long(),) * 2, kind="language-modelling", num_classes=5)
    session = Session(model=network, task=tokens, original=network)
    with pytest.raises(ConfigurationError, match="language-modelling"):
        BornAgainTrees().check(session)
    integers = Task((torch.zeros(20, 6).long(), torch.zeros(20).long()), num_classes=5)
    with pytest.raises(DataError, match="tensor of numbers"):
        BornAgainTrees().check(Session(model=network, task=integers, original=network))
