import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientdnns.coding import relative_decode, relative_encode, shared_weight_bits
from efficientdnns.errors import ConfigurationError, FileFormatError


@given(st.integers(1, 16), st.sets(st.integers(0, 100_000), max_size=60))
def test_positions_come_back(index_bits, positions):
    gaps, is_filler = relative_encode(sorted(positions), index_bits)
    assert gaps.size == is_filler.size == len(positions) + is_filler.sum()
    assert not gaps.size or (gaps.min() >= 0 and gaps.max() < 2**index_bits)
    assert relative_decode(gaps, is_filler).tolist() == sorted(positions)


@pytest.mark.parametrize(
    ("zeros", "gaps"),
    [
        (0, [0]),
        (14, [14]),
        (15, [15]),
        (16, [15, 0]),
        (17, [15, 1]),
        (31, [15, 15]),
        (32, [15, 15, 0]),
        (48, [15] * 3 + [0]),
    ],
)
def test_gaps_around_the_largest_one_with_four_bits(zeros, gaps):
    stored, is_filler = relative_encode([zeros], 4)
    assert stored.tolist() == gaps
    assert is_filler.tolist() == [True] * (len(gaps) - 1) + [False]
    # the demo decoder's convention: position = cumsum(stored + 1) - 1
    assert (np.cumsum(stored + 1) - 1)[-1] == zeros


def test_leading_and_trailing_zeros():
    weights = np.array([0, 0, 0, 5, 0, 7, 0, 0])
    gaps, is_filler = relative_encode(np.flatnonzero(weights), 2)
    assert gaps.tolist() == [3, 1]
    restored = np.zeros_like(weights)
    restored[relative_decode(gaps, is_filler)] = [5, 7]
    np.testing.assert_array_equal(restored, weights)


def test_no_positions():
    gaps, is_filler = relative_encode([], 5)
    assert gaps.size == is_filler.size == relative_decode(gaps, is_filler).size == 0


def test_wrong_input_is_refused():
    with pytest.raises(ConfigurationError, match="ascending"):
        relative_encode([3, 3], 4)
    with pytest.raises(ConfigurationError, match="1 to 16"):
        relative_encode([3], 17)
    with pytest.raises(FileFormatError):
        relative_decode([1, 2], [False])


def test_size_formula_gives_the_rows_of_the_paper():
    # LeNet-5: of conv1's 500 weights 66 % are kept, of conv2's 25,000 12 %; 8-bit ids, 5-bit gaps, 256 shared values
    conv1 = shared_weight_bits(330, 8, 5, 256) / (32 * 500)
    conv2 = shared_weight_bits(3000, 8, 5, 256) / (32 * 25_000)
    assert round(100 * conv1) == 78
    assert round(100 * conv2, 1) == 5.9
    # r = n b / (n log2 k + k b) without pruning: the paper's example of 4 clusters and 16 weights, 3.2x
    assert 16 * 32 / shared_weight_bits(16, 2, 0, 4) == 3.2
