"""Born again trees: one decision tree that imitates a trained predictor, grown on made-up inputs that it labels.

Labels cost nothing, so every node is split on as many samples as it needs.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from efficientdnns.data.split import Split
from efficientdnns.errors import ConfigurationError, DataError
from efficientdnns.method import Method, Need, Paper
from efficientdnns.parts.decision_tree import DecisionTree, Node, between, prune, round_down
from efficientdnns.session import Session
from efficientdnns.task import Task

Oracle = Callable[[Tensor], Tensor]
"""Rows (n, features) to what the predictor says (n, outputs): one-hot classes, class probabilities or numbers."""
Box = dict[int, tuple[float, float]]
"""The tests on the way to a node: feature -> (low, high), for low < x <= high."""


def smear(data: Tensor, count: int, p_alt: float, random: torch.Generator | None = None) -> Tensor:
    """``count`` artificial rows: a random row of ``data`` in which each coordinate is replaced, with probability
    ``p_alt``, by that of another random row, drawn anew for every coordinate."""
    return smear_in_box(data, {}, count, p_alt, random)[0]


def smear_in_box(
    data: Tensor, box: Box, count: int, p_alt: float, random: torch.Generator | None = None
) -> tuple[Tensor, float]:
    r"""Smeared rows that fall into a box, and the probability p_t that a smeared row does.

    Coordinates are altered independently, so both are exact: row a of ``data`` is the source with weight
    :math:`\prod_j (1-p)[a_j \in B_j] + p\,q_j`, where q_j is the share of the data with :math:`x_j \in B_j`; the mean
    of the weights is p_t. The rows are distributed as those that rejection would keep, at any depth.
    """
    samples, features = data.shape
    inside = {j: (data[:, j] > low) & (data[:, j] <= high) for j, (low, high) in box.items()}
    weight = torch.ones(samples, dtype=torch.float64)
    for mask in inside.values():
        weight *= (1 - p_alt) * mask + p_alt * float(mask.double().mean())
    source = torch.multinomial(weight, count, replacement=True, generator=random)
    donors = torch.randint(samples, (count, features), generator=random)
    chance = torch.rand(count, features, generator=random)
    rows = torch.where(chance < p_alt, data.gather(0, donors), data[source])
    for j, mask in inside.items():
        share = p_alt * float(mask.double().mean())
        keeps = mask[source] & (chance[:, j] >= share / (1 - p_alt + share))
        able = mask.nonzero()[:, 0]
        donor = able[torch.randint(len(able), (count,), generator=random)]
        rows[:, j] = torch.where(keeps, data[source, j], data[donor, j])
    return rows, float(weight.mean())


def best_split(rows: Tensor, targets: Tensor, criterion: str = "gini") -> tuple[int, float, float] | None:
    """Feature, threshold and decrease of the mean impurity of the best axis-aligned split; None where there is none.

    Args:
        rows: (n, features).
        targets: (n, outputs), float64. The variance of one-hot classes, summed over the classes, is the Gini impurity.
        criterion: "gini" (variance) or "entropy" (targets are distributions).
    """
    n = len(rows)
    columns = (rows != rows[0]).any(0).nonzero()[:, 0]
    if n < 2 or not len(columns):
        return None
    values, order = rows[:, columns].sort(dim=0)
    left_size = torch.arange(1, n, dtype=torch.float64)[:, None]
    score, whole = torch.zeros(n - 1, len(columns), dtype=torch.float64), 0.0

    def purity(total: Tensor, size: Tensor) -> Tensor:
        return torch.xlogy(total, total / size) if criterion == "entropy" else total.square() / size

    for target in targets.T:
        sums = target[order].cumsum(0)
        left, total = sums[:-1], sums[-1:]
        # Differences of sums can fall below zero by rounding.
        right = (total - left).clamp_min(0) if criterion == "entropy" else total - left
        score += purity(left, left_size) + purity(right, n - left_size)
        whole += float(purity(target.sum(), torch.tensor(float(n))))
    score[values[1:] <= values[:-1]] = -torch.inf
    position, column = divmod(int(score.argmax()), len(columns))
    decrease = (float(score[position, column]) - whole) / n
    if decrease <= 1e-12:
        return None
    low, high = float(values[position, column]), float(values[position + 1, column])
    return int(columns[column]), between(low, high), decrease


@dataclass
class _Open:
    """A leaf that may still be split."""

    node: int
    box: Box
    members: Tensor
    """Numbers of the training rows in it."""
    split: tuple[int, float, float]


def grow(
    data: Tensor,
    oracle: Oracle,
    *,
    p_alt: float = 0.25,
    samples_per_node: int = 1000,
    max_leaves: int | None = None,
    criterion: str = "gini",
    labels: bool = True,
    require_training_instance: bool = True,
    random: torch.Generator | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Node]:
    """Grow a tree best-first, every node on ``samples_per_node`` smeared rows of its own box, labelled by the oracle.

    A node is a leaf where the oracle is constant, where the best split would leave a child without a row of ``data``
    (``require_training_instance``), or when ``max_leaves`` are there. ``advance`` is called after every split.
    """
    nodes: list[Node] = []
    queue: list[tuple[float, int, _Open]] = []

    def add(box: Box, members: Tensor) -> int:
        rows, probability = smear_in_box(data, box, samples_per_node, p_alt, random)
        targets = oracle(rows).double()
        value = targets.mean(0)
        impurity = 1 - float(value.max()) if labels else float(targets.var(0, correction=0).sum())
        nodes.append(Node(value.float(), impurity * probability))
        split = best_split(rows, targets, criterion) if impurity > 1e-12 else None
        if split is not None:
            goes_left = data[members, split[0]] <= split[1]
            number = len(nodes) - 1
            if not require_training_instance or 0 < int(goes_left.sum()) < len(members):
                heapq.heappush(queue, (-probability * split[2], number, _Open(number, box, members, split)))
        return len(nodes) - 1

    add({}, torch.arange(len(data)))
    leaves = 1
    while queue and (max_leaves is None or leaves < max_leaves):
        leaf = heapq.heappop(queue)[2]
        feature, threshold, _ = leaf.split
        low, high = leaf.box.get(feature, (-torch.inf, torch.inf))
        goes_left = data[leaf.members, feature] <= threshold
        node = nodes[leaf.node]
        node.feature, node.threshold = feature, threshold
        node.left = add({**leaf.box, feature: (low, threshold)}, leaf.members[goes_left])
        node.right = add({**leaf.box, feature: (threshold, high)}, leaf.members[~goes_left])
        leaves += 1
        advance()
    return nodes


def fit_batch(
    data: Tensor,
    oracle: Oracle,
    *,
    p_alt: float = 0.25,
    samples: int = 20_000,
    max_leaves: int | None = None,
    criterion: str = "gini",
    labels: bool = True,
    seed: int = 0,
    random: torch.Generator | None = None,
) -> list[Node]:
    """The batch variant: CART on ``samples`` smeared rows and the data, all labelled by the oracle."""
    rows = torch.cat([data, smear(data, samples, p_alt, random)])
    return fit_cart(rows, oracle(rows), max_leaves=max_leaves, criterion=criterion, labels=labels, seed=seed)


def fit_cart(
    rows: Tensor,
    targets: Tensor,
    *,
    max_leaves: int | None = None,
    criterion: str = "gini",
    labels: bool = True,
    seed: int = 0,
) -> list[Node]:
    """scikit-learn's CART on ``rows`` (n, features) and ``targets`` (n, outputs), one-hot where ``labels``."""
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

    if labels:
        estimator = DecisionTreeClassifier(criterion=criterion, max_leaf_nodes=max_leaves, random_state=seed)
        tree = estimator.fit(rows.numpy(), targets.argmax(1).numpy()).tree_
        columns = torch.from_numpy(estimator.classes_)
    else:
        tree = (
            DecisionTreeRegressor(max_leaf_nodes=max_leaves, random_state=seed).fit(rows.numpy(), targets.numpy()).tree_
        )
        columns = torch.arange(targets.shape[1])
    values = torch.zeros(tree.node_count, targets.shape[1])
    values[:, columns] = torch.from_numpy(tree.value).float().reshape(tree.node_count, -1)
    share = torch.from_numpy(tree.weighted_n_node_samples / tree.weighted_n_node_samples[0])
    # scikit-learn's impurity is the mean over the outputs.
    impurity = 1 - values.max(1).values if labels else torch.from_numpy(tree.impurity) * targets.shape[1]
    arrays = (tree.feature, tree.threshold, tree.children_left, tree.children_right)
    return [
        Node(value, float(cost), int(feature), round_down(float(threshold)), int(left), int(right))
        for value, cost, feature, threshold, left, right in zip(values, impurity * share, *arrays)
    ]


def as_oracle(predictor: Any, *, labels: bool = True) -> Oracle:
    """An oracle of a network, of a function, or of any object with ``predict`` (or ``predict_proba``) on NumPy rows.

    With ``labels`` outputs (n, classes) become one-hot; class numbers, which ``predict`` may give, are taken as columns.
    """

    @torch.no_grad()
    def ask(rows: Tensor) -> Tensor:
        if hasattr(predictor, "predict_proba"):
            outputs = torch.as_tensor(predictor.predict_proba(rows.numpy()))
        elif hasattr(predictor, "predict"):
            outputs = torch.as_tensor(predictor.predict(rows.numpy()))
        else:
            outputs = torch.cat([predictor(part) for part in rows.split(1024)])
        if labels and outputs.dim() == 1:
            classes = int(getattr(predictor, "n_classes_", int(outputs.max()) + 1))
            return nn.functional.one_hot(outputs.long(), classes).float()
        outputs = outputs.reshape(len(rows), -1)
        return nn.functional.one_hot(outputs.argmax(1), outputs.shape[1]).float() if labels else outputs.float()

    return ask


def fidelity(tree: Callable[[Tensor], Tensor], oracle: Oracle, rows: Tensor, *, labels: bool = True) -> float:
    """Share of the rows on which tree and oracle agree; for numbers the R^2 of the tree against the oracle."""
    own, target = tree(rows), oracle(rows)
    if labels:
        return float((own.argmax(1) == target.argmax(1)).double().mean())
    rest = (target - own).square().sum() / (target - target.mean(0)).square().sum().clamp_min(1e-30)
    return 1 - float(rest)


def true_labels(task: Task, split: Split) -> tuple[Tensor, Tensor]:
    """Rows (n, features) and labels (n, outputs) of a split; classes are one-hot."""
    batches = list(split.batches(1024))
    targets = torch.cat([torch.as_tensor(batch.targets) for batch in batches]).cpu()
    if task.kind == "classification":
        assert task.num_classes is not None
        targets = nn.functional.one_hot(targets.long(), task.num_classes)
    rows = torch.cat([batch.inputs.flatten(1).float().cpu() for batch in batches])
    return rows, targets.reshape(len(rows), -1).float()


class BornAgainTrees(Method):
    r"""Born again trees, `Breiman and Shang, 1996 <https://www.stat.berkeley.edu/~breiman/BAtrees.pdf>`_.

    The result is one axis-aligned tree in place of the network. Inputs are *smeared* training inputs: a copy in which
    every coordinate is replaced, with probability ``p_alt``, by that of a training input drawn for this coordinate. At
    a node t of the tree N_s smeared inputs that fall into it are labelled by the network, and the split is made that
    lowers the cost most, with p_t the probability of reaching t:

    .. math:: cost(t) = \left(1 - \max_j p(j|t)\right) p_t \quad\text{or}\quad \mathrm{Var}(g|t)\, p_t

    A node stays a leaf where a child would hold no training input. The tree is pruned by
    :math:`\sum_{leaves} cost + \alpha |leaves|` on a fresh sample. It is for tables: pixels
    depend too much on each other.

    The report gives the fidelity on the calibration inputs (share of equal answers, or R^2) beside the number of
    leaves.

    Deviations:
        The report was not available; this follows secondary descriptions. Inputs of a node are drawn from their exact
        distribution instead of by rejection, and p_t is computed. Splits are chosen by Gini impurity, entropy or
        variance, as in CART, and the leaf of the largest gain is split first. ``variant="batch"`` grows scikit-learn's
        tree on one smeared sample; it knows no stop rule. ``variant="cart"`` is the control: the same tree on the
        training inputs and their own labels, pruned on the calibration inputs and theirs.
    """

    paper: ClassVar[Paper | None] = Paper(
        id="born-again-trees",
        title="Born Again Trees",
        authors="Leo Breiman, Nong Shang",
        venue="Technical report, University of California, Berkeley",
        year=1996,
        url="https://www.stat.berkeley.edu/~breiman/BAtrees.pdf",
    )
    kind: ClassVar[str] = "interpretation"
    needs: ClassVar[frozenset[Need]] = frozenset({"training data"})
    contract_fields: ClassVar[dict[str, Any]] = {"max_leaves": 16, "samples_per_node": 100, "samples": 500}

    variant: Literal["node", "batch", "cart"] = "node"
    """New samples at every node, one sample for the whole tree, or the true labels of the training inputs alone."""
    p_alt: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability that a coordinate is altered; 0.1 to 0.5 is usual."""
    samples_per_node: PositiveInt = 1000
    """N_s."""
    samples: PositiveInt = 20_000
    """Size of the sample that prunes, and of the one that the batch variant is grown on."""
    max_leaves: PositiveInt | None = None
    """Most leaves; None grows until the other rules stop."""
    criterion: Literal["gini", "entropy"] = "gini"
    """Impurity of classes; numbers and soft labels go by variance, which for classes is 'gini'."""
    prune: bool = True
    """Prune on a fresh sample."""
    soft_labels: bool = False
    """Imitate the class probabilities instead of the classes."""
    require_training_instance: bool = True
    """The stop rule; without it the tree grows until the network is constant in every leaf."""

    def check(self, session: Session) -> None:
        super().check(session)
        task = session.task
        if task.kind not in ("classification", "regression"):
            raise ConfigurationError(f"{self.name} imitates classes or numbers, not {task.kind}; use another method")
        if not isinstance(task.example_input, Tensor) or not task.example_input.is_floating_point():
            raise DataError(f"{self.name} needs one tensor of numbers as input; task '{task.name}' has something else")
        if self.variant == "node" and not self.require_training_instance and self.max_leaves is None:
            raise ConfigurationError(f"{self.name} without the stop rule may grow for ever; give max_leaves")
        if self.variant == "cart":
            if not task.has_labels:
                raise DataError(f"{self.name}: variant 'cart' needs labels, and '{task.name}' has none; write 'batch'")
            if self.prune and task.calibration is None:
                raise DataError(f"{self.name}: variant 'cart' needs a calibration split to prune; write prune: false")

    def apply(self, session: Session) -> None:
        task, network, train = session.task, session.model.eval(), session.task.train
        assert train is not None
        labels = task.kind == "classification" and not self.soft_labels
        shape = task.example_input.shape[1:]
        data = torch.cat([batch.inputs.flatten(1).float().cpu() for batch in train.batches(1024)])

        def ask(rows: Tensor) -> Tensor:
            outputs = task.outputs(network, rows.view(-1, *shape).to(session.device)).float().cpu()
            return outputs.softmax(1) if task.kind == "classification" else outputs

        oracle = as_oracle(ask, labels=labels)
        random = torch.Generator().manual_seed(session.seed)
        if self.variant == "cart":
            rows, targets = true_labels(task, train)
            options: dict[str, Any] = {"labels": labels, "criterion": self.criterion, "seed": session.seed}
            nodes = fit_cart(rows, targets, max_leaves=self.max_leaves, **options)
        else:
            nodes = self._grow(session, data, oracle, labels, random)
        grown = (len(nodes) + 1) // 2
        if self.prune:
            if self.variant == "cart" and task.calibration is not None:
                fresh, answers = true_labels(task, task.calibration)
            else:
                fresh = smear(data, self.samples, self.p_alt, random)
                answers = oracle(fresh)
            nodes = prune(nodes, fresh, answers, labels)
        tree = DecisionTree.from_nodes(nodes, data.shape[1], labels).eval()
        finding: dict[str, Any] = {"leaves": tree.leaves, "depth": tree.depth, "leaves_before_pruning": grown}
        if task.calibration is not None:
            held_out = torch.cat([x.flatten(1).float().cpu() for x in session.calibration(len(task.calibration))])
            finding |= {"fidelity": fidelity(tree, oracle, held_out, labels=labels), "fidelity_split": "calibration"}
        session.report(**finding)
        session.say(f"{tree.leaves} leaves, fidelity {finding.get('fidelity', float('nan')):.3f}")
        session.model = tree.to(session.device)
        session.sparse.clear()
        session.codecs.clear()

    def _grow(
        self, session: Session, data: Tensor, oracle: Oracle, labels: bool, random: torch.Generator
    ) -> list[Node]:
        common: dict[str, Any] = {
            "p_alt": self.p_alt,
            "max_leaves": self.max_leaves,
            "labels": labels,
            "random": random,
        }
        common["criterion"] = self.criterion if labels else "gini"
        if self.variant == "batch":
            return fit_batch(data, oracle, samples=self.samples, seed=session.seed, **common)
        with session.progress.task(session.label, self.max_leaves or len(data)) as bar:
            return grow(
                data,
                oracle,
                samples_per_node=self.samples_per_node,
                require_training_instance=self.require_training_instance,
                advance=bar.advance,
                **common,
            )
