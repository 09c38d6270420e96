from __future__ import annotations

import pytest
import torch
from surgery_networks import CharModel, LeNet5, ResNet, check_exact, function_module, randomise
from torch import Tensor, nn

from efficientdnns.errors import SurgeryError
from efficientdnns.surgery import ChannelGraph


def sizes(graph: ChannelGraph) -> dict[str, int]:
    return {group.name: group.size for group in graph.groups}


def test_lenet_groups_and_flattened_columns() -> None:
    graph = ChannelGraph.trace(LeNet5(), torch.randn(2, 1, 28, 28))
    assert sizes(graph) == {"conv1": 6, "conv2": 16, "fc1": 30, "fc2": 20}
    assert (graph.source, graph.kept_whole) == ("export", [])
    group = graph.group("conv2")
    columns = next(m for m in group.members if m.role == "in")
    assert (columns.tensor, columns.dim) == ("fc1.weight", 1)
    assert torch.equal(columns.index, torch.arange(400).reshape(16, 25))
    assert graph.producers(group) == ["conv2"]
    assert graph.consumers(group) == ["fc1"]
    assert graph.groups_of("conv2") == [group]
    assert [name for name in graph.order if name] == ["conv1", "conv2", "fc1", "fc2", "fc3"]


def test_option_a_ties_stage_one_to_shifted_channels() -> None:
    graph = ChannelGraph.trace(ResNet("A"), torch.randn(1, 3, 16, 16))
    group = graph.group("conv1")
    rows = {m.tensor: m.index[:, 0] for m in group.members if m.role == "out"}
    assert torch.equal(rows["conv1.weight"], torch.arange(8))
    assert torch.equal(rows["layers.1.conv2.weight"], torch.arange(8) + 4)
    assert torch.equal(rows["layers.3.conv2.weight"], torch.arange(8) + 12)


def test_lstm_gate_rows() -> None:
    graph = ChannelGraph.trace(CharModel(), torch.randint(20, (2, 5)))
    index = {(m.tensor, m.dim): m.index for m in graph.group("rnn").members}
    assert index["rnn.weight_ih_l0", 0][3].tolist() == [3, 11, 19, 27]
    assert index["rnn.weight_hh_l1", 1][3].tolist() == [3]
    assert index["head.weight", 1][3].tolist() == [3]


def test_reduce_adds_up_rows() -> None:
    model = LeNet5()
    graph = ChannelGraph.trace(model, torch.randn(2, 1, 28, 28))
    squares = {name: p.detach() ** 2 for name, p in model.named_parameters()}
    group = graph.group("conv2")
    torch.testing.assert_close(group.reduce(squares), squares["conv2.weight"].sum((1, 2, 3)))
    columns = squares["fc1.weight"].reshape(30, 16, 25).sum((0, 2))
    torch.testing.assert_close(group.reduce(squares, roles=("in",)), columns)
    torch.testing.assert_close(group.reduce(squares, ("in",), "mean"), columns / (30 * 25))
    with pytest.raises(SurgeryError, match="'sum' or 'mean'"):
        group.reduce(squares, reduction="median")


def test_hard_coded_view_is_no_obstacle() -> None:
    graph, smaller = check_exact(LeNet5(hard_coded=True), torch.randn(2, 1, 28, 28).double())
    assert set(sizes(graph)) == {"conv1", "conv2", "fc1", "fc2"}
    assert graph.recorded == {""}
    assert type(smaller).__name__ == "LeNet5"
    assert isinstance(smaller, LeNet5)


@pytest.mark.parametrize(
    ("between", "operation"),
    [
        (lambda y: y.softmax(1), "softmax"),
        (lambda y: y[:, ::3].repeat(1, 3, 1, 1)[:, :8], "slice"),
        (lambda y: torch.linalg.matrix_exp(y), "linalg_matrix_exp"),
        (lambda y: y.flip(1), "flip"),
        (lambda y: y[:, torch.arange(7, -1, -1)], "index"),
    ],
)
def test_not_understood_is_listed(between: object, operation: str) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.last(between(self.first(x)))  # type: ignore[operator]

    model = function_module(forward, first=nn.Conv2d(3, 8, 3), last=nn.Conv2d(8, 4, 1))
    graph = ChannelGraph.trace(model, torch.randn(2, 3, 6, 6))
    assert graph.groups == []
    assert any(e.operation == operation and "first" in e.layers for e in graph.kept_whole), graph.kept_whole


def test_literal_split_into_equal_pieces() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y[:, :4] * y[:, 4:])

    model = function_module(forward, first=nn.Conv2d(3, 8, 3), last=nn.Conv2d(4, 4, 1))
    graph, _ = check_exact(model, torch.randn(2, 3, 6, 6).double())
    assert sizes(graph) == {"first": 4}


def test_hooks_fallback() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.first(x)
        if float(y.sum()) > 1e9:
            y = y + 1
        return self.last(self.body(y) + y)

    body = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1))
    model = function_module(forward, first=nn.Conv2d(3, 8, 3), body=body, last=nn.Conv2d(8, 4, 1))
    graph = ChannelGraph.trace(randomise(model), torch.randn(2, 3, 6, 6).double())
    assert (graph.source, graph.exported) == ("hooks", None)
    assert sizes(graph) == {"body.0": 6}
    assert {"first", "body.3"} <= {layer for entry in graph.kept_whole for layer in entry.layers}


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = CharModel().train()
    model.embedding.eval()
    flags = [m.training for m in model.modules()]
    weights = [id(w) for w in model.rnn._flat_weights]
    ChannelGraph.trace(model, torch.randint(20, (2, 5)))
    assert [m.training for m in model.modules()] == flags
    assert [id(w) for w in model.rnn._flat_weights] == weights


def test_wrong_example_is_one_line() -> None:
    with pytest.raises(SurgeryError, match="does not run on the example input") as error:
        ChannelGraph.trace(LeNet5(), torch.randn(2, 3, 28, 28))
    assert "\n" not in str(error.value)


def test_nodes_and_parameters() -> None:
    graph = ChannelGraph.trace(ResNet("B"), torch.randn(1, 3, 16, 16))
    first = next(n for n in graph.nodes if n.operation == "conv2d")
    assert (first.module, first.inputs, first.parameters) == ("conv1", ("input0",), ("conv1.weight",))
    assert graph.parameter_of(first.name) == ("conv1.weight",)
    assert graph.exported is not None
    placeholder = next(iter(graph.exported.graph.nodes))
    assert graph.parameter_of(placeholder) == ("conv1.weight",)
    assert graph.batch_norm_after("conv1") == "bn1"
    assert graph.batch_norm_after("fc") is None
