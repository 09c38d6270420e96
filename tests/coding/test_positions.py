import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from efficientdnns.coding.contexts import get_placed_symbols, put_placed_symbols
from efficientdnns.coding.entropy import SymbolReader, SymbolWriter
from efficientdnns.coding.positions import get_mask, put_mask
from efficientdnns.errors import FileFormatError


def mask_bytes(mask):
    writer = SymbolWriter()
    put_mask(writer, mask)
    data = writer.to_bytes()
    np.testing.assert_array_equal(get_mask(SymbolReader(data), mask.shape), mask)
    return len(data)


def placed_bytes(symbols, mask, alphabet):
    writer = SymbolWriter()
    put_placed_symbols(writer, symbols, mask, alphabet)
    data = writer.to_bytes()
    np.testing.assert_array_equal(get_placed_symbols(SymbolReader(data), mask, alphabet), symbols)
    return len(data)


def bernoulli_bytes(mask):
    p = mask.mean()
    return mask.size * -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8


@settings(max_examples=80, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=4, max_side=12, min_side=0)))
def test_masks_of_any_shape_come_back(mask):
    mask_bytes(mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_masks_of_any_density_come_back(rows, columns, density, seed):
    rng = np.random.default_rng(seed)
    mask_bytes(rng.random((rows, columns)) < density * rng.random(columns))
    mask_bytes((rng.random((rows, 1)) < density) & np.ones((rows, columns), dtype=bool))


def test_random_positions_take_their_entropy():
    mask = np.random.default_rng(0).random((300, 784)) < 0.05
    assert mask_bytes(mask) < 1.005 * bernoulli_bytes(mask)


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_of_unequal_density_take_less(transposed):
    rng = np.random.default_rng(0)
    mask = rng.random((200, 150)) < np.where(np.arange(150) < 75, 0.002, 0.1)
    mask = mask.T if transposed else mask
    assert mask_bytes(mask) < 0.9 * bernoulli_bytes(mask)


def test_empty_rows_take_little():
    mask = np.random.default_rng(0).random((100, 1000)) < 0.2
    mask[::2] = False
    mask[1] = True
    assert mask_bytes(mask) < 1.03 * bernoulli_bytes(mask[3::2]) + 40


def test_two_of_four_takes_its_entropy():
    rng = np.random.default_rng(0)
    mask = (rng.random((4000, 4)).argsort(1) < 2).reshape(100, 160)
    assert mask_bytes(mask) < 1.03 * 4000 * np.log2(6) / 8


def test_a_handful_of_positions_takes_a_handful_of_bytes():
    mask = np.zeros((512, 512), dtype=bool)
    mask[[5, 77, 400], [3, 300, 9]] = True
    assert mask_bytes(mask) < 16
    assert mask_bytes(np.zeros((512, 512), dtype=bool)) <= 1


def test_contradicting_stream_is_refused_or_gives_the_shape():
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = rng.integers(1, 256, rng.integers(0, 40)).astype(np.uint8).tobytes()
        with contextlib.suppress(FileFormatError):
            assert get_mask(SymbolReader(data), (13, 7)).shape == (13, 7)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_symbols_in_tables_come_back(rows, columns, alphabet, density, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < density
    placed_bytes(rng.integers(0, alphabet, mask.sum()), mask, alphabet)


@pytest.mark.parametrize("transposed", [False, True])
def test_neighbours_that_are_alike_take_less(transposed):
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.choice([-1, 0, 1], (100, 200)), axis=1) % 32
    table = walk.T if transposed else walk
    size = placed_bytes(table.reshape(-1), np.ones(table.shape, dtype=bool), 32)
    assert size < 0.85 * table.size * 5 / 8
    half = rng.random(table.shape) < 0.5
    assert placed_bytes(table[half], half, 32) < 0.9 * half.sum() * 5 / 8


def test_arbitrary_symbol_streams_raise_only_the_typed_error():
    rng = np.random.default_rng(0)
    mask = np.ones((10, 10), dtype=bool)
    for _ in range(200):
        data = rng.integers(1, 256, rng.integers(0, 40)).astype(np.uint8).tobytes()
        with contextlib.suppress(FileFormatError):
            assert get_placed_symbols(SymbolReader(data), mask, 9).max() < 9
