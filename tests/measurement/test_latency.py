"""Order of the calls, restored settings, and what may be claimed. No test looks at a real duration."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from efficientdnns.errors import ConfigurationError
from efficientdnns.measurement import Latency, Speedup, latency, measure_latency, speedup


class Clock:
    """Time that passes only when a network is called, and a journal of the calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.journal: list[str] = []

    def __call__(self) -> float:
        return self.now

    def network(self, name: str, seconds: float):
        def run(inputs):
            self.now += seconds
            self.journal.append(name)

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "perf_counter", clock)
    return clock


def test_networks_take_turns_in_random_order(clock):
    calls = [clock.network("A", 0.004), clock.network("B", 0.002)]
    before, after = measure_latency(calls, torch.zeros(3, 1), repeats=40, warmup=2)
    warm, calibration, timed = clock.journal[:4], clock.journal[4:10], clock.journal[10:]
    assert warm == ["A", "B"] * 2
    assert calibration == ["A"] * 3 + ["B"] * 3
    rounds = ["".join(timed[i : i + 2]) for i in range(0, len(timed), 2)]
    assert set(rounds) == {"AB", "BA"}  # every round both, so that slow phases hit both
    assert 8 < rounds.count("AB") < 32
    first = clock.journal.copy()
    clock.journal.clear()
    measure_latency(calls, torch.zeros(3, 1), repeats=40, warmup=2)
    assert clock.journal == first
    assert (before.median, before.p10, before.p90) == pytest.approx((4, 4, 4))
    assert after.median == pytest.approx(2)
    assert (before.runs, before.batch) == (40, 3)
    assert speedup(before, after).ratio == pytest.approx(2)


def test_fast_networks_are_called_several_times_a_sample(clock):
    fast, slow = measure_latency(
        [clock.network("A", 1e-5), clock.network("B", 0.01)], torch.zeros(1), repeats=5, warmup=0
    )
    first = clock.journal.index("B")
    timed = "".join(clock.journal[first + 3 :])
    loops = timed.count("A") // 5
    samples = timed.replace("A" * loops, "a")
    assert [set(samples[i : i + 2]) for i in range(0, 10, 2)] == [{"a", "B"}] * 5
    assert len(samples) == 10
    assert 100 <= loops <= 130
    assert fast.median == pytest.approx(0.01)
    assert slow.median == pytest.approx(10)


def test_time_is_limited_but_enough_samples_are_taken(clock):
    slow = clock.network("A", 1.0)
    assert measure_latency([slow], torch.zeros(1), seconds=2.0)[0].runs == latency.FEWEST_RUNS
    assert measure_latency([slow], torch.zeros(1), seconds=20.5)[0].runs == 21
    assert measure_latency([slow], torch.zeros(1), seconds=1e9, repeats=30)[0].runs == 30


class Probe(nn.Module):
    """Records the state it is called in."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()
        self.states: set[tuple[object, ...]] = set()

    def forward(self, x):
        state = (self.drop.training, torch.is_inference_mode_enabled(), torch.get_num_threads(), len(x), gc.isenabled())
        self.states.add(state)
        return x


def test_networks_run_in_inference_mode_with_the_given_threads_and_everything_is_restored():
    threads = torch.get_num_threads()
    wanted = threads + 1
    first, second = Probe().train(), Probe().eval()
    random = torch.get_rng_state()
    results = measure_latency(
        [first, second], torch.zeros(1, 2), repeats=2, warmup=1, threads=wanted, batch=5, seconds=0.1
    )
    timed = (False, True, wanted, 5, False)
    assert first.states == second.states == {timed}
    assert [(r.runtime, r.threads, r.batch) for r in results] == [("pytorch-eager", wanted, 5)] * 2
    assert first.training
    assert first.drop.training
    assert not second.training
    assert torch.get_num_threads() == threads
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), random)


def test_settings_are_restored_after_an_error():
    threads = torch.get_num_threads()
    model = nn.Linear(3, 3).train()
    with pytest.raises(RuntimeError):
        measure_latency([model], torch.zeros(1, 4), threads=threads + 1)
    assert model.training
    assert torch.get_num_threads() == threads
    assert gc.isenabled()


def test_another_runtime_is_one_class(clock):
    class Elsewhere:
        runtime = "elsewhere"
        closed = False

        @contextmanager
        def opened(self, inputs, threads):
            prepared = inputs.numpy() + threads
            clock.now += 100  # preparation is not timed
            yield lambda: clock.network("E", 0.003)(prepared)
            self.closed = True

    runner = Elsewhere()
    (result,) = measure_latency([runner], torch.zeros(2, 1), threads=1, repeats=5)
    assert (result.runtime, result.batch) == ("elsewhere", 2)
    assert result.median == pytest.approx(3)
    assert runner.closed


@pytest.mark.parametrize("name", ["repeats", "threads", "batch"])
def test_senseless_numbers_are_refused(name):
    with pytest.raises(ConfigurationError, match=f"{name} is 0"):
        measure_latency([nn.Identity()], torch.zeros(1), **{name: 0})


def measured(before, after, run=1) -> Speedup:
    pair = [Latency.of(list(s), runtime="pytorch-eager", threads=1, batch=1, run=run) for s in (before, after)]
    return speedup(*pair)


def noise(seed: int, rounds: int = 60) -> np.ndarray:
    """A machine that is now and then three times slower."""
    random = np.random.default_rng(seed)
    return random.lognormal(0, 0.05, rounds) * random.choice([1.0, 3.0], rounds, p=[0.8, 0.2])


def test_the_same_network_twice_is_never_faster():
    claims = sum(measured(noise(seed), noise(seed + 1000)).significant for seed in range(100))
    assert claims <= 2


def test_a_small_difference_is_not_claimed_however_certain():
    result = measured(np.full(50, 1.02), np.full(50, 1.0))
    assert not result.significant
    assert str(result) == "no measurable difference (1.02x, within noise)"


def test_real_differences_are_claimed_in_both_directions():
    rounds = noise(3)
    faster, slower = measured(1.83 * rounds, rounds), measured(rounds, 1.2 * rounds)
    assert str(faster).startswith("1.83x faster (1.")
    assert str(slower).startswith("1.20x slower (1.")
    assert faster.low <= 1.83 <= faster.high
    assert slower.low <= slower.ratio <= slower.high < 1
    assert faster == measured(1.83 * rounds, rounds)


def test_disturbances_that_hit_both_cancel_out():
    rounds, own = noise(5), np.random.default_rng(0).lognormal(0, 0.02, (2, 60))
    disturbed = measured(1.1 * rounds * own[0], rounds * own[1])
    assert disturbed.significant
    assert disturbed.ratio == pytest.approx(1.1, abs=0.04)


def test_a_machine_that_is_often_disturbed_does_not_hide_what_is_true():
    """Half of all samples are five times slower, whichever network they are of."""
    random = np.random.default_rng(7)
    slow = random.choice([1.0, 5.0], (2, 300))
    result = measured(2.0 * slow[0], slow[1])
    assert result.ratio == pytest.approx(2)
    assert not measured(slow[0], slow[1]).significant


def test_too_few_rounds_prove_nothing():
    assert not measured([2.0] * 4, [1.0] * 4).significant
    assert measured([2.0] * 5, [1.0] * 5).significant


def test_only_what_was_measured_together_is_compared():
    one = Latency.of([1.0] * 9, runtime="pytorch-eager", threads=1, batch=1, run=1)
    with pytest.raises(ConfigurationError, match="not measured together"):
        speedup(one, one.model_copy(update={"run": 2}))
    with pytest.raises(ConfigurationError, match="same runtime"):
        speedup(one, one.model_copy(update={"runtime": "onnxruntime"}))
    with pytest.raises(ConfigurationError, match="not measured together"):
        speedup(*[Latency.model_validate_json(one.model_dump_json())] * 2)


def test_reports_hold_the_summary_only():
    one = Latency.of([1.0, 2.0, 3.0], runtime="pytorch-eager", threads=2, batch=1, run=1)
    assert set(one.model_dump()) == {"median", "p10", "p90", "runtime", "threads", "batch", "runs"}
    assert str(one) == "2 ms (1.2-2.8; pytorch-eager, batch 1, 2 threads)"
