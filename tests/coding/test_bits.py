import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficientdnns.coding import pack_bits, pack_bools, packed_size, unpack_bits, unpack_bools
from efficientdnns.coding.bits import ByteReader, write_varint
from efficientdnns.errors import ConfigurationError, FileFormatError


@given(st.integers(1, 16), st.lists(st.integers(0, 2**16 - 1), max_size=300))
def test_packed_integers_come_back(bits, values):
    values = [value % 2**bits for value in values]
    data = pack_bits(values, bits)
    assert len(data) == -(-len(values) * bits // 8) == packed_size(len(values), bits)
    assert unpack_bits(data, bits, len(values)).tolist() == values


@given(st.lists(st.booleans(), max_size=100))
def test_packed_booleans_come_back(values):
    data = pack_bools(values)
    assert len(data) == -(-len(values) // 8)
    assert unpack_bools(data, len(values)).tolist() == values


def test_four_bits_put_the_first_value_into_the_low_nibble():
    assert pack_bits([1, 2, 3], 4) == bytes([0x21, 0x03])


def test_packing_works_across_chunks(monkeypatch):
    monkeypatch.setattr("efficientdnns.coding.bits._CHUNK", 16)
    values = np.random.default_rng(0).integers(0, 2**11, 100)
    np.testing.assert_array_equal(unpack_bits(pack_bits(values, 11), 11, 100), values)


@pytest.mark.parametrize(("values", "bits"), [([4], 2), ([-1], 2), ([0], 0), ([0], 17)])
def test_values_that_do_not_fit_are_refused(values, bits):
    with pytest.raises(ConfigurationError):
        pack_bits(values, bits)


def test_short_data_is_refused():
    with pytest.raises(FileFormatError, match="need 2 bytes, found 1"):
        unpack_bits(b"\0", 3, 3)
    with pytest.raises(FileFormatError):
        unpack_bools(b"\0", 9)


@given(st.integers(0, 2**63 - 1))
def test_varint_round_trip(value):
    assert ByteReader(write_varint(value)).varint() == value


def test_reader_refuses_to_read_past_the_end_and_above_the_limit():
    with pytest.raises(FileFormatError, match="ends early"):
        ByteReader(b"\x80").varint()
    with pytest.raises(FileFormatError, match="limit of 10"):
        ByteReader(write_varint(11)).varint(limit=10)
    with pytest.raises(FileFormatError):
        ByteReader(b"\xff" * 30).varint()
