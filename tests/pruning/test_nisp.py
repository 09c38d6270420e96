"""NISP: the ranker, the propagation, the cut."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import efficientdnns as ed
from efficientdnns.models import build
from efficientdnns.pruning.nisp import final_layer, infinite_feature_selection, propagate, spearman
from efficientdnns.surgery import ChannelGraph


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3)
    ).double()


def run(model, example, final, pruned=None):
    model = model.double().eval()
    graph = ChannelGraph.trace(model, example)
    return propagate(model, example, graph, graph.groups, final, final_layer(model, graph), pruned), graph


def test_a_linear_chain_is_the_product_of_absolute_weights() -> None:
    model = chain()
    s = torch.rand(4, dtype=torch.float64)
    scores, _ = run(model, torch.zeros(1, 5, dtype=torch.float64), s)
    torch.testing.assert_close(scores["4"], s)
    torch.testing.assert_close(scores["2"], model[4].weight.abs().T @ s)
    torch.testing.assert_close(scores["0"], model[2].weight.abs().T @ model[4].weight.abs().T @ s)


def test_scale_dead_neurons_and_pruned_neurons() -> None:
    model = chain()
    model[4].weight.data[:, 2] = 0
    s = torch.rand(4, dtype=torch.float64)
    x = torch.zeros(1, 5, dtype=torch.float64)
    scores, _ = run(model, x, s)
    tripled, _ = run(model, x, 3 * s)
    assert scores["2"][2] == 0
    for name, value in scores.items():
        assert (value >= 0).all()
        torch.testing.assert_close(tripled[name], 3 * value)
    pruned, _ = run(model, x, s, {"2": torch.tensor([5])})
    lost = model[2].weight[5].abs() * scores["2"][5]
    torch.testing.assert_close(scores["0"] - pruned["0"], lost)


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 1)])
def test_a_convolution_is_its_dense_matrix(stride, padding) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=stride, padding=padding),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1, 2),
    )
    x = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    features = model[:5].double()(x).shape[1]
    model[5] = nn.Linear(features, 2)
    s = torch.rand(features, dtype=torch.float64)
    scores, _ = run(model, x, s)
    weight = model[2].weight.abs()
    basis = torch.eye(3 * 36, dtype=torch.float64).reshape(-1, 3, 6, 6)
    dense = F.conv2d(basis, weight, stride=stride, padding=padding).flatten(1)  # (inputs, outputs)
    torch.testing.assert_close(scores["0"], (dense @ s).reshape(3, 36).sum(1))
    torch.testing.assert_close(scores["2"], s.reshape(4, -1).sum(1))


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.b(F.relu(self.a(x)))))


def test_a_fork_adds_skip_and_branch() -> None:
    model = Fork().double()
    s = torch.rand(5, dtype=torch.float64)
    scores, _ = run(model, torch.zeros(1, 4, dtype=torch.float64), s)
    through = model.a.weight.abs().T @ model.b.weight.abs().T @ s
    torch.testing.assert_close(scores["stem"], s + through)  # readers: the branch, and the head behind the sum
    torch.testing.assert_close(scores["a"], model.b.weight.abs().T @ s)


def test_batch_norm_scales_by_gamma_over_sigma() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    model.double()
    model[2].weight.data.normal_()
    model[2].running_var.uniform_(0.5, 2)
    s = torch.rand(4, dtype=torch.float64)
    scores, _ = run(model, torch.zeros(1, 1, 3, 3, dtype=torch.float64), s)
    scale = model[2].weight.abs() / (model[2].running_var + model[2].eps).sqrt()
    torch.testing.assert_close(scores["0"], model[1].weight.abs()[:, :, 0, 0].T @ (scale * s))


def test_kept_set_is_optimal_for_the_relaxed_problem() -> None:
    scores = torch.rand(6)
    from efficientdnns.parts.structured import lowest

    gone = set(lowest(scores, 0.5).tolist())
    kept = sum(float(scores[i]) for i in range(6) if i not in gone)
    assert kept == pytest.approx(max(sum(float(scores[i]) for i in c) for c in itertools.combinations(range(6), 3)))


def test_inf_fs_is_the_sum_over_all_path_lengths() -> None:
    x = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 1, 1, 0.5])
    scores = infinite_feature_selection(x)
    deviation = x.std(0)
    spread = torch.maximum(deviation[:, None], deviation[None])
    spread = (spread - spread.min()) / (spread.max() - spread.min())
    a = 0.5 * spread + 0.5 * (1 - spearman(x).abs())
    r = 0.9 / torch.linalg.eigvalsh(a).abs().max()
    total, power = torch.zeros_like(a), torch.eye(6, dtype=a.dtype)
    for _ in range(400):
        power = power @ (r * a)
        total += power
    torch.testing.assert_close(scores, total.sum(1))


def test_inf_fs_prefers_features_that_say_something_new() -> None:
    x = torch.randn(200, 5, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0)
    x[:, 1] = x[:, 0]
    scores = infinite_feature_selection(x)
    assert scores[:2].max() < scores[2:].min()


def test_constant_features_get_the_lowest_score() -> None:
    x = torch.randn(40, 5)
    x[:, 3] = 2.0
    scores = infinite_feature_selection(x)
    assert torch.isfinite(scores).all()
    assert scores[3] == scores.min()


def test_ranks_are_averaged_over_ties() -> None:
    x = torch.tensor([[1.0, 1], [2, 2], [2, 3], [4, 4]], dtype=torch.float64)
    assert spearman(x)[0, 1] == pytest.approx(0.9486833)


def test_cuts_every_layer_and_beats_random(trained, digits) -> None:
    result = ed.compress(trained, digits, [ed.NISP(pruning_ratio=0.5)], quiet=True, latency=False)
    widths = result.report.methods[0].findings["widths"]
    assert all(after == before - before // 2 for before, after in widths.values())
    assert result.after.macs < 0.4 * result.before.macs
    assert result.after.metric.value > 40  # random channels leave about a fifth right


def test_controls_rank_by_size_or_by_chance(trained, digits) -> None:
    weight = trained.fc1.weight.detach().clone()

    def kept(importance: str, seed: int = 0) -> torch.Tensor:
        method = ed.NISP(ratios={"conv1": 0, "conv2": 0}, pruning_ratio=0.5, importance=importance)
        result = ed.compress(trained, digits, [method], seed=seed, quiet=True, latency=False)
        small = result.model.fc1.weight.detach()
        return (weight[:, None] == small[None]).all(2).any(1)

    norms, by_size = weight.abs().sum(1), kept("l1")
    assert by_size.sum() == len(weight) - len(weight) // 2
    assert norms[~by_size].max() <= norms[by_size].min()
    by_chance = kept("random")
    assert by_chance.sum() == by_size.sum()
    assert torch.equal(by_chance, kept("random"))
    assert not torch.equal(by_chance, kept("random", seed=1))
    assert not torch.equal(kept("propagated"), by_size)


@pytest.mark.parametrize("budget", ["macs=0.5", "params=0.3", "macs=0.6,params=0.3"])
def test_meets_budgets(trained, digits, budget) -> None:
    result = ed.compress(trained, digits, [ed.NISP()], budget=budget, quiet=True, latency=False)
    assert all(line.met for line in result.budget)
    tightest = max(line.got / line.asked for line in result.budget)
    assert tightest > 0.85


def test_prunes_residual_networks_and_keeps_them_exact() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    task = ed.Task.from_tensors((images, labels), (images[:8], labels[:8]))
    model = ed.models.build("cifar-resnet20")
    result = ed.compress(model, task, [ed.NISP(pruning_ratio=0.25, samples=6)], quiet=True, latency=False)
    assert result.after.macs < 0.75 * result.before.macs
    with pytest.raises(ed.BudgetError, match="cannot be met"):
        ed.compress(model, task, [ed.NISP(samples=6)], budget="macs=100", quiet=True, latency=False)


def test_a_networks_own_precision_does_not_matter_and_no_gradients_are_left() -> None:
    torch.manual_seed(0)
    model = build("lenet5").eval()
    example = torch.zeros(1, 1, 28, 28)
    graph = ChannelGraph.trace(model, example)
    final = torch.rand(500)
    before = {name: p.clone() for name, p in model.named_parameters()}
    single = propagate(model.train(), example, graph, graph.groups, final, final_layer(model, graph))
    assert model.training
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    wide = propagate(model.double(), example, graph, graph.groups, final, final_layer(model, graph))
    assert all(torch.equal(single[name], wide[name]) for name in wide)


def test_importance_reaches_a_transformer_through_its_embeddings_and_attention() -> None:
    torch.manual_seed(0)
    model = build("transformer", vocabulary=16, width=16, depth=2, heads=2, context=8)
    example = torch.randint(0, 16, (1, 8))
    graph = ChannelGraph.trace(model, example)
    scores = propagate(model, example, graph, graph.groups, torch.rand(16), final_layer(model, graph))
    assert all(score.min() > 0 for score in scores.values()), scores.keys()
