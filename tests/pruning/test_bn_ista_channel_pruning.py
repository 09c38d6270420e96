"""BN-ISTA: the price of a channel, rescaling, constants that move, exact zeros and what a run can pull."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.parts.constant_channels import move_constants
from efficientdnns.pruning.bn_ista_channel_pruning import (
    ThresholdedScales,
    homogeneous,
    map_positions,
    memory_cost,
    rescale,
    scaling_norms,
    set_scales,
)
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph, remove


def images_task(n: int = 64, channels: int = 1, size: int = 28) -> ed.Task:
    torch.manual_seed(0)
    x, y = torch.randn(n, channels, size, size), torch.randint(10, (n,))
    return ed.Task.from_tensors((x, y), (x[:16], y[:16]), num_classes=10)


def plain(
    padding: int = 1, widths: tuple[int, ...] = (16, 32, 32), activation: type[nn.Module] = nn.ReLU, size: int = 28
):
    layers: list[nn.Module] = []
    channels = 1
    for number, width in enumerate(widths):
        layers += [
            nn.Conv2d(channels, width, 3, padding=padding, bias=number == 1),
            nn.BatchNorm2d(width),
            activation(),
        ]
        if number:
            layers.insert(-3, nn.MaxPool2d(2))
        channels = width
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten())
    features = model(torch.zeros(2, 1, size, size)).shape[1]
    model.append(nn.Linear(features, 10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def traced(model: nn.Module, size: int = 28):
    graph = ChannelGraph.trace(model, torch.zeros(1, 1, size, size))
    return graph, graph.groups


def test_the_price_of_a_channel_by_hand() -> None:
    model = plain()
    _, groups = traced(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    positions = map_positions(model, torch.zeros(1, 1, 28, 28))
    costs = [memory_cost(group, shapes, positions) for group in groups]
    assert costs == pytest.approx([(784 + 9 + 288) / 784, (196 + 144 + 288) / 784, (49 + 288 + 90) / 784])
    reads = next(m for m in groups[0].members if m.role == "in").tensor
    assert memory_cost(groups[0], shapes, positions, {reads: {0: 0.5}}) == pytest.approx((784 + 9 + 144) / 784)


@pytest.mark.parametrize("alpha", [0.5, 0.01, 3.0])
def test_rescaling_changes_nothing_and_can_be_undone(alpha) -> None:
    model, x = plain(), torch.randn(4, 1, 28, 28)
    graph, groups = traced(model)
    norms = scaling_norms(model, graph, groups, x[:1])
    assert len(norms) == 3
    scaled = copy.deepcopy(model)
    for group in groups:
        rescale(scaled, group, norms[group.name], alpha)
    assert torch.allclose(scaled[1].weight, alpha * model[1].weight)
    with torch.inference_mode():
        torch.testing.assert_close(scaled(x), model(x), rtol=1e-4, atol=1e-4)
    for group in groups:
        rescale(scaled, group, norms[group.name], 1 / alpha)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[name], value, rtol=1e-6, atol=0)


def test_activations_that_are_not_homogeneous_are_noticed() -> None:
    for activation, fits in ((nn.ReLU, True), (nn.ReLU6, False), (nn.SiLU, False)):
        model = plain(activation=activation)
        graph, groups = traced(model)
        norm = scaling_norms(model, graph, groups, torch.zeros(1, 1, 28, 28))[groups[0].name]
        assert homogeneous(model, groups[0], norm, torch.zeros(1, 1, 28, 28)) == fits


@pytest.mark.parametrize("padding", [0, 1])
def test_constants_move_into_the_readers(padding) -> None:
    model, x = plain(padding, size=40), torch.randn(3, 1, 40, 40)
    graph, groups = traced(model, 40)
    norms = scaling_norms(model, graph, groups, x[:1])
    gone = {group.name: torch.arange(0, group.size, 3) for group in groups}
    for group in groups:
        set_scales(model, group, norms[group.name], gone[group.name])
    biases = [m.bias.clone() for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    with torch.inference_mode():
        expected = model(x)
        dropped = remove(model, x[:1], gone, graph)(x)
        move_constants(model, graph, groups, gone, x[:1])
        got = remove(model, x[:1], gone)(x)
    after = [m.bias for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert all(torch.equal(a, b) for a, b in zip(biases, after, strict=True)), (
        "the running mean takes it, not the bias too"
    )
    if padding == 0:
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    else:
        assert (got - expected).abs().mean() < 0.5 * (dropped - expected).abs().mean()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.expand, self.bn1 = nn.Conv2d(6, 12, 1), nn.BatchNorm2d(12)
        self.depthwise, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.project, self.bn3 = nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6)
        self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 10)

    def forward(self, x):
        x = torch.relu(self.bn0(self.stem(x)))
        y = torch.relu(self.bn2(self.depthwise(torch.relu(self.bn1(self.expand(x))))))
        x = x + self.bn3(self.project(y))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


def test_the_last_norm_scales_a_group_and_streams_get_gates() -> None:
    model = Residual()
    graph, groups = traced(model)
    assert scaling_norms(model, graph, groups, torch.zeros(1, 1, 28, 28)) == {"expand": "bn2"}
    step = ed.BNISTAChannelPruning(epochs=1, batch_size=8, rho=0.1)
    result = ed.compress(model, images_task(), [step], budget="params=0.5", quiet=True, latency=False)
    findings = result.report.methods[0].findings
    assert findings["batch_norms"] == {"expand": "bn2"}
    assert findings["gated"] == ["stem", "hidden"]
    assert result.budget[0].met


def run(method: ed.BNISTAChannelPruning, model: nn.Module, task: ed.Task, **settings):
    session = Session(model=model, task=task, original=copy.deepcopy(model))
    callback = method.callback(session)
    session.train([callback], epochs=method.epochs, batch_size=8, learning_rate=0.05, **settings)
    return session, callback


def test_exact_zeros_appear_go_and_leave_the_outputs() -> None:
    model, task = plain(0, (6, 8, 8)), images_task()
    kept: list[nn.Module] = []

    class Keep(ed.Callback):
        def finish(self, trainer):
            kept.append(copy.deepcopy(trainer.model).eval())

    session = Session(model=model, task=task, original=copy.deepcopy(model))
    callback = ed.BNISTAChannelPruning(rho=0.5, epochs=2, alpha=0.5).callback(session)
    session.train([callback, Keep()], epochs=2, batch_size=8, learning_rate=0.05, schedule="constant")
    zeros = {name: int((scale == 0).sum()) for name, scale in callback.scales.items()}
    assert sum(zeros.values()) > 0
    findings = session.findings["fit"]
    assert {n: w[0] - w[1] for n, w in findings["widths"].items()} == {
        n: min(z, callback.scales[n].numel() - 1) for n, z in zeros.items()
    }
    assert findings["rescaled"] == list(zeros)
    x = torch.randn(5, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(session.model(x), kept[0](x), atol=1e-4, rtol=1e-4)


def test_scales_have_neither_momentum_nor_weight_decay() -> None:
    groups: list[dict] = []

    class Watch(ThresholdedScales):
        def start(self, trainer):
            groups.extend(trainer.optimizer.param_groups)

    model = plain(widths=(4, 4))
    session = Session(model=model, task=images_task(), original=copy.deepcopy(model))
    session.train([Watch(ed.BNISTAChannelPruning(), session)], epochs=0, weight_decay=0.1)
    assert [(g["weight_decay"], g["momentum"]) for g in groups] == [(0.1, 0.9), (0.0, 0.0)]
    assert {id(p) for p in groups[1]["params"]} == {
        id(m.weight) for m in model.modules() if isinstance(m, nn.BatchNorm2d)
    }


def test_the_pull_of_a_run_is_reported_and_a_weak_one_is_said(capsys) -> None:
    model, task = plain(widths=(4, 4)), images_task()
    options = {"epochs": 2, "batch_size": 8, "learning_rate": 0.05, "schedule": "constant", "cost": "uniform"}
    findings = (
        ed.compress(model, task, [ed.BNISTAChannelPruning(rho=0.01, **options)], latency=False)
        .report.methods[0]
        .findings
    )
    steps = len(task.train) // 8 * 2
    assert list(findings["pull"].values()) == pytest.approx([0.05 * 0.01 * steps] * 2)
    assert "too weak to reach zero" in " ".join(capsys.readouterr().err.split())
    assert findings["zeros"] == 0


def test_out_of_range_fields_are_refused() -> None:
    for wrong in ({"alpha": 0.0}, {"alpha": 2.0}, {"rho": -1.0}, {"cost": "flops"}):
        with pytest.raises(ed.ConfigurationError, match=next(iter(wrong))):
            ed.BNISTAChannelPruning(**wrong)
