"""Any criterion with any schedule at any granularity: every combination that is allowed, exact counts, errors for the rest."""

from __future__ import annotations

import copy
import itertools
from typing import Any, get_args

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.criteria import ChannelCriterion
from efficientdnns.pruning.prune import PruneChannels, PruneWeights
from efficientdnns.session import Session

WEIGHTS = ("magnitude", "taylor", "random")
ALLOWED = [
    *itertools.product(WEIGHTS, ("weights", "rows", "2:4"), ("none", "soft"), (2,)),
    *itertools.product(WEIGHTS, ("weights",), ("gradient", "random"), (2,)),
    *itertools.product(("magnitude", "random"), ("weights", "rows", "2:4"), ("none",), (0,)),
]


class Net(nn.Module):
    """A convolution and three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(1, 6, 3), nn.Linear(24, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.fc2(self.fc1(nn.functional.max_pool2d(self.conv(x).relu(), 2).flatten(1)).relu())


def session_of(model: nn.Module | None = None, shape: tuple[int, ...] = (1, 6, 6)) -> Session:
    torch.manual_seed(0)
    model = model or Net()
    x, y = torch.randn(48, *shape), torch.randint(4, (48,))
    task = ed.Task.from_tensors((x, y), (x[:16], y[:16]), (x[:16], y[:16]), num_classes=4)
    settings = ed.training.TrainingSettings(batch_size=16, learning_rate=0.05, weight_decay=0.01)
    return Session(model=model, task=task, original=copy.deepcopy(model), settings=settings)


def apply(method: ed.Method, session: Session | None = None) -> Session:
    session = session or session_of()
    method.check(session)
    method.check_network(session)
    method.apply(session)
    return session


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}


def assert_counts(session: Session, granularity: str, scope: str, sparsity: float) -> None:
    weights = matrices(session.model)
    if ":" in granularity:
        for name, weight in weights.items():
            if weight.shape[1] >= 4:
                runs = nn.functional.pad((weight != 0).movedim(1, -1), (0, -weight.shape[1] % 4)).unflatten(-1, (-1, 4))
                full = nn.functional.pad(torch.ones_like(weight).movedim(1, -1), (0, -weight.shape[1] % 4))
                assert torch.equal(runs.sum(-1), full.unflatten(-1, (-1, 4)).sum(-1).clamp_max(2).long()), name
            else:
                assert weight.all(), "too few inputs for a pattern"
        return
    kept = {name: weight.numel() - round(sparsity * weight.numel()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    if granularity == "weights":
        counts = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
        assert counts == kept if scope == "layer" else sum(counts.values()) == total - round(sparsity * total)
        return
    rows = {name: weight.flatten(1).bool() for name, weight in weights.items()}
    assert all(torch.equal(row.any(1), row.all(1)) for row in rows.values()), "rows go whole"
    stay = {name: int(row.any(1).sum()) for name, row in rows.items()}
    if scope == "layer":
        assert stay == {name: max(1, kept[name] // weights[name][0].numel()) for name in weights}
    else:
        got = sum(int(row.sum()) for row in rows.values())
        assert total - round(sparsity * total) - 24 < got <= total - round(sparsity * total)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("criterion", "granularity", "regrowth", "epochs"), ALLOWED)
def test_weights_every_combination_runs_with_exact_counts(criterion, granularity, regrowth, epochs, scope) -> None:
    own: dict[str, Any] = {} if ":" in granularity else {"sparsity": 0.6}
    method = PruneWeights(
        criterion=criterion, granularity=granularity, regrowth=regrowth, epochs=epochs, scope=scope, frequency=1, **own
    )
    session = apply(method)
    assert_counts(session, granularity, scope, 0.6)
    assert session.sparse == set(matrices(session.model))
    if epochs:
        history = [share for _, share in session.findings[session.label]["sparsity_history"]]
        assert len(history) > 2
        if regrowth == "none" or granularity == "weights":
            assert history == sorted(history), "sparsity never falls"


@pytest.mark.parametrize("granularity", ["weights", "rows", "2:4"])
def test_without_regrowth_nothing_comes_back_and_the_largest_stay(granularity) -> None:
    own: dict[str, Any] = {} if ":" in granularity else {"sparsity": 0.6}
    masks: list[dict[str, torch.Tensor]] = []

    class Watch(ed.Callback):
        def after_step(self, trainer):
            masks.append({name: weight != 0 for name, weight in matrices(trainer.model).items()})

    session = session_of()
    method = PruneWeights(granularity=granularity, epochs=4, frequency=2, **own)
    session.train([method.callback(session), Watch()], epochs=4)
    for earlier, later in itertools.pairwise(masks):
        assert all((later[name] <= earlier[name]).all() for name in later)
    assert any(not torch.equal(masks[0][name], masks[-1][name]) for name in masks[0])
    one_shot = apply(PruneWeights(granularity=granularity, **own))
    for name, weight in matrices(one_shot.model).items():
        before = one_shot.original.get_parameter(name)
        assert torch.equal(weight[weight != 0], before[weight != 0])
        if granularity == "weights":
            assert before[weight == 0].abs().max() <= weight[weight != 0].abs().min()


@pytest.mark.parametrize("regrowth", ["soft", "gradient", "random"])
def test_with_regrowth_something_comes_back(regrowth) -> None:
    alive: list[torch.Tensor] = []

    class Watch(ed.Callback):
        def after_backward(self, trainer):  # right after a pruning; soft ones are trained on at once
            if trainer.step % 4 == 0 and regrowth == "soft":
                alive.append(trainer.model.fc1.weight.detach() != 0)

        def after_step(self, trainer):
            if trainer.step % 3 == 2 and regrowth != "soft":
                alive.append(trainer.model.fc1.weight.detach() != 0)

    session = session_of()
    soft = {"frequency": 4, "exponent": 9.0} if regrowth == "soft" else {"frequency": 3, "exponent": 1.0}
    method = PruneWeights(regrowth=regrowth, epochs=12, sparsity=0.6, **soft)
    session.train([method.callback(session), Watch()], epochs=12, learning_rate=0.3)
    assert any((later & ~earlier).any() for earlier, later in itertools.pairwise(alive))


def test_zeros_survive_later_training() -> None:
    session = apply(PruneWeights(sparsity=0.7, retrain_epochs=2))
    zeros = {name: weight == 0 for name, weight in matrices(session.model).items()}
    apply(ed.Fit(epochs=1), session)
    assert all(torch.equal(zeros[name], weight == 0) for name, weight in matrices(session.model).items())


def test_schedules_that_begin_at_the_last_step_still_prune() -> None:
    assert_counts(apply(PruneWeights(sparsity=0.6, epochs=1, begin=1, end=1)), "weights", "layer", 0.6)
    session = apply(PruneChannels(epochs=1, begin=1, end=1))
    assert session.model.fc1.out_features == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"criterion": "taylor"}, "criterion taylor works during training; write epochs=1"),
        ({"regrowth": "soft"}, "regrowth soft works during training; write epochs=1"),
        ({"begin": 0.8, "end": 0.2, "epochs": 1}, r"begin=0.8 is after end=0.2"),
        ({"granularity": "2:4", "sparsity": 0.5}, "2:4 fixes what stays; leave out sparsity"),
        ({"granularity": "4:4"}, "4:4 keeps all; write fewer than 4"),
        ({"granularity": "2:4", "regrowth": "gradient", "epochs": 1}, "breaks 2:4; write regrowth=soft"),
        ({"granularity": "rows", "regrowth": "random", "epochs": 1}, "breaks rows; write regrowth=soft"),
        ({"sparsity": 0.2, "initial_sparsity": 0.5}, r"initial_sparsity=0.5 is above sparsity=0.2"),
        ({"scope": "global", "sparsities": {"fc1": 0.5}}, "sparsities fix what scope=global decides"),
        ({"skip": ("fc7",)}, r"fc7.*did you mean"),
    ],
)
def test_weights_what_is_not_allowed_is_said_in_one_line(fields, message) -> None:
    with pytest.raises(ed.ConfigurationError, match=message) as error:
        apply(PruneWeights(**fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("granularity", ["2", "0:4", "columns", "2:4:8"])
def test_unknown_granularity(granularity) -> None:
    with pytest.raises(ed.ConfigurationError, match="granularity"):
        PruneWeights(granularity=granularity)


def test_patterns_solve_no_budget() -> None:
    session = session_of()
    with pytest.raises(ed.ConfigurationError, match="budget 'params' cannot be solved for by prune-weights"):
        ed.compress(session.model, session.task, PruneWeights(granularity="2:4"), budget="params=0.5", quiet=True)


@pytest.mark.parametrize("fields", [{}, {"granularity": "rows"}, {"scope": "global", "epochs": 2, "frequency": 2}])
def test_weights_meet_a_budget(fields) -> None:
    session = session_of()
    result = ed.compress(
        session.model, session.task, PruneWeights(**fields), budget="params=0.4", quiet=True, latency=False
    )
    (line,) = result.budget
    assert line.met
    assert line.got > (0.7 if "granularity" in fields else 0.97) * line.asked, "a row is much of this network"


@pytest.mark.parametrize("criterion", get_args(ChannelCriterion))
@pytest.mark.parametrize(
    ("epochs", "regrowth", "scope"), [(0, "none", "layer"), (2, "none", "global"), (2, "soft", "layer")]
)
def test_channels_every_combination_runs_with_exact_counts(criterion, epochs, regrowth, scope) -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))
    method = PruneChannels(
        criterion=criterion, epochs=epochs, regrowth=regrowth, scope=scope, frequency=1, pruning_ratio=0.5, samples=32
    )
    session = apply(method, session_of(model, (6,)))
    widths = (session.model[0].out_features, session.model[3].out_features)
    assert widths == (5, 4) if scope == "layer" else sum(widths) == 17 - 8, widths


def test_channels_that_go_are_silent_long_before(monkeypatch) -> None:
    silent: list[int] = []

    class Watch(ed.Callback):
        def after_step(self, trainer):
            silent.append(int((trainer.model.fc1.weight == 0).all(1).sum()))

    session = session_of()
    method = PruneChannels(epochs=4, frequency=3, end=0.5, pruning_ratio=0.6)
    session.train([method.callback(session), Watch()], epochs=4)
    assert silent == sorted(silent)
    assert silent[0] == 0
    assert silent[5] < silent[-1] == 6
    assert session.model.fc1.out_features == 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 12), nn.MultiheadAttention(12, 4, batch_first=True)
        self.up, self.down, self.fc = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc((x + self.down(self.up(x).relu())).mean(1))


def test_heads_alone() -> None:
    session = apply(PruneChannels(granularity="heads", pruning_ratio=0.5), session_of(Attention(), (5, 6)))
    widths = session.findings[session.label]["widths"]
    assert list(widths.values()) == [[4, 2]]
    assert session.model.up.out_features == 10
    with pytest.raises(ed.SurgeryError, match="Net has no attention heads"):
        apply(PruneChannels(granularity="heads"))


def test_channels_meet_a_budget_during_training() -> None:
    session = session_of()
    method = PruneChannels(epochs=2, frequency=2, criterion="group-norm")
    result = ed.compress(session.model, session.task, method, budget="macs=0.5", quiet=True, latency=False)
    assert all(line.met for line in result.budget)


@pytest.mark.parametrize("step", [PruneWeights(), PruneChannels(criterion="l2")])
def test_one_shot_needs_no_training_data(step) -> None:
    session = session_of()
    x, y = torch.randn(16, 1, 6, 6), torch.randint(4, (16,))
    task = ed.Task.from_tensors(None, (x, y), num_classes=4)
    result = ed.compress(session.model, task, step, quiet=True, latency=False)
    assert result.after.nonzero_params < result.before.nonzero_params
    with pytest.raises(ed.DataError, match="epochs need labelled training data"):
        ed.compress(session.model, task, type(step)(epochs=1), quiet=True)
    if isinstance(step, PruneChannels):
        with pytest.raises(ed.DataError, match="criterion taylor needs labelled training data"):
            ed.compress(session.model, task, PruneChannels(criterion="taylor"), quiet=True)
