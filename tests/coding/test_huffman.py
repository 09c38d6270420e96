import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientdnns.coding import canonical_codes, huffman_decode, huffman_encode, huffman_lengths
from efficientdnns.errors import ConfigurationError, FileFormatError

counts_lists = st.lists(st.integers(1, 10_000), min_size=2, max_size=80)


@given(st.lists(st.integers(-5, 5), max_size=300))
def test_small_alphabets_come_back(values):
    assert huffman_decode(huffman_encode(np.array(values, dtype=np.int64))).tolist() == values


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50))
def test_large_symbols_come_back(values):
    assert huffman_decode(huffman_encode(np.array(values, dtype=np.int64))).tolist() == values


def test_single_symbol_takes_no_code_bits():
    data = huffman_encode(np.full(1000, -7))
    assert len(data) <= 4
    assert huffman_decode(data).tolist() == [-7] * 1000


@given(counts_lists)
def test_mean_length_lies_between_the_entropy_and_one_bit_more(counts):
    share = np.array(counts) / np.sum(counts)
    entropy = -(share * np.log2(share)).sum()
    mean = (share * huffman_lengths(counts)).sum()
    assert entropy - 1e-9 <= mean < entropy + 1


@given(counts_lists)
def test_codes_are_prefix_free_and_complete(counts):
    lengths = huffman_lengths(counts)
    words = [format(code, "b").zfill(length) for code, length in zip(canonical_codes(lengths), lengths, strict=True)]
    assert sum(2.0**-length for length in lengths) == 1
    for one, other in itertools.permutations(words, 2):
        assert not other.startswith(one)


def test_lengths_are_optimal_for_a_known_case():
    assert huffman_lengths([1, 1, 2, 4]).tolist() == [3, 3, 2, 1]
    assert huffman_lengths([]).tolist() == []


def test_lengths_stop_at_32_bits():
    fibonacci = [1, 1]
    while len(fibonacci) < 45:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman_lengths(fibonacci)
    assert lengths.max() <= 32
    assert sum(2.0**-length for length in lengths) == 1


def test_deep_codes_and_window_borders_decode(monkeypatch):
    monkeypatch.setattr("efficientdnns.coding.huffman._WINDOW_BITS", 7)
    values = np.concatenate([np.full(2**k, k) for k in range(12)])
    np.random.default_rng(0).shuffle(values)
    np.testing.assert_array_equal(huffman_decode(huffman_encode(values)), values)


def test_stream_length_is_the_sum_of_code_lengths():
    values = np.random.default_rng(0).geometric(0.4, 10_000)
    counts = np.unique(values, return_counts=True)[1]
    bits = int((counts * huffman_lengths(counts)).sum())
    assert 0 <= len(huffman_encode(values)) - bits / 8 < 30


def test_truncated_data_is_refused_at_every_length():
    data = huffman_encode(np.random.default_rng(0).integers(-9, 9, 60))
    for length in range(len(data)):
        with pytest.raises(FileFormatError):
            huffman_decode(data[:length])


@given(st.binary(max_size=40))
def test_arbitrary_bytes_raise_only_the_typed_error(data):
    with contextlib.suppress(FileFormatError):
        assert huffman_decode(data, limit=1000).size <= 1000


def test_limit_and_dtype_are_checked():
    with pytest.raises(FileFormatError, match="limit of 9"):
        huffman_decode(huffman_encode(np.zeros(10, dtype=int)), limit=9)
    with pytest.raises(ConfigurationError, match="float64"):
        huffman_encode(np.array([0.5]))
