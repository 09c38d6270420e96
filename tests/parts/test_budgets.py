"""The search on a session: limits, what is kept for a resumed run, confirmation of timed plans."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.budget import Budget, blocks, fill, most
from efficientdnns.parts.budgets import check_patterns, costs, limits_of, meet, targets_of
from efficientdnns.parts.sparse_budgets import coded_size, trim
from efficientdnns.session import Session


def session_with(budget: str, **options) -> Session:
    torch.manual_seed(0)
    x, y = torch.randn(8, 20), torch.randint(4, (8,))
    model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.ReLU(), nn.Linear(30, 4, bias=False))
    task = ed.Task.from_tensors((x, y), (x, y))
    return Session(
        model=model, task=task, original=copy.deepcopy(model), budget=Budget.parse(budget), label="it", **options
    )


def with_width(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(20, width, bias=False), nn.ReLU(), nn.Linear(width, 4, bias=False))


def solved(session: Session) -> int:
    return meet(
        session,
        ed.NISP(),
        propose=most(1, 30),
        estimate=lambda plan: dict.fromkeys(("macs", "params", "bytes", "latency"), plan["kept"]),
        build=lambda plan: with_width(plan["kept"]),
        least={"kept": 1},
        full={"kept": 30},
    )["kept"]


def test_costs_and_targets_are_those_of_the_original() -> None:
    session = session_with("macs=0.5,params=100")
    assert costs(session, session.model, ["macs", "params"]) == {"macs": 720, "params": 720}
    assert targets_of(session, ed.NISP()) == {"macs": 360, "params": 100}
    assert solved(session) == 4


def test_a_later_solver_takes_the_limit_over() -> None:
    method, later = ed.NISP(), ed.NISP()
    session = session_with("macs=0.5,params=100")
    session.solvers = {"macs": later, "params": method}
    assert limits_of(session, method) == ["params"]
    assert limits_of(session, ed.ADMMPruning()) == []


def test_a_plan_is_kept_for_the_resumed_run(tmp_path, monkeypatch) -> None:
    pace = [1.0]

    def latency(self, model, times=1) -> float:
        return pace[0] * model[0].out_features

    monkeypatch.setattr(Session, "latency", latency)
    assert solved(session_with("latency=0.5", directory=tmp_path)) == 14  # aimed at 99 %
    pace[0] = 3.0
    resumed = session_with("latency=0.5", directory=tmp_path)
    resumed.original[0].out_features = 10  # a machine on which everything else is different
    assert solved(resumed) == 14
    other = session_with("latency=0.5", directory=tmp_path)
    other.runs = 1
    assert other.directory is not None
    assert solved(other) == 14


def test_a_timed_plan_is_confirmed(monkeypatch) -> None:
    calls: list[int] = []

    def latency(self, model, times=1) -> float:
        width = model[0].out_features
        calls.append(width)
        # Lucky the first time, 10 % slower whenever it is timed again.
        return width * (1.1 if calls.count(width) > 1 and width < 30 else 1.0)

    monkeypatch.setattr(Session, "latency", latency)
    width = solved(session_with("latency=0.5"))
    assert width * 1.1 <= 15
    assert calls.count(width) > 1


@pytest.mark.parametrize("share", [0.3, 0.55, 0.6, 0.8])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_latency_in_steps_is_used_up_to_one_more_unit_of_any_group(share, noise, monkeypatch) -> None:
    full = {"a": 64, "b": 50, "c": 100}
    random = torch.Generator().manual_seed(0)

    def milliseconds(plan) -> float:
        """Kernels that work on blocks of 16 channels, and what never gets less."""
        blocks = {name: -(-kept // 16) for name, kept in plan.items()}
        return 1 + blocks["a"] + blocks["a"] * blocks["b"] + 0.1 * blocks["b"] * blocks["c"]

    class Timed(nn.Module):
        def __init__(self, plan) -> None:
            super().__init__()
            self.plan = dict(plan)

    def latency(self, model, times=1) -> float:
        plan = model.plan if isinstance(model, Timed) else full
        timings = 1 + noise * torch.randn(times, generator=random)
        return milliseconds(plan) * float(timings.median())

    monkeypatch.setattr(Session, "latency", latency)
    keys = {name: [(n + 1) / size for n in range(size)] for name, size in full.items()}
    offered = [block for name in full for block in blocks(name, keys[name])]
    least = dict.fromkeys(full, 1)
    session = session_with(f"latency={share}")
    plan = meet(
        session,
        ed.NISP(),
        propose=lambda fits, enough: fill(least, offered, fits, enough),
        estimate=lambda plan: {"latency": plan["a"] * 9 + plan["a"] * plan["b"] * 9 + plan["b"] * plan["c"]},
        build=Timed,
        least=least,
        full=full,
    )
    target = share * milliseconds(full)
    assert milliseconds(plan) <= target * (1 + 3 * noise)
    if not noise:
        more = [{**plan, name: plan[name] + 1} for name in full if plan[name] < full[name]]
        assert milliseconds(plan) >= 0.98 * target or all(milliseconds(one) > 0.99 * target for one in more)


def test_an_unreachable_latency_says_what_is_reachable(monkeypatch) -> None:
    monkeypatch.setattr(Session, "latency", lambda self, model, times=1: 5.0 + model[0].out_features)
    with pytest.raises(ed.BudgetError, match=r"latency=3\.5 cannot be met: 6 is the least that is reachable"):
        solved(session_with("latency=0.1"))


def test_patterns_that_fit_nothing_are_named() -> None:
    check_patterns(("layer1.*", "conv1"), ["conv1", "layer1.0"], "it: skip")
    with pytest.raises(ed.ConfigurationError, match=r"it: skip: no layer is called 'layer2\.\*' \(did you mean"):
        check_patterns(("layer2.*",), ["conv1", "layer1.0"], "it: skip")


def test_trim_takes_the_smallest_until_the_file_fits() -> None:
    session = session_with("bytes=1500")
    before = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    gone = trim(session, ed.ADMMPruning(), session.model, list(before))
    assert costs(session, session.model, ["bytes"])["bytes"] <= 1500
    zeros = torch.cat([(p == 0).flatten() for p in session.model.parameters()])
    sizes = torch.cat([(p / p.abs().mean()).abs().flatten() for p in before.values()])
    assert zeros.sum() == gone > 0
    assert sizes[zeros].max() <= sizes[~zeros].min()


def test_coded_size_is_the_entropy_of_positions_and_the_weights() -> None:
    assert coded_size(0, 80) == 0
    assert coded_size(80, 80) == 320
    assert coded_size(40, 80) == 40 * 4 + 10
