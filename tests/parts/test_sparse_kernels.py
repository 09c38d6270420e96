"""Layers that skip zeros: the same outputs, and chosen by measurement only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.data.text import WindowSplit
from efficientdnns.measurement.macs import count_macs
from efficientdnns.parts import sparse_kernels
from efficientdnns.parts.select import largest_mask
from efficientdnns.parts.sparse_kernels import (
    SparseConv2d,
    SparseLinear,
    SparseLSTM,
    SparseWinogradConv2d,
    compressed,
    faster_sparse,
)
from efficientdnns.parts.winograd import WinogradConv2d
from efficientdnns.pruning.sparse_execution import SparseExecution
from efficientdnns.task import Task


def sparse(layer: nn.Module, share: float = 0.9) -> nn.Module:
    with torch.no_grad():
        for weight in layer.parameters():
            if weight.dim() > 1:
                weight.mul_(largest_mask(weight.abs(), round((1 - share) * weight.numel())))
    return layer.eval()


@pytest.fixture
def fast(monkeypatch):
    """A clock by which some kinds of layers take half the dense time, and all others twice."""

    class Time:
        def __init__(self, p10: float) -> None:
            self.p10 = p10

    def choose(*kinds: type) -> None:
        def clock(pair, inputs, **options):
            return [Time(1.0), Time(0.5 if isinstance(pair[1], kinds) else 2.0)]

        monkeypatch.setattr(sparse_kernels, "measure_latency", clock)

    return choose


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 5), "stride": 2, "dilation": (1, 2), "bias": False},
    ],
)
def test_convolutions_compute_the_same(options, batch) -> None:
    conv = sparse(nn.Conv2d(6, 10, **options))
    new = compressed(conv)
    x = torch.randn(batch, 6, 13, 12)
    with torch.no_grad():
        assert new.rows() is not None
        torch.testing.assert_close(new(x), conv(x), atol=1e-5, rtol=1e-5)
    new(x).sum().backward()
    assert new.weight.grad is not None


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tile", [2, 4])
def test_winograd_convolutions_skip_the_zeros_of_their_domain(tile, batch) -> None:
    dense = WinogradConv2d.of(nn.Conv2d(6, 10, 3, padding=1), tile)
    dense.threshold = float(
        dense.transformed().detach().abs().flatten().kthvalue(round(0.95 * 60 * (tile + 2) ** 2)).values
    )
    new = compressed(dense.eval())
    x = torch.randn(batch, 6, 13, 12)
    with torch.no_grad():
        assert sum(matrix.values().numel() for matrix in new.rows()) == dense.transformed().count_nonzero()
        torch.testing.assert_close(new(x), dense(x), atol=1e-5, rtol=1e-5)
        new.weight.mul_(0.5)  # shared, and fewer are above the threshold
        dense.forget()
        torch.testing.assert_close(new(x), dense(x), atol=1e-5, rtol=1e-5)
        again = SparseWinogradConv2d(**new.config()).eval()
        again.load_state_dict(new.state_dict())
        for other in (again, copy.deepcopy(new)):
            torch.testing.assert_close(other(x), new(x))
    new(x).sum().backward()
    assert new.weight.grad is not None


def test_a_winograd_convolution_is_tried_for_the_zeros_of_its_domain(fast) -> None:
    fast(SparseWinogradConv2d)
    layer = WinogradConv2d.of(nn.Conv2d(6, 10, 3, padding=1), threshold=100.0)  # its spatial weights are all there
    network, found = faster_sparse(nn.Sequential(layer), torch.randn(1, 6, 8, 8))
    assert found["0"] == {"sparsity": 1.0, "dense_ms": 1.0, "sparse_ms": 0.5, "used": True}
    assert type(network[0]) is SparseWinogradConv2d
    assert compressed(WinogradConv2d(4, 4, 3, groups=2)) is None


def test_linear_layers_compute_the_same_and_follow_their_weights() -> None:
    linear = sparse(nn.Linear(20, 7))
    new = compressed(linear)
    x = torch.randn(2, 5, 20)
    with torch.no_grad():
        torch.testing.assert_close(new(x), linear(x), atol=1e-5, rtol=1e-5)
        new.weight.mul_(2)
        torch.testing.assert_close(new(x), linear(x), atol=1e-5, rtol=1e-5)  # the tensors are shared
    again = SparseLinear(**new.config())
    again.load_state_dict(new.state_dict())
    torch.testing.assert_close(again(x), linear(x), atol=1e-5, rtol=1e-5)


LSTMS = [
    {},
    {"bias": False, "num_layers": 2},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 3, "bidirectional": True, "dropout": 0.5},
]


@pytest.mark.parametrize("options", LSTMS)
@pytest.mark.parametrize("shape", [(6, 3, 12), (6, 1, 12), (1, 6, 12), (6, 12)])
def test_lstms_compute_the_same(options, shape) -> None:
    lstm = sparse(nn.LSTM(12, 10, **options))
    new = compressed(lstm)
    x = torch.randn(shape)
    batch = () if len(shape) == 2 else (shape[0 if lstm.batch_first else 1],)
    size = (lstm.num_layers * (1 + lstm.bidirectional), *batch, 10)
    for states in (None, (torch.randn(size), torch.randn(size))):
        with torch.no_grad():
            y, after = new(x, states)
            assert new._rows
            expected = lstm(x, states)
            torch.testing.assert_close((y, after), expected, atol=1e-5, rtol=1e-5)
            assert y.is_contiguous() == expected[0].is_contiguous()
            torch.testing.assert_close(new(x, states), (y, after), msg="states were written over")
    assert count_macs(new, x).total == count_macs(lstm, x).total


def test_lstms_follow_their_weights_and_can_be_copied_and_rebuilt() -> None:
    lstm = sparse(nn.LSTM(12, 10, 2, bidirectional=True))
    new = compressed(lstm)
    x = torch.randn(5, 2, 12)
    with torch.no_grad():
        before = new(x)[0]
        for weight in (new.weight_ih_l0, new.weight_hh_l1_reverse, new.bias_ih_l1):
            weight.add_(1)  # the tensors are shared
        torch.testing.assert_close(new(x)[0], lstm(x)[0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(new(x)[0], before, atol=1e-2)
        again = SparseLSTM(**new.config()).eval()
        again.load_state_dict(new.state_dict())
        for other in (again, copy.deepcopy(new)):
            torch.testing.assert_close(other(x)[0], new(x)[0])
            assert other._rows


def test_lstms_are_dense_where_they_have_to_be() -> None:
    lstm = sparse(nn.LSTM(12, 10))
    new = compressed(lstm)
    x = torch.randn(5, 2, 12)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    with torch.no_grad():
        assert torch.equal(new(packed)[0].data, lstm(packed)[0].data)
        with pytest.raises(RuntimeError, match=r"hidden\[0\] size"):
            new(x, (torch.zeros(1, 3, 10), torch.zeros(1, 3, 10)))
        with pytest.raises(RuntimeError, match="input_size"):
            new(x[..., :4])
        projected = SparseLSTM(12, 10, proj_size=4).eval()
        assert projected(x)[0].shape == (5, 2, 4)
        assert projected._rows is None
        dropped = SparseLSTM(12, 10, 2, dropout=0.9)
        assert not torch.equal(dropped(x)[0], dropped(x)[0])
        assert new.double()(x.double())[0].dtype == torch.float64
        assert new.float()(x)[0].dtype == torch.float32
    new(x)[0].sum().backward()
    assert new.weight_hh_l0.grad is not None


@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.LSTM(6, 6)])
def test_autocast_and_copies_work(layer) -> None:
    new = compressed(layer.eval())
    x = torch.randn(3, 2, 6)
    with torch.no_grad():
        new(x)
        copy.deepcopy(new)(x)
        with torch.autocast("cpu"):
            y = new(x)
    assert (y[0] if isinstance(y, tuple) else y).dtype == torch.bfloat16


def test_only_what_can_be_compressed_is() -> None:
    assert isinstance(compressed(nn.Conv2d(2, 2, 3)), SparseConv2d)
    for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(2, 2, 3, padding_mode="circular"), nn.GRU(2, 2), nn.ReLU()):
        assert compressed(layer) is None
    assert isinstance(compressed(nn.LSTM(2, 3)), SparseLSTM)
    assert compressed(nn.LSTM(2, 3, proj_size=2)) is None


def test_layers_are_replaced_where_they_are_faster(trained, digits, fast, tmp_path) -> None:
    for name in ("conv2", "fc1"):
        sparse(trained.get_submodule(name), 0.95)
    fast(SparseLinear)
    network, found = faster_sparse(trained, digits.example_input, batch=4)
    assert {name: entry["used"] for name, entry in found.items()} == {"conv2": False, "fc1": True}
    assert type(network.fc1) is SparseLinear
    assert type(trained.fc1) is nn.Linear
    result = ed.compress(trained, digits, [SparseExecution()], quiet=True, latency=False)
    result.save(tmp_path / "out")
    x = next(iter(digits.evaluation.batches(8))).inputs
    loaded = ed.load(tmp_path / "out")
    assert type(loaded.fc1) is SparseLinear
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), trained.eval()(x), atol=1e-4, rtol=1e-4)


def test_the_zeros_of_an_lstm_are_those_of_all_its_matrices(fast) -> None:
    fast(SparseLSTM)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LSTM(8, 8), nn.LSTM(8, 8)

        def forward(self, x):
            packed = nn.utils.rnn.pack_sequence(list(self.first(x)[0]))
            return self.second(packed)[0].data

    network = sparse(Network(), 0.9)
    with torch.no_grad():
        network.first.weight_hh_l0.fill_(1)
    x = torch.randn(4, 3, 8)
    assert faster_sparse(network, x)[1] == {}  # half of the first is dense, the second gets a packed sequence
    found = faster_sparse(network, x, sparsity=0.4)[1]
    assert found.keys() == {"first"}
    assert found["first"]["sparsity"] == pytest.approx(0.45, abs=0.01)


def test_a_pruned_language_model_skips_zeros_after_it_was_saved(fast, tmp_path) -> None:
    fast(SparseLSTM)
    ids = torch.randint(0, 9, (3, 400), generator=torch.Generator().manual_seed(0))
    train, calibration, evaluation = (WindowSplit(part, 12) for part in ids)
    task = Task(train, evaluation, calibration, kind="language-modelling", num_classes=9)
    model = ed.models.build("char-lstm", vocabulary=9, hidden=32)
    steps = [ed.PruneWeights(sparsity=0.99, epochs=0), SparseExecution(batch=2)]
    result = ed.compress(model, task, steps, quiet=True, latency=False)
    assert type(result.model.lstm) is SparseLSTM
    assert result.model.lstm.weight_hh_l0.count_nonzero() < 0.05 * 4096
    result.save(tmp_path / "out")
    assert {exported.format for exported in result.exports if exported.file} == {"pt2", "onnx"}
    loaded = ed.load(tmp_path / "out").eval()
    assert type(loaded.lstm) is SparseLSTM
    dense = ed.models.build("char-lstm", vocabulary=9, hidden=32).eval()
    dense.load_state_dict(loaded.state_dict())
    x = next(iter(evaluation.batches(4))).inputs
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), dense(x), atol=1e-5, rtol=1e-5)
        assert loaded.lstm._rows
