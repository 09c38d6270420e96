"""Gradual magnitude pruning: exact masks on the cubic schedule, and masked weights that nothing moves."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.sparsity_schedule import scheduled_sparsity
from efficientdnns.session import Session


def session_of(scale: float = 1.0, **settings) -> Session:
    torch.manual_seed(0)
    x, y = torch.randn(96, 7), torch.randint(4, (96,))
    model = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 4))
    if scale == 0:
        model[0].weight.data.fill_(0.5)  # ties everywhere
    training = ed.training.TrainingSettings(**({"batch_size": 16, "learning_rate": 0.05} | settings))
    task = ed.Task.from_tensors((x, y), (x[:16], y[:16]), (x[:16], y[:16]), num_classes=4)
    return Session(model=model, task=task, original=copy.deepcopy(model), settings=training)


class Watch(ed.Callback):
    """Masks right after pruning and weights after every step."""

    def __init__(self, masks) -> None:
        self.source, self.zeros, self.weights = masks, [], []

    def after_backward(self, trainer):
        self.zeros.append({name: int((mask == 0).sum()) for name, mask in self.source.masks.items()})

    def after_step(self, trainer):
        self.weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.dim() > 1})


@pytest.mark.parametrize("ties", [False, True])
def test_every_mask_has_exactly_the_scheduled_number_of_zeros(ties) -> None:
    session = session_of(scale=0.0 if ties else 1.0)
    method = ed.GradualMagnitudePruning(sparsity=0.9, initial_sparsity=0.1, begin=0.1, end=0.8, frequency=3, epochs=6)
    callback = method.callback(session)
    watch = Watch(callback)
    session.train([callback, watch], epochs=6)
    steps, first = 36, round(0.1 * 36)
    prunings = (round(0.8 * steps) - first) // 3
    assert [step for step, _ in callback.history] == [first + 3 * i for i in range(prunings + 1)]
    assert not any(watch.zeros[:first]), "nothing is masked before"
    for number in range(prunings + 1):
        sparsity = scheduled_sparsity(number / prunings, 0.9, 0.1)
        for name, size in (("0.weight", 77), ("2.weight", 44)):
            expected = size - round((1 - sparsity) * size)
            assert abs(watch.zeros[first + 3 * number][name] - expected) <= (0 if number == prunings else 1)
    assert watch.zeros[-1] == {"0.weight": round(0.9 * 77), "2.weight": round(0.9 * 44)}
    assert len({tuple(zeros.items()) for zeros in watch.zeros[first:]}) > 4, "more than one jump"
    for name, kept in (("0.weight", 77 - round(0.9 * 77)), ("2.weight", 44 - round(0.9 * 44))):
        weight = session.model.get_parameter(name)
        assert int(weight.count_nonzero()) == kept
        assert type(weight) is nn.Parameter
    assert session.sparse == {"0.weight", "2.weight"}


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "weight_decay": 0.1},
        {"optimizer": "adam", "weight_decay": 0.1},
        {"optimizer": "adamw", "weight_decay": 0.1},
    ],
    ids=lambda s: s["optimizer"],
)
def test_masked_weights_are_moved_by_nothing(settings) -> None:
    session = session_of(**settings)
    method = ed.GradualMagnitudePruning(sparsity=0.8, frequency=2, epochs=4, end=0.5)
    callback = method.callback(session)
    watch = Watch(callback)
    session.train([callback, watch], epochs=4)
    for earlier, later in itertools.pairwise(watch.weights):
        for name in earlier:
            assert not later[name][earlier[name] == 0].any()
            live = later[name] != 0
            assert (later[name][live] != earlier[name][live]).any()


def test_sparsity_zero_changes_nothing() -> None:
    plain, pruned = session_of(), session_of()
    plain.train(epochs=2)
    ed.GradualMagnitudePruning(sparsity=0.0, frequency=1, epochs=2).apply(pruned)
    for a, b in zip(plain.model.parameters(), pruned.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sparsity": 0.5, "initial_sparsity": 0.7},
            "initial_sparsity=0.7 is above sparsity=0.5; pruned weights do not",
        ),
        ({"begin": 0.6, "end": 0.6}, "begin=0.6 is not before end=0.6"),
        ({"scope": "global", "sparsities": {"0": 0.5}}, "sparsities fix what scope=global decides"),
    ],
)
def test_what_cannot_be_is_refused(fields, message) -> None:
    with pytest.raises(ed.ConfigurationError, match=message):
        ed.GradualMagnitudePruning(**fields).check(session_of())


def test_state_goes_on_where_it_was() -> None:
    session = session_of()
    callback = ed.GradualMagnitudePruning(sparsity=0.8, frequency=2, epochs=2).callback(session)
    session.train([callback], epochs=2)
    again = ed.GradualMagnitudePruning(sparsity=0.8, frequency=2, epochs=2).callback(session)
    again.load_state_dict(callback.state_dict())
    assert again.history == callback.history
    assert all(torch.equal(again.masks[name], mask) for name, mask in callback.masks.items())


def test_own_sparsities_and_layers_left_alone() -> None:
    session = session_of()
    ed.GradualMagnitudePruning(sparsities={"0": 0.5}, skip=("2",), sparsity=0.9, frequency=2, epochs=2).apply(session)
    assert int(session.model[0].weight.count_nonzero()) == 77 - round(0.5 * 77)
    assert session.model[2].weight.all()


def test_a_budget_of_parameters_is_met() -> None:
    session = session_of()
    method = ed.GradualMagnitudePruning(frequency=2, epochs=3)
    result = ed.compress(session.model, session.task, method, budget="params=0.5", quiet=True, latency=False)
    (line,) = result.budget
    assert line.met
    assert line.got > 0.97 * line.asked
