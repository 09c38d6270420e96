"""What every method with budgets must satisfy; it goes through all of it by naming its limits in ``budgets``."""

from __future__ import annotations

import pytest
from torch import nn

import efficientdnns as ed
from efficientdnns.measurement.macs import count_macs
from efficientdnns.session import Session
from efficientdnns.training import Trainer

SOLVERS = [method for method in ed.methods() if method.budgets]
SIZES = {"macs": 0.6, "params": 0.5, "bytes": 0.15}
COARSE = 0.96
"""A channel of LeNet-5 is up to 4 % of its multiply-accumulates."""


def ident(method: type[ed.Method]) -> str:
    return method.name


def compress(model, task, method, budget, **options):
    return compress_with(model, task, method(**method.contract_fields), budget, **options)


def compress_with(model, task, method, budget, **options):
    return ed.compress(model, task, [method], budget=budget, quiet=True, latency=False, **options)


def solves(method: type[ed.Method]) -> frozenset[str]:
    return method(**method.contract_fields).solves


def assert_used_up(result) -> None:
    assert result.budget
    assert all(line.met for line in result.budget), result.budget
    assert max(line.got / line.asked for line in result.budget) > COARSE, result.budget


@pytest.mark.parametrize("method", SOLVERS, ids=ident)
def test_meets_its_limits_together_and_uses_them_up(method, trained, digits, tmp_path) -> None:
    budget = ",".join(f"{name}={share}" for name, share in SIZES.items() if name in solves(method))
    result = compress(trained, digits, method, budget)
    assert_used_up(result)
    assert result.report.methods[0].findings["budget"].keys() == {line.name for line in result.budget}
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= 0.15 * result.before.bytes


@pytest.fixture
def clock(monkeypatch):
    """Latency by a clock that runs with the multiply-accumulates; it sees every network that is timed."""
    seen: list[float] = []

    def latency(session: Session, model, times=1) -> float:
        def of(network) -> float:
            return 0.1 + 1e-6 * count_macs(network, session.task.example_input).total

        session.original_latency = of(session.original)
        seen.append(of(model))
        return seen[-1]

    monkeypatch.setattr(Session, "latency", latency)
    return seen


@pytest.mark.parametrize("method", [m for m in SOLVERS if "latency" in solves(m)], ids=ident)
def test_meets_a_latency_by_measuring_candidates(method, trained, digits, clock) -> None:
    assert_used_up(compress(trained, digits, method, "latency=0.6"))
    assert len(clock) > 3


@pytest.mark.parametrize("method", SOLVERS, ids=ident)
def test_unreachable_limits_are_refused_before_training_with_what_is_reachable(
    method, trained, digits, monkeypatch
) -> None:
    def train(self) -> None:
        raise AssertionError("trained for a budget that is out of reach")

    monkeypatch.setattr(Trainer, "fit", train)
    limits = sorted(solves(method) & SIZES.keys())
    message = f"{limits[0]}=.* cannot be met: .*the least that is reachable"
    with pytest.raises(ed.BudgetError, match=message) as error:
        compress(trained, digits, method, ",".join(f"{name}=1e-6" for name in limits))
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_real_latency_is_met_as_measured_or_refused(trained, digits) -> None:
    try:
        result = compress(trained, digits, ed.NISP, "latency=0.7")
    except ed.BudgetError:
        return
    planned = result.report.methods[0].findings["budget"]["latency"]
    assert planned["planned"] <= planned["asked"] * 1.1


def test_the_last_method_that_can_meets_a_limit(trained, digits) -> None:
    chain = [ed.NISP(pruning_ratio=0.2, samples=64), ed.ADMMPruning(**ed.ADMMPruning.contract_fields)]
    result = ed.compress(trained, digits, chain, budget="macs=0.6,bytes=0.1", quiet=True, latency=False)
    assert all(line.met for line in result.budget)
    nisp, admm = (record.findings["budget"].keys() for record in result.report.methods)
    assert (nisp, admm) == ({"macs"}, {"bytes"})
    assert all(line.got > 0.95 * line.asked for line in result.budget)


ROUNDING = [m for m in SOLVERS if "round_to" in m.model_fields and "macs" in solves(m)]


@pytest.mark.parametrize("method", ROUNDING, ids=ident)
@pytest.mark.parametrize("budget", [None, "macs=0.6"])
def test_keeps_multiples_of_channels_or_everything(method, budget, trained, digits) -> None:
    step = method(**method.contract_fields, round_to=4)
    result = compress_with(trained, digits, step, budget)
    for name, before in trained.named_modules():
        if isinstance(before, nn.Conv2d | nn.Linear):
            after = result.model.get_submodule(name)
            after = after[-1] if isinstance(after, nn.Sequential) else after  # behind a selection of its inputs
            for side in ("out_channels", "in_channels", "out_features", "in_features"):
                if hasattr(before, side):
                    width, whole = getattr(after, side), getattr(before, side)
                    assert width == whole or width % 4 == 0, (name, side, width)
    if budget is not None:
        # Four channels of the second convolution are 6 % of the multiply-accumulates.
        assert 0.9 < result.budget[0].got / result.budget[0].asked <= 1


@pytest.mark.parametrize("method", SOLVERS, ids=ident)
def test_leaves_layers_alone_by_name(method, trained, digits) -> None:
    step = method(**method.contract_fields, skip=("conv2",))
    after = ed.compress(trained, digits, [step], quiet=True, latency=False).model.get_submodule("conv2")
    before = trained.get_submodule("conv2")
    assert type(after) is type(before)
    assert after.out_channels == before.out_channels
    assert after.weight.all(), "it was pruned"
    with pytest.raises(ed.ConfigurationError, match=r"conv22.*did you mean 'conv2'"):
        ed.compress(trained, digits, [method(**method.contract_fields, skip=("conv22",))], quiet=True)
