import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientdnns.parts.sparse_gradients import (
    bytes_of,
    decode,
    encode,
    entries_to_send,
    mean,
    pack,
    select_exact,
    select_sampled,
    unpack,
)


@pytest.mark.parametrize(
    ("numel", "sparsity", "expected"),
    [(1000, 0.999, 1), (1001, 0.999, 2), (10, 0.999, 1), (1000, 0, 1000), (7, 0.75, 2), (10**9, 0.999, 10**6)],
)
def test_number_of_entries_has_no_rounding_error(numel, sparsity, expected):
    assert entries_to_send(numel, sparsity) == expected


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_exact_selection_takes_the_largest(numel, count, seed):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    chosen = select_exact(values, count)
    assert len(chosen) == min(numel, count)
    assert bool((chosen.diff() > 0).all())
    rest = values.abs().clone()
    rest[chosen] = -1
    assert float(rest.max()) <= float(values[chosen].abs().min())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["normal", "heavy", "mostly zero"]), st.sampled_from([40, 200]))
def test_sampled_selection_stays_in_its_band(seed, kind, count):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(20_000, generator=g)
    if kind == "heavy":
        values = values**5
    if kind == "mostly zero":
        values *= torch.rand(20_000, generator=g) < 0.05
    chosen = select_sampled(values, count, 0.01, g)
    assert 0.8 * count <= len(chosen) <= 1.3 * count
    assert bool((chosen.diff() > 0).all())


def test_too_many_sampled_entries_are_thinned_to_the_largest():
    values = torch.ones(10_000) + torch.arange(10_000) * 1e-5
    assert torch.equal(select_sampled(values, 100, 0.02), torch.arange(9_900, 10_000)) or (
        80 <= len(select_sampled(values, 100, 0.02)) <= 130
    )


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 300_000), max_size=20), st.integers(0, 9))
def test_messages_decode_to_the_same_tensor_across_long_runs(positions, seed):
    dense = torch.zeros(3, 100_001)
    where = torch.tensor(sorted(positions), dtype=torch.long)
    values = torch.randn(len(where), generator=torch.Generator().manual_seed(seed))
    dense.view(-1)[where] = values
    message = encode(where, values)
    assert torch.equal(decode(message, dense.shape), dense)
    assert bool((message.run_lengths < 1 << 16).all())


def test_sending_everything_leaves_nothing_to_a_sample():
    assert torch.equal(select_sampled(torch.randn(5_000), 5_000, 0.01), torch.arange(5_000))


def test_what_is_packed_is_what_is_counted_and_comes_back():
    values = torch.randn(200_000)
    parts = {
        "sparse": encode(select_exact(values, 17), values[select_exact(values, 17)]),
        "bias": torch.randn(3),
        "odd": encode(torch.tensor([1]), torch.tensor([2.0])),
        "scalar": torch.tensor(4.0),
    }
    shapes = {"sparse": (400, 500), "bias": (3,), "odd": (5,), "scalar": ()}
    data = pack(parts)
    assert data.numel() == bytes_of(parts)
    again = unpack(data, shapes, {"bias", "scalar"})
    for name, shape in shapes.items():
        old, new = (decode(p[name], shape) if name in ("sparse", "odd") else p[name] for p in (parts, again))
        assert torch.equal(old, new)


def test_bytes_are_values_and_run_lengths_and_a_count():
    message = encode(torch.tensor([0, 5]), torch.tensor([1.0, 2.0]))
    assert message.bytes == 4 + 2 * (4 + 2)
    bridged = encode(torch.tensor([70_000]), torch.tensor([1.0]))
    assert bridged.bytes == 4 + 2 * (4 + 2)


def test_the_mean_is_over_the_workers():
    shapes = {"w": (2, 3), "b": (2,)}
    first = {"w": encode(torch.tensor([0]), torch.tensor([3.0])), "b": torch.tensor([1.0, 3.0])}
    second = {"w": encode(torch.tensor([0, 5]), torch.tensor([1.0, 4.0])), "b": torch.tensor([3.0, 5.0])}
    average = mean([first, second], shapes)
    assert average["w"].tolist() == [[2, 0, 0], [0, 0, 2]]
    assert average["b"].tolist() == [2, 4]
    assert math.isclose(float(average["w"].sum()), 4)
