"""Lottery tickets: masks, rewinding, controls, and instability."""

from __future__ import annotations

import copy

import pytest
import torch

import efficientdnns as ed
from efficientdnns.models import build
from efficientdnns.parts.reinitialise import reinitialised
from efficientdnns.parts.select import layer_weights
from efficientdnns.parts.sparsity_schedule import remaining
from efficientdnns.pruning.lottery_ticket import (
    LotteryTicket,
    error_barrier,
    interpolated,
    next_masks,
    shuffled,
)
from efficientdnns.session import Session
from efficientdnns.training import Trainer


def compress(model, task, methods, **options):
    return ed.compress(model, task, methods, quiet=True, latency=False, **options)


def test_densities_of_the_paper() -> None:
    sizes = {"fc1": 235200, "fc2": 30000, "fc3": 1000}
    shares = {"fc1": 0.2, "fc2": 0.2, "fc3": 0.1}

    def density(level: int) -> float:
        return 100 * sum(size * remaining(level, shares[name]) for name, size in sizes.items()) / sum(sizes.values())

    expected = {3: 51.28, 4: 41.05, 7: 21.07, 9: 13.52, 12: 6.95, 15: 3.58}
    assert {level: round(density(level), 2) for level in expected} == pytest.approx(expected, abs=0.011)
    torch.manual_seed(0)
    weights = {name: torch.randn(size) for name, size in sizes.items()}
    masks = {name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()}
    for level in range(1, 8):
        smaller = next_masks(weights, masks, shares, everywhere=False)
        for name in sizes:
            left = int(masks[name].sum())
            assert int(smaller[name].sum()) == left - round(shares[name] * left)
            assert not (smaller[name] & ~masks[name]).any(), "masks are nested"
        masks = smaller
        counted = 100 * sum(int(mask.sum()) for mask in masks.values()) / sum(sizes.values())
        assert counted == pytest.approx(density(level), abs=0.01)


def test_global_masks_remove_exactly_the_smallest() -> None:
    weights = {"a": torch.tensor([5.0, 1.0, 2.0]), "b": torch.tensor([[0.5, 9.0], [3.0, 4.0]])}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    masks = next_masks(weights, masks, {"a": 0.4, "b": 0.4}, everywhere=True)
    assert [masks["a"].tolist(), masks["b"].tolist()] == [[True, False, False], [[False, True], [True, True]]]
    masks = next_masks(weights, masks, {"a": 0.9, "b": 0.9}, everywhere=True, least=3)
    assert sum(int(mask.sum()) for mask in masks.values()) == 3


def test_layerwise_masks_stop_at_the_least() -> None:
    weights = {"a": torch.randn(100), "b": torch.randn(40)}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    masks = next_masks(weights, masks, {"a": 0.5, "b": 0.5}, everywhere=False, least=100)
    assert sum(int(mask.sum()) for mask in masks.values()) == 100


def test_controls_keep_what_they_should(trained) -> None:
    masks = {name: torch.rand_like(weight) < 0.3 for name, weight in layer_weights(trained).items()}
    other = shuffled(masks, torch.Generator().manual_seed(0))
    for name, mask in masks.items():
        assert int(other[name].sum()) == int(mask.sum())
        assert not torch.equal(other[name], mask)
    before = copy.deepcopy(trained.state_dict())
    fresh, again = reinitialised(trained, 1), reinitialised(trained, 1)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert not torch.equal(value, before[name])
        assert torch.equal(trained.state_dict()[name], before[name])


def test_every_level_starts_from_the_early_weights_with_the_same_data(digits, monkeypatch) -> None:
    starts: list[tuple[int, int, dict[str, torch.Tensor]]] = []
    orders: list[list[int]] = []
    fit = Trainer.fit

    def spy(self):
        starts.append((self.step, self.until, copy.deepcopy(self.model.state_dict())))
        orders.append([])
        step = self.training_step

        def note(batch):
            orders[-1].extend(batch.indices.tolist())
            return step(batch)

        monkeypatch.setattr(self, "training_step", note)
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", spy)
    method = LotteryTicket(epochs=2, levels=2, rewind_steps=4, fraction=0.5)
    result = compress(build("lenet5"), digits, [method])
    assert [(start, until) for start, until, _ in starts] == [(0, 4), (4, 6), (4, 6), (4, 6)]
    early = starts[1][2]
    for _, _, state in starts[2:]:
        for name, value in state.items():
            kept = value != 0
            assert torch.equal(value[kept], early[name][kept]), "rewound weights are theta_k to the bit"
    assert orders[1] == orders[2] == orders[3], "the order of data goes on as in the first run"
    whole = [*orders[0], *orders[1]]
    assert len(set(whole[:384])) == 384, "three steps of 128 make the first epoch"
    for weight in layer_weights(result.model).values():
        assert int(weight.count_nonzero()) == pytest.approx(weight.numel() / 4, abs=1)
    levels = result.report.methods[0].findings["levels"]
    assert [round(level["density"], 3) for level in levels] == [1.0, 0.5, 0.25]


def test_a_stretch_of_a_run_is_the_run(digits) -> None:
    def session() -> Session:
        torch.manual_seed(0)
        model = build("lenet5")
        return Session(model=model, task=digits, original=model)

    whole, parts = session(), session()
    plain = {"optimizer": "sgd", "momentum": 0.0, "seed": 7, "epochs": 2}
    whole.train(**plain)
    parts.train(until=5, **plain)
    parts.train(start=5, **plain)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], value), name


def test_barrier_between_equal_networks_is_zero_and_between_strangers_is_not(trained, digits) -> None:
    session = Session(model=trained, task=digits, original=trained)

    def error(model) -> float:
        return 100 - session.evaluate(model)

    assert error_barrier(trained, copy.deepcopy(trained), error, 5) == pytest.approx(0, abs=0.5)
    torch.manual_seed(1)
    stranger = build("lenet5")
    ed.fit(stranger, digits, epochs=6, quiet=True, learning_rate=0.05, batch_size=32)
    assert error_barrier(trained, stranger, error, 5) > 10
    middle = interpolated(trained, stranger, 0.5).fc1.weight
    torch.testing.assert_close(middle, (trained.fc1.weight + stranger.fc1.weight) / 2)


def test_budget_ends_the_search(digits) -> None:
    method = LotteryTicket(epochs=1, levels=9, fraction=0.5)
    result = compress(build("lenet5"), digits, [method], budget="params=0.2")
    assert result.budget[0].met
    assert result.budget[0].got / result.budget[0].asked > 0.98
    assert len(result.report.methods[0].findings["levels"]) == 4
