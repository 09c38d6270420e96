"""Large networks: memory that is shared until it is written, files tensor by tensor, and the peak of a whole run."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import efficientdnns as ed
from efficientdnns import storage
from efficientdnns.coding import load_weights, map_weights, save_weights
from efficientdnns.models import weights as weights_room
from efficientdnns.storage import build_hollow, fill, hollow, keeping_memory, lean, share, unshare

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "scaling.py"


def scaling():
    spec = importlib.util.spec_from_file_location("scaling", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def addresses(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def small(**options) -> nn.Module:
    return ed.models.build("transformer", vocabulary=64, width=32, depth=2, heads=2, context=16, **options)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.lstm = nn.LSTM(5, 5, batch_first=True)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embedding.weight
        self.register_buffer("places", torch.arange(4), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.lstm(self.embedding(x + self.places.min()))[0].mT).mT)


@pytest.mark.parametrize("make", [small, Tied, lambda: ed.models.build("lenet5")])
def test_a_shared_copy_has_its_own_structure_and_no_tensors_of_its_own(make) -> None:
    model = make().eval()
    shared = share(model)
    assert addresses(shared) == addresses(model)
    assert not {id(p) for p in shared.parameters()} & {id(p) for p in model.parameters()}
    assert len(list(shared.parameters())) == len(list(model.parameters())), "ties stay ties"
    shared.train().requires_grad_(False)
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_unsharing_gives_every_tensor_memory_of_its_own() -> None:
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    shared = share(model)
    parameters = dict(shared.named_parameters())
    unshare(shared, model)
    assert not addresses(shared) & addresses(model)
    assert all(shared.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert shared.head.weight is shared.embedding.weight
    with torch.no_grad():
        for tensor in (*shared.parameters(), *shared.buffers()):
            tensor.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = addresses(shared)
    unshare(shared, model)
    assert addresses(shared) == kept, "what is its own already is left alone"


def test_training_after_a_method_that_shares_leaves_the_given_network_alone(digits, trained) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    result = ed.compress(
        trained,
        digits,
        [ed.TuckerDecomposition(ranks=0.3, finetune_epochs=1), ed.Fit(epochs=1)],
        quiet=True,
        latency=False,
    )
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert not addresses(result.model) & addresses(trained)


@pytest.mark.parametrize(
    "method",
    [
        ed.Int8Quantization(calibration_samples=32, skip=("fc2",)),
        ed.AlternatingMultibitQuantization(weight_bits=2, epochs=0),
        ed.TuckerDecomposition(ranks=0.3, finetune_epochs=0),
        ed.NISP(samples=32),
    ],
    ids=lambda method: method.name,
)
def test_a_result_shares_no_memory_with_the_given_network(method, digits, trained) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    result = ed.compress(trained, digits, method, quiet=True, latency=False)
    assert not addresses(result.model) & addresses(trained)
    with torch.no_grad():
        for tensor in (*result.model.parameters(), *result.model.buffers()):
            tensor.zero_()
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in result.original.state_dict().items())


def test_one_shot_methods_work_on_the_given_networks_memory(digits, trained, monkeypatch) -> None:
    seen = {}

    def apply(self, session) -> None:
        seen["shared"] = addresses(session.model) == addresses(session.original) == addresses(trained)

    for in_place in (False, True):
        monkeypatch.setattr(ed.Int8Quantization, "in_place", in_place)
        monkeypatch.setattr(ed.Int8Quantization, "apply", apply)
        ed.compress(trained, digits, ed.Int8Quantization(), quiet=True, latency=False)
        assert seen["shared"] is not in_place


@pytest.mark.parametrize("make", [small, Tied])
def test_a_hollow_network_can_be_filled(make) -> None:
    model = make().eval()
    for empty in (hollow(model), build_hollow(make)):
        assert all(p.is_meta for p in empty.parameters())
        assert fill(empty.eval(), model.state_dict()) == ([], [])
        assert addresses(empty) >= {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert len(list(empty.parameters())) == len(list(model.parameters()))
        x = torch.randint(0, 7, (2, 4))
        assert torch.equal(empty(x), model(x))


def test_what_computes_with_its_values_is_built_in_full() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.scale = float(self.weight.std())

    class Derived(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.other = self.weight.detach() * 2

    for kind in (Scaled, Derived):
        model = build_hollow(kind)
        assert not model.weight.is_meta
        assert model(torch.ones(1, 3)).isfinite().all()
    assert nn.Module.register_parameter.__name__ == "register_parameter"


def test_written_files_are_those_of_the_safetensors_library(tmp_path) -> None:
    state = {
        "b": torch.randn(3, 5),
        "a": torch.randn(70, 9).half(),
        "ü": torch.arange(2000, dtype=torch.int64).bitwise_xor(77),
        "scalar": torch.tensor(2.0),
        "none": torch.empty(0, 4),
    }
    state["ü"] = torch.randint(-(2**62), 2**62, (300,))
    save_weights(tmp_path / "x.safetensors", state)
    for loaded in (load_file(tmp_path / "x.safetensors"), load_weights(tmp_path / "x.safetensors")):
        assert loaded.keys() == state.keys()
        assert all(
            torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in state.items()
        )


def test_large_integers_are_coded_close_to_their_entropy(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (30 * torch.randn(600, 512, generator=generator)).round().clamp(-127, 127).to(torch.int8)
    size = save_weights(tmp_path / "x.safetensors", {"weight": weight})
    shares = torch.bincount(weight.flatten().int() + 127) / weight.numel()
    entropy = float(-(shares * shares.clamp(min=1e-12).log2()).sum()) * weight.numel() / 8
    assert size < 1.04 * entropy
    assert torch.equal(load_weights(tmp_path / "x.safetensors")["weight"], weight)


def test_mapped_weights_are_the_models_and_the_file_is_never_written(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.safetensors"
    model = small()
    save_weights(path, model.state_dict())
    content = path.read_bytes()
    monkeypatch.setattr(weights_room, "MAPPED", 0)
    mapped = small(weights=path)
    assert len({t.untyped_storage().data_ptr() for t in mapped.parameters()}) == 1, "one mapping of the whole file"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in mapped.state_dict().items())
    assert mapped.factory == model.factory
    task = scaling().make_task(64)
    result = ed.compress(mapped, task, ed.Int8Quantization(mode="dynamic"), quiet=True, latency=False)
    same = ed.compress(model, task, ed.Int8Quantization(mode="dynamic"), quiet=True, latency=False)
    assert all(torch.equal(a, b) for a, b in zip(result.model.state_dict().values(), same.model.state_dict().values()))
    with torch.no_grad():
        mapped.head.weight.zero_()
    assert path.read_bytes() == content
    assert all(torch.equal(value, map_weights(path)[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("tied", "causal", "classes"), [(False, True, None), (True, True, None), (False, False, 3)])
def test_the_transformer_is_what_it_says(tied, causal, classes) -> None:
    model = small(tied=tied, causal=causal, classes=classes).eval()
    x = torch.randint(0, 64, (2, 9))
    y = model(x)
    assert y.shape == ((2, 9, 64) if classes is None else (2, 3))
    changed = x.clone()
    changed[:, 5:] = 0
    if classes is None:
        assert torch.allclose(model(changed)[:, :5], y[:, :5], atol=1e-6) is causal
    assert (model.head.weight is model.embedding.weight) is tied
    with pytest.raises(ed.ModelError, match="does not divide into 5 heads"):
        small(width=32, heads=5) if False else ed.models.build("transformer", width=32, heads=5)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("method", ["int8-dynamic"])
def test_a_run_needs_little_more_than_the_network(method) -> None:
    row = scaling().fresh("50m", method, timeout=600)
    assert "error" not in row, row
    # 0.3 of the network, a layer with its float64 twin and activations, and what tracing and the allocator leave behind at
    # any size. One more copy of the network would be 190 MiB.
    allowed = 1.3 * row["bytes"] + 8 * row["layer"] + (96 << 20)
    assert max(row["peaks"].values()) <= allowed, row
    assert row["file_after"] < 0.3 * row["file_before"]


def test_large_tensors_of_a_large_network_go_back_to_the_system_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(storage, "_set_threshold", sizes.append)
    with lean(small()), keeping_memory():
        assert sizes == [], "small networks are left to the C library"
    monkeypatch.setattr(storage, "LARGE", 0)
    with lean(small()):
        with keeping_memory():
            assert sizes == [storage._LEAN, storage._USUAL]
        assert sizes[-1] == storage._LEAN
    assert sizes[-1] == storage._USUAL


FREED = """
import sys, torch
from pathlib import Path
from efficientdnns import storage

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

with storage._from_the_system(getattr(storage, sys.argv[1])):
    layers = [(torch.ones(5_000_000), torch.ones(50_000)) for _ in range(8)]
    before = resident()
    layers = [small for _, small in layers]
    print(160_000_000 - (before - resident()))
"""
"""Prints how many bytes stay when tensors of 20 MB are freed, each below something smaller that is kept. A process that has
run other things may take them from holes in its heap, so it has one of its own."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident set is read from /proc")
def test_freed_layers_do_not_stay_resident() -> None:
    def left(threshold: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FREED, threshold], check=True, capture_output=True).stdout)

    assert left("_LEAN") < 40_000_000
    assert left("_USUAL") > 100_000_000, "the C library keeps what lies below a tensor that is in use"
