import contextlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from efficientdnns.coding import decode_integers, encode_integers
from efficientdnns.errors import ConfigurationError, FileFormatError

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


def zstd_size(array):
    return len(zstandard.ZstdCompressor(level=22).compress(array.tobytes()))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=2, max_side=40, min_side=0))
    )
)
def test_arrays_come_back_and_are_never_larger_than_zstd(array):
    data = encode_integers(array)
    decoded = decode_integers(data)
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array.reshape(-1))
    assert len(data) <= zstd_size(array) + 2


def peaked(name):
    rng = np.random.default_rng(0)
    return {
        "sparse ids": np.where(rng.random(40_000) < 0.05, rng.integers(1, 32, 40_000), 0).astype(np.uint8),
        "laplace": np.rint(rng.laplace(0, 2, 40_000)).astype(np.int8),
        "wide normal": np.rint(rng.normal(0, 3000, 20_000)).astype(np.int32),
        "gaps": rng.geometric(0.02, 20_000),
        "heavy tail": (rng.pareto(0.5, 5_000) * 10).clip(0, 1e15).astype(np.int64),
        "two far values": rng.choice([-(10**12), 10**12], 5000),
        "repeating": np.tile(rng.integers(0, 200, 100), 100).astype(np.uint8),
        "uniform": rng.integers(0, 256, 10_000).astype(np.uint8),
        "constant": np.full(10_000, 77, dtype=np.int16),
        "one": np.array([5], dtype=np.int64),
    }[name]


PEAKED = [
    "sparse ids",
    "laplace",
    "wide normal",
    "gaps",
    "heavy tail",
    "two far values",
    "repeating",
    "uniform",
    "constant",
    "one",
]


@pytest.mark.parametrize("name", PEAKED)
def test_never_larger_than_zstd_22(name):
    array = peaked(name)
    data = encode_integers(array)
    np.testing.assert_array_equal(decode_integers(data), array)
    narrow = min((zstd_size(array.astype(d)) for d in DTYPES[1:] if (array.astype(d) == array).all()), default=0)
    assert len(data) <= min(zstd_size(array), narrow) + 2


@pytest.mark.parametrize("name", ["sparse ids", "laplace", "gaps"])
def test_clearly_smaller_than_zstd_22_and_close_to_the_entropy(name):
    array = peaked(name)
    counts = np.unique(array, return_counts=True)[1]
    entropy = -(counts * np.log2(counts / counts.sum())).sum() / 8
    size = len(encode_integers(array))
    assert size < 0.985 * zstd_size(array)
    assert size < 1.02 * entropy + 20


def test_a_range_above_the_alphabet_is_split_with_little_loss():
    array = peaked("wide normal")
    ideal = array.size * np.log2(3000 * np.sqrt(2 * np.pi * np.e)) / 8
    assert len(encode_integers(array)) < 1.02 * ideal


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_arrays_keep_their_dtype_in_one_byte(dtype):
    data = encode_integers(np.empty(0, dtype=dtype))
    assert len(data) == 1
    assert decode_integers(data).dtype == dtype


@pytest.mark.parametrize("name", PEAKED)
def test_limit_is_respected(name):
    data = encode_integers(peaked(name))
    with pytest.raises(FileFormatError):
        decode_integers(data, limit=peaked(name).size - 1)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_arbitrary_bytes_raise_only_the_typed_error(data):
    with contextlib.suppress(FileFormatError):
        assert decode_integers(data, limit=5000).size <= 5000


def test_truncated_zstd_is_refused():
    data = encode_integers(peaked("repeating"))
    assert data[0] >= 16, "the repeating pattern should be left to zstd"
    for length in (0, 1, 5, len(data) - 1):
        if length != 1:
            with pytest.raises(FileFormatError):
                decode_integers(data[:length])


def test_floats_are_refused():
    with pytest.raises(ConfigurationError, match="float64"):
        encode_integers(np.zeros(3))
