"""Structured probabilistic pruning: the increment, sampling, hiding without a trace, and what is left."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.columns import column_norms, columns_kept, without_columns
from efficientdnns.pruning.structured_probabilistic_pruning import HiddenGroups, increment, updated
from efficientdnns.session import Session

TARGETS, FLATNESS, AMOUNTS = st.integers(1, 500), st.floats(0.01, 0.9), st.floats(0.001, 1)


def at(rank: float, target: float, amount: float, flatness: float) -> float:
    return float(increment(torch.tensor([rank], dtype=torch.float64), target, amount, flatness))


@given(TARGETS, FLATNESS, AMOUNTS, st.floats(0, 1))
def test_the_increment(target, u, amount, share) -> None:
    centre = target * math.log(1 / u) / math.log(2 / u)
    assert at(0, target, amount, u) == pytest.approx(amount, abs=1e-9)
    assert at(centre, target, amount, u) == pytest.approx(u * amount, abs=1e-9)
    assert at(target, target, amount, u) == pytest.approx(0, abs=1e-9)
    x = share * centre
    assert at(centre - x, target, amount, u) + at(centre + x, target, amount, u) == pytest.approx(2 * u * amount)
    values = increment(torch.linspace(0, 1.5 * target, 40), target, amount, u)
    assert (values.diff()[values[1:] > -1] < 0).all()


def test_the_increment_of_the_example_and_far_beyond() -> None:
    alpha = (math.log(2) - math.log(0.25)) / 40
    assert alpha == pytest.approx(0.05199, abs=1e-5)
    assert -math.log(0.25) / alpha == pytest.approx(26.67, abs=0.01)
    far = increment(torch.arange(4608), 1)
    assert far.isfinite().all()
    assert far[-1] == -1
    assert increment(torch.tensor([0, 20, 40]), 40, 0.1, shape="linear").tolist() == pytest.approx([0.1, 0.05, 0])


@given(st.integers(2, 30), st.data())
@settings(max_examples=20, deadline=None)
def test_an_update_of_the_probabilities(size, data) -> None:
    goal = data.draw(st.integers(1, size - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    p = torch.zeros(size, dtype=torch.float64)
    for _ in range(30):
        scores = torch.rand(size, generator=generator)
        after = updated(p, scores, goal, amount=0.2)
        assert ((after >= 0) & (after <= 1)).all()
        assert (after[p == 1] == 1).all(), "gone for good"
        assert int((after == 1).sum()) <= goal
        p = after
    steady = torch.zeros(size, dtype=torch.float64)
    for _ in range(150):
        steady = updated(steady, torch.arange(size), goal, amount=0.2)
    assert int((steady == 1).sum()) == goal
    assert set(steady.tolist()) <= {0.0, 1.0}
    assert (steady[:goal] == 1).all(), "the lowest ranks"


def test_a_good_rank_lets_a_group_recover() -> None:
    p = torch.tensor([0.3, 0.3, 0.3, 0.3], dtype=torch.float64)
    after = updated(p, torch.tensor([1.0, 2.0, 3.0, 4.0]), 2, amount=0.1)
    assert after[0] > 0.3
    assert after[1] > 0.3
    assert after[2] == pytest.approx(0.3, abs=1e-12)
    assert after[3] < 0.3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.fc1, self.fc2 = nn.Linear(24, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = self.conv2(self.bn(self.conv1(x)).relu()).relu()
        return self.fc2(self.fc1(x.flatten(1)).relu())


def session_of(**settings) -> Session:
    torch.manual_seed(0)
    model = Net()
    x, y = torch.randn(48, 1, 6, 6), torch.randint(4, (48,))
    task = ed.Task.from_tensors((x, y), (x[:16], y[:16]), (x[:16], y[:16]), num_classes=4)
    training = ed.training.TrainingSettings(**({"batch_size": 16, "learning_rate": 0.05} | settings))
    return Session(model=model, task=task, original=copy.deepcopy(model), settings=training)


def callback_of(session: Session, **fields) -> HiddenGroups:
    class Trainer:
        model, total_steps, epochs, step = session.model, 100, 1, 0

    callback = HiddenGroups(ed.StructuredProbabilisticPruning(**fields), session)
    callback.setup(Trainer)
    return callback


def test_masks_are_drawn_with_the_probabilities() -> None:
    callback = callback_of(session_of())
    p = torch.linspace(0, 1, 21, dtype=torch.float64)
    callback.p = {"a": p.repeat(100)}
    shares = torch.stack([callback.sample()["a"] for _ in range(100)]).view(10_000, 21).mean(0)
    sigma = (p * (1 - p) / 10_000).sqrt()
    assert ((shares - (1 - p)).abs() <= 4 * sigma + 1e-6).all()
    assert shares[-1] == 0
    assert shares[0] == 1


@pytest.mark.parametrize("unit", ["filter", "column"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_what_is_hidden_comes_back_bit_by_bit_and_the_rest_moves(unit, optimizer) -> None:
    session = session_of(optimizer=optimizer, weight_decay=0.1)
    callback = HiddenGroups(ed.StructuredProbabilisticPruning(unit=unit, interval=1, amount=0.4), session)
    callback.finish = lambda trainer: None
    stays: list[dict[str, torch.Tensor]] = []
    sample = callback.sample
    callback.sample = lambda: stays.append(sample()) or stays[-1]
    hidden = moved = 0
    weights: dict[str, torch.Tensor] = {}

    class Watch(ed.Callback):
        def batch(self, trainer, batch):  # hidden already, and what is not hidden is as it was
            for name, (value, _) in callback.hidden.items():
                weights[name] = value
            return batch

        def after_step(self, trainer):
            nonlocal hidden, moved
            stay = stays[-1]
            for place in callback.places:
                if place.tensor not in weights:
                    continue
                after, before = trainer.model.get_parameter(place.tensor).detach(), weights[place.tensor]
                mask = place.spread(stay[place.layer], before, callback.columns) == 0
                mask = mask.expand_as(before)
                assert torch.equal(after[mask], before[mask])
                hidden += int(mask.sum())
                moved += int((after != before).sum())

    session.train([callback, Watch()], epochs=3)
    assert hidden > 50
    assert moved > 50


@pytest.mark.parametrize("unit", ["filter", "column"])
def test_hiding_takes_whole_groups_out_of_the_network(unit) -> None:
    session = session_of()
    callback = callback_of(session, unit=unit)

    class Trainer:
        model = session.model.eval()

    x, before = torch.randn(3, 1, 6, 6), copy.deepcopy(session.model.state_dict())
    stay = {name: torch.ones(len(p)) for name, p in callback.p.items()}
    layer = "conv2" if unit == "filter" else "conv2.weight"
    stay[layer][[0, 3]] = 0.0
    callback.hide(Trainer, stay)
    hidden = session.model(x)
    expected = copy.deepcopy(session.original).eval()
    with torch.no_grad():
        if unit == "filter":
            expected.fc1.weight.view(10, 6, 4)[:, [0, 3]] = 0
        else:
            expected.conv2.weight.view(6, 72)[:, [0, 3]] = 0
    assert torch.equal(hidden, expected(x))
    callback.restore(Trainer)
    assert all(torch.equal(value, session.model.state_dict()[name]) for name, value in before.items())


def test_validation_sees_the_mean_and_leaves_no_trace() -> None:
    session = session_of()
    callback = callback_of(session, unit="column")

    class Trainer:
        model = session.model

    callback.p["fc2.weight"][1] = 0.25
    callback.p["fc2.weight"][2] = 1.0
    before = session.model.fc2.weight.detach().clone()
    with callback.validation(Trainer):
        assert torch.equal(session.model.fc2.weight[:, 1], before[:, 1] * 0.75)
        assert not session.model.fc2.weight[:, 2].any()
    assert torch.equal(session.model.fc2.weight, before)


def test_a_finished_run_has_removed_the_filters() -> None:
    session = session_of()
    ed.StructuredProbabilisticPruning(interval=1, amount=0.5, epochs=8, pruning_ratio=0.5).apply(session)
    model = session.model
    assert (model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features) == (4, 3, 5)
    assert session.findings[session.label]["undecided_at_the_end"] == 0


def test_what_is_undecided_is_decided_by_probability() -> None:
    session = session_of()
    ed.StructuredProbabilisticPruning(epochs=1, pruning_ratio=0.5).apply(session)
    assert session.model.conv1.out_channels == 4
    assert session.findings[session.label]["undecided_at_the_end"] == 4 + 3 + 5


def test_finished_columns_are_zero_and_channels_that_nothing_reads_are_gone() -> None:
    session = session_of()
    method = ed.StructuredProbabilisticPruning(
        unit="column", interval=1, amount=0.5, epochs=8, pruning_ratio=0.6, ratios={"conv2": 0.95}
    )
    method.apply(session)
    model = session.model
    columns = session.findings[session.label]["columns"]
    assert columns["conv2.weight"] == [72, 72 - math.ceil(0.95 * 72)]
    assert columns["fc1.weight"] == [24, 24 - math.ceil(0.6 * 24)]
    assert int(model.fc1.weight.detach().abs().sum(0).count_nonzero()) == 9
    assert model.conv1.out_channels < 8
    assert model.fc1.out_features == 4, "fc2 reads no more of them"
    assert "fc1.weight" in session.sparse


def test_kept_columns_alone_give_the_same_outputs() -> None:
    session = session_of()
    model = without_columns(session, {"conv2.weight": 20})
    weight, x = model.conv2.weight.detach().flatten(1), torch.randn(2, model.conv2.in_channels, 4, 4)
    columns = column_norms(model.conv2.weight).nonzero().flatten()
    assert len(columns) == 20
    unfolded = nn.functional.unfold(x, 3)[:, columns]
    small = (weight[:, columns] @ unfolded + model.conv2.bias.detach()[:, None]).view(2, 6, 2, 2)
    assert torch.allclose(small, model.conv2(x), atol=1e-5)
    assert columns_kept({"a": torch.zeros(3, 10)}, 0.55, {}, "x") == {"a": 4}


@pytest.mark.parametrize(
    ("unit", "budget"), [("filter", "macs=0.5"), ("filter", "params=0.5"), ("column", "params=0.5")]
)
def test_budgets_are_met(unit, budget) -> None:
    session = session_of()
    method = ed.StructuredProbabilisticPruning(unit=unit, interval=1, amount=0.5, epochs=2)
    result = ed.compress(session.model, session.task, method, budget=budget, quiet=True, latency=False)
    (line,) = result.budget
    assert line.met
    assert line.got > 0.8 * line.asked


def test_a_run_that_is_too_short_says_so() -> None:
    session = session_of()
    said: list[str] = []
    session.say = said.append
    ed.StructuredProbabilisticPruning(epochs=1).apply(session)
    assert said == ["no group can reach probability 1 in 2 steps; it takes interval / amount = 3600"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unit": "column", "scope": "global"}, "scope=global and round_to need unit=filter"),
        ({"unit": "column", "round_to": 8}, "scope=global and round_to need unit=filter"),
        ({"unit": "column", "ratios": {"conv9": 0.5}}, "ratios: no layer is called 'conv9'"),
        ({"unit": "column", "skip": ("conv9",)}, "skip: no layer is called 'conv9'"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message) -> None:
    session = session_of()

    def checked(method: ed.Method) -> None:
        method.check(session)
        method.check_network(session)

    with pytest.raises(ed.ConfigurationError, match=message):
        checked(ed.StructuredProbabilisticPruning(**fields))


def test_columns_solve_no_macs_and_fields_have_ranges() -> None:
    session = session_of()
    method = ed.StructuredProbabilisticPruning(unit="column")
    with pytest.raises(ed.ConfigurationError, match="budget 'macs' cannot be solved for"):
        ed.compress(session.model, session.task, method, budget="macs=0.5", quiet=True)
    for wrong in ({"amount": 0}, {"flatness": 1.0}, {"interval": 0}):
        with pytest.raises(ed.ConfigurationError, match=next(iter(wrong))):
            ed.StructuredProbabilisticPruning(**wrong)
