import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientdnns.coding import (
    CodebookCodec,
    DeepCompressionCodec,
    best,
    codec_named,
    encode,
    register_codec,
    shared_weight_bits,
)
from efficientdnns.coding.patterns import element_bits
from efficientdnns.errors import ConfigurationError, FileFormatError

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.uint64]
FOR_ALL = ["raw", "planes", "sparse", "codebook", "deep-compression"]


def decoded(encoded, tensor):
    return codec_named(encoded.codec).decode(encoded.data, encoded.parameters, tuple(tensor.shape), tensor.dtype)


def assert_exact(encoded, tensor):
    restored = decoded(encoded, tensor)
    assert restored.dtype == tensor.dtype
    assert restored.shape == tensor.shape
    assert element_bits(restored).tobytes() == element_bits(tensor).tobytes()


def shared(shape, kept=0.05, clusters=32, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(clusters, generator=generator).to(dtype)
    tensor = values[torch.randint(clusters, shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < kept, tensor, torch.zeros((), dtype=dtype))


shapes = st.lists(st.integers(0, 8), max_size=4).filter(lambda shape: math.prod(shape) <= 1000)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FLOATS + INTEGERS + [torch.bool, torch.complex64]), shapes, st.integers(0, 99), st.data())
def test_every_codec_is_exact_for_every_dtype_and_shape(dtype, shape, seed, data):
    bits = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=torch.Generator().manual_seed(seed))
    bits = bits * (torch.rand(bits.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)
    raw = (bits % 2 if dtype == torch.bool else bits).to(torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    for name in FOR_ALL:
        assert_exact(encode(tensor, name), tensor)
    assert_exact(best(tensor), tensor)
    if not dtype.is_floating_point and not dtype.is_complex:
        assert_exact(encode(tensor, "integers"), tensor)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(60, 80), (16, 8, 3, 3), (700,), ()])
def test_sparse_shared_weights_are_exact_and_small(dtype, shape):
    tensor = shared(shape, kept=0.3, clusters=8, dtype=dtype)
    for name in FOR_ALL:
        assert_exact(encode(tensor, name), tensor)
    if tensor.numel() > 1000:
        chosen = best(tensor)
        assert chosen.codec == "codebook"
        assert len(chosen.data) < 0.3 * tensor.numel() + 100


def test_special_values_are_exact():
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 3.4e38])
    tensor = special.repeat(50)
    for name in FOR_ALL:
        assert_exact(encode(tensor, name), tensor)
    payload = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000], dtype=torch.int32).view(torch.float32).repeat(20)
    for name in FOR_ALL:
        assert_exact(encode(payload, name), payload)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_exact_and_smaller(dtype):
    values = torch.distributions.Geometric(0.4).sample((90, 70)).clamp(max=100)
    tensor = (values - 20).to(dtype) if dtype.is_signed else values.to(dtype)
    chosen = best(tensor)
    assert_exact(chosen, tensor)
    assert chosen.codec != "raw"
    assert_exact(encode(tensor, "integers"), tensor)
    edges = torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max, 0, 1], dtype=dtype)
    assert_exact(encode(edges, "integers"), edges)
    assert_exact(encode(edges.reshape(2, 2), "integers"), edges.reshape(2, 2))


def test_dense_weights_stay_raw_unless_asked():
    tensor = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    assert best(tensor).codec == "raw"
    asked = best(tensor, ["planes"])
    assert asked.codec == "planes"
    assert_exact(asked, tensor)
    assert len(asked.data) < 0.9 * 4 * tensor.numel()


def test_uniform_levels_cost_no_codebook():
    step = torch.tensor(0.0371)
    levels = torch.randint(-16, 16, (40, 50), generator=torch.Generator().manual_seed(0))
    uniform = levels * step
    other = uniform + 1e-3 * torch.sin(levels.float())
    assert_exact(encode(uniform, "codebook"), uniform)
    assert_exact(encode(other, "codebook"), other)
    assert len(encode(uniform, "codebook").data) < len(encode(other, "codebook").data) - 60


def test_uniform_levels_with_a_negative_zero_are_exact():
    tensor = torch.arange(-8, 8).float().repeat(10) * 0.25
    tensor[5] = -0.0
    assert_exact(encode(tensor, "codebook"), tensor)


def test_codebook_refuses_too_many_values():
    tensor = torch.randn(5000)
    assert not CodebookCodec().suits(tensor)
    with pytest.raises(ConfigurationError, match="at most 4096"):
        encode(tensor, "codebook")


def test_sparse_floats_choose_sparse():
    tensor = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    tensor[tensor.abs() < 1.5] = 0
    chosen = best(tensor)
    assert chosen.codec == "sparse"
    assert_exact(chosen, tensor)


@pytest.mark.parametrize("index_bits", [None, 1, 2, 4, 8, 16])
@pytest.mark.parametrize("huffman", [True, False])
def test_deep_compression_is_exact(index_bits, huffman):
    for tensor in (shared((80, 90), kept=0.02), shared((30, 30), kept=1.0, clusters=3), torch.zeros(7, 7)):
        assert_exact(encode(tensor, DeepCompressionCodec(index_bits, huffman)), tensor)


def test_deep_compression_size_follows_the_formula():
    tensor = shared((200, 200), kept=0.1, clusters=31)
    nonzeros = int((tensor != 0).sum())
    positions = torch.nonzero(tensor.flatten()).flatten()
    gaps = torch.diff(positions, prepend=torch.tensor([-1])) - 1
    fillers = int((gaps // 32).sum())
    packed = encode(tensor, DeepCompressionCodec(index_bits=5, huffman=False))
    assert 0 <= len(packed.data) - shared_weight_bits(nonzeros + fillers, 5, 5, 31) / 8 < 10
    coded = encode(tensor, DeepCompressionCodec(index_bits=5))
    assert len(coded.data) < len(packed.data)


@pytest.mark.parametrize("name", ["codebook", "sparse", "planes", "deep-compression", "raw"])
def test_damaged_bytes_raise_only_the_typed_error(name):
    tensor = shared((20, 30), kept=0.2)
    data = bytearray(encode(tensor, name).data)
    generator = torch.Generator().manual_seed(0)
    for trial in range(150):
        damaged = bytearray(data)
        place = int(torch.randint(len(data), (1,), generator=generator))
        damaged[place] ^= 1 << trial % 8
        for broken in (bytes(damaged), bytes(damaged[:place])):
            try:
                restored = codec_named(name).decode(broken, {}, (20, 30), torch.float32)
                assert restored.shape == (20, 30)
            except FileFormatError:
                pass


@pytest.mark.parametrize("name", ["codebook", "sparse", "planes", "deep-compression", "integers"])
def test_impossible_shapes_are_refused_before_memory_is_taken(name):
    with pytest.raises(FileFormatError, match="cannot hold"):
        codec_named(name).decode(b"\0\1\2\3", {}, (1 << 20, 1 << 20), torch.float32)


def test_unknown_and_doubly_registered_codecs_are_refused():
    with pytest.raises(ConfigurationError, match="did you mean 'codebook'"):
        codec_named("codebok")

    class Other:
        name = "raw"

    with pytest.raises(ConfigurationError, match="registered already"):
        register_codec(Other())


def test_tensors_without_plain_storage_are_refused():
    with pytest.raises(ConfigurationError, match="to_dense"):
        best(torch.eye(3).to_sparse())


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 3)[:, 1][:1], torch.ones(4, 6)[:, :0], torch.ones(1).expand(0), torch.ones(2, 1, 3)[:, :, 2]],
)
def test_tensors_with_unusual_strides_are_exact(tensor):
    for name in FOR_ALL:
        assert_exact(encode(tensor, name), tensor)
