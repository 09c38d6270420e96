"""Auto-balanced filter pruning: factors, balance, and what one step does to weak and strong filters."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import efficientdnns as ed
from efficientdnns.pruning.auto_balanced_filter_pruning import AutoBalance, balance, balance_factors
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, remove

DISTINCT = st.lists(st.integers(1, 10_000), min_size=2, max_size=40, unique=True).map(lambda v: torch.tensor(v) / 100)


class Net(nn.Module):
    """Two layers that write to one sum, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.conv = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.fc = nn.Conv2d(8, 6, 3), nn.Linear(96, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.fc(self.last((x + self.conv(x)).relu()).relu().flatten(1))


def session_of(model: nn.Module | None = None) -> Session:
    torch.manual_seed(0)
    model = model or Net()
    x, y = torch.randn(48, 1, 6, 6), torch.randint(4, (48,))
    task = ed.Task.from_tensors((x, y), (x[:16], y[:16]), (x[:16], y[:16]), num_classes=4)
    settings = ed.training.TrainingSettings(batch_size=16, learning_rate=0.02)
    return Session(model=model, task=task, original=copy.deepcopy(model), settings=settings)


@given(DISTINCT, st.data())
def test_factors(scores, data) -> None:
    keep = data.draw(st.integers(1, len(scores)))
    factors = balance_factors(scores, keep)
    assert int((factors <= -1).sum()) == keep
    assert int((factors > 1).sum()) == len(scores) - keep
    threshold = scores.sort(descending=True).values[keep - 1]
    assert factors[scores == threshold].tolist() == [-1.0]
    assert torch.equal(factors[scores < threshold].argsort(descending=True), scores[scores < threshold].argsort())
    weakest = scores.argmin()
    if keep < len(scores):
        assert factors[weakest] == pytest.approx(1 + float((threshold / scores[weakest]).log()), rel=1e-4)


def test_a_filter_of_zeros_has_a_finite_factor() -> None:
    factors = balance_factors(torch.tensor([0.0, 1.0, 2.0]), 1)
    assert factors.isfinite().all()
    assert factors.abs().max() < 31


@given(DISTINCT, st.data(), st.floats(1e-5, 1))
def test_the_two_sums_cancel(scores, data, alpha) -> None:
    keep = data.draw(st.integers(1, len(scores)))
    factors = balance_factors(scores, keep).double()
    weak, strong, tau = balance(factors, scores.double().square(), alpha)
    assert weak >= 0 >= strong
    assert float(alpha * weak + tau * strong) == pytest.approx(0, abs=1e-6 * float(alpha * weak) + 1e-12)
    assert (tau > 0) == (keep < len(scores)), "nothing to do where nothing is to go"


class Steps:
    """What a callback sees of a trainer."""

    def __init__(self, session: Session, steps: int = 1000) -> None:
        self.model, self.step, self.total_steps, self.epochs = session.model, 0, steps, 1
        self.device = session.device


def weak_and_strong(callback: AutoBalance, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    factors = callback.factors[name].flatten()
    return factors > 0, factors < 0


def test_without_a_task_steps_shrink_the_weak_and_grow_the_strong() -> None:
    session = session_of()
    callback = AutoBalance(ed.AutoBalancedFilterPruning(alpha=0.05, pruning_ratio=0.5), session)
    trainer = Steps(session)
    callback.setup(trainer)
    callback.start(trainer)
    weights = {name: session.model.get_parameter(name) for name in callback.factors}
    assert weights.keys() == {"stem.weight", "conv.weight", "last.weight"}
    ratios: list[dict[str, float]] = []
    for _ in range(5):
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        before = {name: weight.detach().flatten(1).norm(dim=1) for name, weight in weights.items()}
        callback.after_backward(trainer)
        with torch.no_grad():
            for name, weight in weights.items():
                # The regulariser's value is zero in every layer, and so its gradient along the weights.
                size = (weight.grad.abs() * weight.abs()).sum()
                assert abs(float((weight.grad * weight).sum())) < 1e-5 * float(size), name
                weight -= 0.1 * weight.grad
        entry = {}
        for name, weight in weights.items():
            after, (weak, strong) = weight.detach().flatten(1).norm(dim=1), weak_and_strong(callback, name)
            assert (after[weak] < before[name][weak]).all()
            assert (after[strong] > before[name][strong]).all()
            entry[name] = float(after[strong].norm() / after[weak].norm())
        ratios.append(entry)
    for name in weights:
        values = [entry[name] for entry in ratios]
        assert values == sorted(values)


def test_tau_is_a_constant_for_the_gradient() -> None:
    session = session_of()
    callback = AutoBalance(ed.AutoBalancedFilterPruning(alpha=0.03), session)
    trainer = Steps(session)
    callback.setup(trainer)
    callback.start(trainer)
    weight, factors = session.model.last.weight, callback.factors["last.weight"].flatten()
    weight.grad = torch.zeros_like(weight)
    callback.after_backward(trainer)
    squares = weight.flatten(1).square().sum(1)
    weak, strong, tau = balance(factors, squares, 0.03)
    (expected,) = torch.autograd.grad(0.03 * weak + tau.detach() * strong, weight)
    assert torch.allclose(weight.grad, expected, atol=1e-7)


def test_layers_of_one_sum_share_their_indices() -> None:
    session = session_of()
    callback = AutoBalance(ed.AutoBalancedFilterPruning(), session)
    trainer = Steps(session)
    callback.setup(trainer)
    callback.start(trainer)
    assert torch.equal(callback.factors["stem.weight"].flatten(), callback.factors["conv.weight"].flatten())
    norms = session.model.stem.weight.detach().abs().flatten(1).sum(1)
    pace = balance_factors(norms, 4)
    assert torch.allclose(callback.factors["stem.weight"].flatten(), pace, atol=1e-5), "the first one sets the pace"


def test_factors_are_frozen_for_a_round_and_rounds_narrow_together() -> None:
    seen: list[tuple[torch.Tensor, list[int]]] = []

    class Watch(ed.Callback):
        def after_step(self, trainer):
            zero = [
                int((trainer.model.get_parameter(f"{n}.weight").flatten(1) == 0).all(1).sum()) for n in ("stem", "last")
            ]
            seen.append((callback.factors["last.weight"].clone(), zero))

    session = session_of()
    method = ed.AutoBalancedFilterPruning(rounds=3, epochs=4, pruning_ratio=0.5, alpha=0.01)
    callback = AutoBalance(method, session)
    session.train([callback, Watch()], epochs=4, learning_rate=0.02)
    assert [zero for _, zero in seen[:3]] == [[0, 0]] * 3
    assert seen[3][1] == seen[6][1] == [round(4 / 3), 1]
    assert seen[-1][1] == [round(8 / 3), 2]
    assert torch.equal(seen[0][0], seen[2][0])
    assert not torch.equal(seen[0][0], seen[4][0])
    assert (session.model.stem.out_channels, session.model.last.out_channels) == (4, 3)
    assert len(callback.energy) == 4


def test_weight_decay_is_off_where_alpha_acts() -> None:
    session = session_of()
    session.settings = session.settings.override(weight_decay=0.1)
    decays = {}

    class Watch(ed.Callback):
        def start(self, trainer):
            for group in trainer.optimizer.param_groups:
                decays.update({id(p): group["weight_decay"] for p in group["params"]})

    callback = AutoBalance(ed.AutoBalancedFilterPruning(), session)
    model = session.model
    session.train([callback, Watch()], epochs=1)
    assert [decays[id(m.weight)] for m in (model.stem, model.conv, model.last, model.fc, model.bn)] == [
        0,
        0,
        0,
        0.1,
        0.1,
    ]


def test_the_small_network_is_the_masked_one() -> None:
    session = session_of()
    session.model.bn.running_mean.normal_()
    callback = AutoBalance(ed.AutoBalancedFilterPruning(pruning_ratio=0.5), session)
    trainer = Steps(session)
    callback.setup(trainer)
    callback.start(trainer)
    selection = callback.select(trainer)
    assert {name: len(units) for name, units in selection.items()} == {"stem": 4, "last": 3}
    masked = session.model.eval()
    x = torch.randn(5, 1, 6, 6)
    small = remove(masked, x, selection, ChannelGraph.trace(masked, x[:1])).eval()
    assert torch.allclose(small(x), masked(x), atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())


def test_energy_moves_into_what_stays(digits, trained) -> None:
    session = Session(model=trained, task=digits, original=copy.deepcopy(trained))
    ed.AutoBalancedFilterPruning(alpha=0.03, epochs=4, learning_rate=0.01, pruning_ratio=0.7, batch_size=32).apply(
        session
    )
    first, last = session.findings[session.label]["energy_in_kept"]
    assert all(last[name] > first[name] + 0.05 for name in first)


def test_a_budget_of_parameters_is_met() -> None:
    session = session_of()
    method = ed.AutoBalancedFilterPruning(epochs=1, rounds=2, scope="global")
    result = ed.compress(session.model, session.task, method, budget="params=0.5", quiet=True, latency=False)
    assert all(line.met for line in result.budget)


def test_wrong_fields_are_refused() -> None:
    for fields in ({"alpha": 0}, {"rounds": 0}, {"pruning_ratio": 1.0}):
        with pytest.raises(ed.ConfigurationError, match=next(iter(fields))):
            ed.AutoBalancedFilterPruning(**fields)
