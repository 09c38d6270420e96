import io
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import zstandard
from torch import nn

from efficientdnns.coding import (
    DeepCompressionCodec,
    Encoded,
    describe_weights,
    encode,
    load_weights,
    merge_zeros,
    save_weights,
    weights_size,
)
from efficientdnns.coding.file import _head
from efficientdnns.coding.reader import BLOB
from efficientdnns.errors import ConfigurationError, FileFormatError


def lenet(kept=0.05, clusters=32):
    """A LeNet-300-100 whose weights are pruned and shared at random."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (outputs, inputs) in enumerate([(300, 784), (100, 300), (10, 100)], start=1):
        values = torch.randn(clusters, generator=generator) * 0.1
        weight = values[torch.randint(clusters, (outputs, inputs), generator=generator)]
        state[f"fc{index}.weight"] = weight * (torch.rand(outputs, inputs, generator=generator) < kept)
        state[f"fc{index}.bias"] = torch.randn(outputs, generator=generator)
    return merge_zeros(state)


def assert_same(loaded, state):
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].shape == tensor.shape


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_file_comes_back_and_its_size_is_returned(path):
    state = lenet()
    size = save_weights(path, state)
    assert size == os.path.getsize(path) == weights_size(state)
    assert os.listdir(path.parent) == ["model.safetensors"]
    assert_same(load_weights(path), state)


def test_sparse_shared_network_is_smaller_than_zstd_and_deep_compression(path):
    state = lenet()
    size = save_weights(path, state)
    indices = b"".join(
        torch.unique(tensor, return_inverse=True)[1].to(torch.uint8).numpy().tobytes()
        for name, tensor in state.items()
        if name.endswith("weight")
    )
    biases = sum(4 * tensor.numel() for name, tensor in state.items() if name.endswith("bias"))
    zstd = len(zstandard.ZstdCompressor(level=22).compress(indices)) + 3 * 32 * 4 + biases
    assert size < 0.85 * zstd
    assert size < weights_size(state, {name: "deep-compression" for name in state if name.endswith("weight")})


def test_headers_take_less_than_250_bytes(path):
    size = save_weights(path, lenet())
    assert size - sum(info.bytes for info in describe_weights(path)) < 250


def test_dense_file_is_plain_safetensors(path):
    state = nn.Sequential(nn.Conv2d(30, 64, 3), nn.BatchNorm2d(64)).state_dict()
    save_weights(path, state)
    assert_same(safetensors.torch.load_file(path), state)


def test_large_dense_tensors_stay_readable_beside_coded_ones(path):
    state = {**lenet(), "head.weight": torch.randn(40, 100)}
    save_weights(path, state)
    plain = safetensors.torch.load_file(path)
    assert plain.keys() == {"head.weight", "fc1.bias", BLOB}
    assert torch.equal(plain["head.weight"], state["head.weight"])
    assert_same(load_weights(path), state)


def test_files_of_other_tools_load(path):
    state = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(1.5, dtype=torch.bfloat16)}
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    assert_same(load_weights(path), state)
    assert [(i.name, i.codec, i.bytes) for i in describe_weights(path)] == [
        ("a", "raw", 48),
        ("b", "raw", 40),
        ("c", "raw", 2),
    ]


def test_scalars_empty_tensors_and_all_dtypes(path):
    state = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "steps": torch.tensor(1234567),
        "mask": torch.rand(50, 60) < 0.1,
        "codes": torch.randint(-3, 3, (50, 60), dtype=torch.int8),
        "half": (torch.rand(50, 60) < 0.1).half(),
        "brain": (torch.rand(50, 60) < 0.1).bfloat16(),
        "double": torch.zeros(50, 60, dtype=torch.float64),
        "strided": torch.randn(40, 30).T,
        "expanded": torch.ones(1).expand(600),
        "complex": torch.zeros(4, 4, dtype=torch.complex64),
        "eight": torch.zeros(4, 4, dtype=torch.float8_e5m2),
    }
    size = save_weights(path, state)
    loaded = load_weights(path)
    assert_same({k: v for k, v in loaded.items() if k != "eight"}, {k: v for k, v in state.items() if k != "eight"})
    assert loaded["eight"].dtype == torch.float8_e5m2
    assert size < 4 * 1200 + 2600


def test_tied_tensors_are_stored_once_and_come_back_tied(path):
    weight = torch.randn(200, 50)
    state = {"embedding.weight": weight, "decoder.weight": weight, "other": weight.clone()}
    assert save_weights(path, state) < 2.1 * 4 * weight.numel()
    loaded = load_weights(path)
    assert_same(loaded, state)
    assert loaded["embedding.weight"].data_ptr() == loaded["decoder.weight"].data_ptr()
    assert {i.name: i.bytes for i in describe_weights(path)}["decoder.weight"] == 0


def test_choices_per_tensor_and_for_the_rest(path):
    state = lenet()
    choices = {"fc1.weight": DeepCompressionCodec(index_bits=5), "fc2.weight": "raw", "*": ["planes", "codebook"]}
    save_weights(path, state, choices)
    assert_same(load_weights(path), state)
    assert {info.name: info.codec for info in describe_weights(path)} == {
        "fc1.weight": "deep-compression",
        "fc2.weight": "raw",
        "fc3.weight": "codebook",
        "fc1.bias": "planes",
        "fc2.bias": "planes",
        "fc3.bias": "raw",
    }


def test_ready_made_bytes_are_stored_as_they_are(path):
    state = {"w": lenet()["fc2.weight"]}
    ready = encode(state["w"], DeepCompressionCodec(index_bits=3))
    save_weights(path, state, {"w": ready})
    assert ready.data in path.read_bytes()
    assert_same(load_weights(path), state)


def test_bytes_of_another_tensor_do_not_get_into_the_file(path):
    state = lenet()
    wrong = encode(state["fc2.weight"] + 1, "codebook")
    path.write_bytes(b"before")
    with pytest.raises(ConfigurationError, match=r"'fc2.weight' did not survive"):
        save_weights(path, state, {"fc2.weight": wrong})
    assert path.read_bytes() == b"before"
    assert os.listdir(path.parent) == ["model.safetensors"]


def test_merged_zeros_make_masked_weights_small():
    mask = torch.rand(100, 100, generator=torch.Generator().manual_seed(0)) < 0.1
    masked = torch.randn(100, 100, generator=torch.Generator().manual_seed(1)).sign() * mask
    state = {"w": masked, "tied": masked, "bias": torch.ones(3)}
    merged = merge_zeros(state)
    assert torch.equal(merged["w"], masked)
    assert not torch.signbit(merged["w"])[~mask].any()
    assert merged["w"].data_ptr() == merged["tied"].data_ptr()
    assert merged["bias"] is state["bias"]
    assert torch.signbit(masked[~mask]).any(), "the input must keep its negative zeros"
    assert weights_size(merged) < 0.6 * weights_size(state)


def test_wrong_requests_are_refused(path):
    with pytest.raises(ConfigurationError, match=r"did you mean 'fc1\.weight'"):
        save_weights(path, lenet(), {"fc1.wieght": "codebook"})
    with pytest.raises(ConfigurationError, match="unknown codec"):
        save_weights(path, lenet(), {"fc1.weight": "zip"})
    with pytest.raises(ConfigurationError, match="unknown codec"):
        save_weights(path, lenet(), {"fc1.weight": Encoded("zip", b"")})
    with pytest.raises(ConfigurationError, match="cannot store"):
        save_weights(path, {BLOB: torch.ones(3)})
    with pytest.raises(ConfigurationError, match="no folder"):
        save_weights(path.parent / "missing" / "x.safetensors", lenet())
    assert not path.exists()


def test_every_truncation_and_bit_flip_is_noticed(path):
    state = {"w": lenet()["fc3.weight"], "b": torch.ones(3), "t": torch.zeros(300, dtype=torch.int32)}
    save_weights(path, state)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(FileFormatError):
            load_weights(path)
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError) as caught:
            load_weights(path)
        assert "\n" not in str(caught.value)


def write_index(path, index, data=b""):
    blob = torch.frombuffer(bytearray(_head(index, io.BytesIO(data)) + data), dtype=torch.uint8)
    safetensors.torch.save_file({BLOB: blob}, path)


@pytest.mark.parametrize(
    "index",
    [
        [["w", "codebook", "F32", [1 << 30, 1 << 30], 4]],
        [["w", "codebook", "F32", [1 << 24, 1 << 23], 4]],
        [["w", "codebook", "F32", [-1], 4]],
        [["w", "codebook", "F32", [2.5], 4]],
        [["w", "codebook", "F33", [2], 4]],
        [["w", "zip", "F32", [2], 4]],
        [["w", "raw", "F32", [2], 4]],
        [["w", "raw", "F32", [1], 3]],
        [["w", "raw", "F32", [1], 4], ["v", "x"]],
        [["w", "raw", "F32"]],
        [["w"]],
        [{}],
        {"w": 1},
        [["w", "raw", "F32", [1], 4, 7]],
        3,
    ],
)
def test_impossible_indices_are_refused(path, index):
    write_index(path, index, b"\0\0\0\1")
    with pytest.raises(FileFormatError) as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)


def test_newer_versions_and_foreign_entries_are_refused(path):
    write_index(path, [])
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] = 9
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="version 9"):
        load_weights(path)
    safetensors.torch.save_file({BLOB: torch.ones(3)}, path)
    with pytest.raises(FileFormatError, match="not a list of bytes"):
        load_weights(path)
    with pytest.raises(FileFormatError, match="no weights file"):
        load_weights(path.parent / "nothing.safetensors")


def test_a_fresh_process_reads_the_same_weights(path):
    state = lenet()
    save_weights(path, state)
    code = (
        "import sys, torch; from efficientdnns.coding import load_weights;"
        "print(sum(t.double().abs().sum().item() for t in load_weights(sys.argv[1]).values()))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(sum(t.double().abs().sum().item() for t in state.values()))
