import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientdnns.coding.entropy import (
    SymbolReader,
    SymbolWriter,
    get_number,
    get_raw,
    get_signed,
    get_symbols,
    growing_blocks,
    put_number,
    put_raw,
    put_signed,
    put_symbols,
)
from efficientdnns.errors import FileFormatError


def entropy_bytes(symbols):
    counts = np.unique(symbols, return_counts=True)[1]
    return -(counts * np.log2(counts / counts.sum())).sum() / 8


@given(st.lists(st.integers(0, 2**64 - 1), max_size=10), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=10))
def test_numbers_come_back(numbers, signed):
    writer = SymbolWriter()
    for number in numbers:
        put_number(writer, number)
    for number in signed:
        put_signed(writer, number)
    put_raw(writer, np.array(numbers, dtype=np.uint64), 64)
    reader = SymbolReader(writer.to_bytes())
    assert [get_number(reader, 2**64 - 1) for _ in numbers] == numbers
    assert [get_signed(reader) for _ in signed] == signed
    assert get_raw(reader, len(numbers), 64).tolist() == numbers


@given(st.integers(1, 300), st.integers(0, 200), st.integers(0, 2**32 - 1), st.floats(0.1, 8))
def test_symbols_come_back(alphabet, count, seed, peak):
    symbols = (np.random.default_rng(seed).random(count) ** peak * alphabet).astype(int)
    writer = SymbolWriter()
    put_symbols(writer, symbols, alphabet)
    np.testing.assert_array_equal(get_symbols(SymbolReader(writer.to_bytes()), count, alphabet), symbols)


@pytest.mark.parametrize("peak", [1, 3, 9])
def test_length_is_within_one_percent_of_the_entropy_and_a_table(peak):
    symbols = (np.random.default_rng(0).random(50_000) ** peak * 32).astype(int)
    writer = SymbolWriter()
    put_symbols(writer, symbols, 32)
    assert len(writer.to_bytes()) < 1.01 * entropy_bytes(symbols) + 40


def test_a_known_alphabet_of_one_symbol_takes_no_byte():
    writer = SymbolWriter()
    put_symbols(writer, np.zeros(1000, dtype=int), 1)
    assert writer.to_bytes() == b""
    assert get_symbols(SymbolReader(b""), 1000, 1).tolist() == [0] * 1000


def test_blocks_cover_the_range_and_grow():
    blocks = list(growing_blocks(10_000))
    assert [start for start, _ in blocks[1:]] == [stop for _, stop in blocks[:-1]]
    assert blocks[0][0] == 0
    assert blocks[-1][1] == 10_000
    assert len(blocks) < 200


def test_limits_and_impossible_endings_are_refused():
    writer = SymbolWriter()
    put_number(writer, 1000)
    with pytest.raises(FileFormatError, match="at most 999"):
        get_number(SymbolReader(writer.to_bytes()), 999)
    with pytest.raises(FileFormatError, match="zero byte"):
        SymbolReader(b"\1\0")
