"""OLMP: the mask rule, the search, and the run on digits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import efficientdnns as ed
from efficientdnns.models import build
from efficientdnns.pruning.olmp import INFEASIBLE, OLMP, Surgery, layer_statistics, search_thresholds, update_mask
from efficientdnns.session import Session
from efficientdnns.training import Callback, Trainer


def compress(model, task, methods, **options):
    return ed.compress(model, task, methods, quiet=True, latency=False, **options)


def test_statistics_pool_weights_and_biases() -> None:
    mean, deviation = layer_statistics([torch.tensor([[1.0, -3.0]]), torch.tensor([2.0, 0.0])])
    assert mean == pytest.approx(1.5)
    assert deviation == pytest.approx((14 / 4 - 1.5**2) ** 0.5)


def test_mask_has_hysteresis() -> None:
    weight = torch.tensor([0.80, 0.90, 0.95, 1.05, 1.10, 1.15, -1.15])
    kept, pruned = torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool)
    assert update_mask(kept, weight, 1.0).tolist() == [False, False, True, True, True, True, True]
    assert update_mask(pruned, weight, 1.0).tolist() == [False, False, False, False, False, True, True]


@given(st.lists(st.floats(0, 3), min_size=2, max_size=6), st.integers(0, 100))
def test_raising_the_threshold_never_brings_weights_back(thresholds, seed) -> None:
    weight = torch.randn(40, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(40, dtype=torch.bool)
    for threshold in sorted(thresholds):
        new = update_mask(mask, weight, threshold)
        assert not (new & ~mask).any()
        mask = new


def test_a_pruned_weight_that_grows_comes_back() -> None:
    mask = update_mask(torch.tensor([True]), torch.tensor([0.5]), 1.0)
    assert not mask.any()
    assert not update_mask(mask, torch.tensor([1.05]), 1.0).any()
    assert update_mask(mask, torch.tensor([1.2]), 1.0).all()


@pytest.mark.parametrize("search", ["ncs", "random"])
def test_search_returns_the_best_feasible_thresholds(search) -> None:
    seen = []

    def evaluate(c):
        share, score = 1 / (1 + c.sum().item()), 1 - 0.01 * c.square().sum().item()
        seen.append((share, score))
        return share, score

    best, fitness = search_thresholds(
        evaluate, torch.zeros(2).double(), 0.05, step_size=1.0, bound=10.0, evaluations=400, search=search
    )
    assert len(seen) == 401
    share, score = evaluate(best)
    assert score >= 1 - 0.05
    assert share == fitness == min(share for share, score in seen if score >= 1 - 0.05)
    near = 0.9 if search == "ncs" else 0.6
    assert share < 1 / (1 + near * 10**0.5), "the optimum is c = (sqrt(2.5), sqrt(2.5))"


def test_nothing_feasible_leaves_the_start() -> None:
    told = []

    def evaluate(c):
        told.append(c)
        return (1.0, 1.0) if len(told) == 1 else (0.1, 0.0)

    start = torch.full((2,), 0.5, dtype=torch.float64)
    best, fitness = search_thresholds(evaluate, start, 0.05, step_size=1.0, bound=10.0, evaluations=50)
    assert torch.equal(best, start)
    assert fitness == 1.0
    assert INFEASIBLE == 1.1


@pytest.mark.parametrize(("name", "total"), [("lenet-300-100", 266_610), ("lenet5-caffe", 431_080)])
def test_counts_weights_and_biases(digits, name, total) -> None:
    model = build(name)
    session = Session(model, digits, model)
    session.train([OLMP(epochs=0).callback(session)], epochs=0)
    assert sum(size for _, size in session.findings["fit"]["kept"].values()) == total
    assert session.findings["fit"]["ratio"] == 1.0


class Watch(Callback):
    """Keeps what the model and the callback hold at certain moments."""

    def __init__(self, surgery: Surgery) -> None:
        self.surgery, self.statistics, self.came_back = surgery, [], 0
        self.before: dict[str, torch.Tensor] = {}

    def batch(self, trainer, batch):
        for name, mask in self.surgery.masks.items():
            parameter = trainer.model.get_parameter(name)
            assert not parameter[~mask].any(), "the forward pass sees masked weights"
            if trainer.step < self.surgery.last_step:
                assert torch.equal(parameter[mask], self.surgery.whole[name][mask])
            self.came_back += int((mask & ~self.before.get(name, mask)).sum())
        self.before = {name: mask.clone() for name, mask in self.surgery.masks.items()}
        self.statistics.append(list(self.surgery.statistics))
        assert trainer.model.training
        return batch


def test_run_prunes_hard_and_lets_weights_come_back(trained, digits) -> None:
    session = Session(trained, digits, trained)
    method = OLMP(epochs=8, search_every=8, evaluations=50, prune_share=0.6, gamma_linear=0, gamma_convolution=0)
    surgery = method.callback(session)
    watch, before = Watch(surgery), session.evaluate()
    initial = [
        layer_statistics([p.detach() for p in m.parameters()]) for m in trained.children() if list(m.parameters())
    ]
    session.train([surgery, watch], epochs=8, learning_rate=0.02, batch_size=64)
    assert all(statistics == initial for statistics in watch.statistics)
    assert watch.came_back > 0
    finding = session.findings["fit"]
    assert [search["step"] for search in finding["searches"]] == [0, 8, 16, 24, 32]
    assert finding["ratio"] > 5
    assert session.evaluate() > before - 15
    nonzero = sum(int(p.count_nonzero()) for p in session.model.parameters())
    assert nonzero == sum(kept for kept, _ in finding["kept"].values())
    assert session.model.conv2.bias.count_nonzero() < 50 or session.model.fc1.bias.count_nonzero() < 500
    assert session.sparse == {name for name, _ in session.model.named_parameters()}


def test_masks_are_fixed_after_the_pruning_phase(trained, digits) -> None:
    session = Session(trained, digits, trained)
    masks = []

    class Keep(Callback):
        def epoch_end(self, trainer) -> None:
            masks.append({name: p != 0 for name, p in trainer.model.named_parameters()})

    method = OLMP(epochs=4, search_every=5, evaluations=40, prune_share=0.5)
    session.train([method.callback(session), Keep()], epochs=4, learning_rate=0.02, batch_size=64)
    for name, mask in masks[1].items():
        assert torch.equal(mask, masks[3][name]), name
        assert not session.model.get_parameter(name)[~mask].signbit().any()


@pytest.mark.parametrize("samples", [None, 40])
def test_search_leaves_no_trace_but_the_thresholds(digits, samples) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10)
    )
    session = Session(model, digits, model)
    surgery = Surgery(OLMP(evaluations=50, samples=samples), session)
    trainer = Trainer(model, digits, [surgery], epochs=1, accelerator=session.accelerator)
    surgery.setup(trainer)
    batch = next(digits.train.batches(32))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    surgery._search(trainer, batch, torch.tensor([True, True]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(mask.all() for mask in surgery.masks.values())
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert surgery.scales.min() > 0
    assert surgery.searches[0]["remaining"] < 1


def test_one_active_layer_is_not_searched(digits) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    session = Session(model, digits, model)
    session.train([OLMP(epochs=1, search_every=1).callback(session)], epochs=1)
    assert session.findings["fit"]["searches"] == []


def test_later_training_keeps_the_zeros(trained, digits) -> None:
    method = OLMP(epochs=2, search_every=4, evaluations=40, learning_rate=0.02)
    result = compress(trained, digits, [method, ed.Fit(epochs=1, learning_rate=0.05)])
    kept = sum(kept for kept, _ in result.report.methods[0].findings["kept"].values())
    assert sum(int(p.count_nonzero()) for p in result.model.parameters()) == kept
    assert result.after.bytes < result.before.bytes / 2


def test_bad_fields(trained, digits) -> None:
    with pytest.raises(ed.ConfigurationError, match="expected low <= high"):
        compress(trained, digits, [OLMP(hysteresis=(1.2, 1.0))])
