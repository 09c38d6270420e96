"""L0 regularization: penalty, gates in the network, removal, the run on digits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.measurement.size import nonzero_parameters
from efficientdnns.models import build
from efficientdnns.parts.gate import HardConcrete
from efficientdnns.parts.gated import Gated
from efficientdnns.pruning.l0_regularization import L0, L0Regularization, expected_l0, l0_penalty
from efficientdnns.session import Session
from efficientdnns.training import Callback


def compress(model, task, methods, **options):
    return ed.compress(model, task, methods, quiet=True, latency=False, **options)


def gated(layer: nn.Module, strength: float) -> Gated:
    layer.gate = HardConcrete(layer.in_features if isinstance(layer, nn.Linear) else layer.out_channels)
    with torch.no_grad():
        layer.gate.log_alpha.normal_()
    return Gated("layer", layer, layer, strength)


def test_penalty_of_parameters_and_its_gradient() -> None:
    dense, filters = gated(nn.Linear(6, 4), 0.3), gated(nn.Conv2d(3, 5, 2), 0.7)
    assert (dense.group_size(), filters.group_size()) == (4, 3 * 4 + 1)
    penalty = l0_penalty([dense, filters], samples=100)
    p, q = dense.gate.probability_open(), filters.gate.probability_open()
    torch.testing.assert_close(penalty, (0.3 * 4 * p.sum() + 0.7 * 13 * q.sum()) / 100)
    torch.testing.assert_close(expected_l0([dense, filters]), 4 * p.sum() + 13 * q.sum())
    penalty.backward()
    torch.testing.assert_close(dense.gate.log_alpha.grad, 0.003 * 4 * (p * (1 - p)).detach())
    torch.testing.assert_close(filters.gate.log_alpha.grad, 0.007 * 13 * (q * (1 - q)).detach())


def test_penalty_is_the_mean_count_of_open_parameters() -> None:
    item = gated(nn.Linear(6, 4), 1.0)
    counts = (item.gate.sample(200_000) != 0).float().sum(1) * 4
    assert l0_penalty([item], 1).item() == pytest.approx(counts.mean().item(), rel=5e-3)


def test_weight_decay_is_weighted_by_the_gates() -> None:
    dense, filters = gated(nn.Linear(6, 4), 0.0), gated(nn.Conv2d(3, 5, 2), 0.0)
    p, q = dense.gate.probability_open(), filters.gate.probability_open()
    w, f = dense.layer, filters.layer
    expected = (p * w.weight.square().sum(0)).sum() + w.bias.square().sum()
    expected = expected + (q * (f.weight.square().sum((1, 2, 3)) + f.bias.square())).sum()
    torch.testing.assert_close(l0_penalty([dense, filters], 100, 0.02), 0.01 * expected)


def test_training_and_evaluation_use_the_same_bias(digits) -> None:
    model = build("lenet5")
    session = Session(model, digits, model)
    callback = L0(L0Regularization(), session)
    callback.setup(session_trainer(session))
    with torch.no_grad():
        for item in callback.layers:
            item.gate.log_alpha.fill_(50.0)  # all gates are 1 in training and in evaluation
    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(model.train()(x), model.eval()(x))


def session_trainer(session: Session):
    from efficientdnns.training import Trainer

    return Trainer(session.model, session.task, epochs=1, accelerator=session.accelerator)


@pytest.mark.parametrize("per_sample", [False, True])
def test_gates_sit_on_inputs_of_linear_layers_and_maps_of_convolutions(digits, per_sample) -> None:
    model = build("lenet5")
    session = Session(model, digits, model)
    callback = L0(L0Regularization(per_sample=per_sample), session)
    callback.setup(session_trainer(session))
    assert {item.name: len(item.gate.log_alpha) for item in callback.layers} == {
        "conv1": 20, "conv2": 50, "fc1": 800, "fc2": 500
    }  # fmt: skip
    model.train()
    maps = model.conv1(torch.ones(2, 1, 28, 28))
    closed = (maps == 0).flatten(2).all(2)
    assert 0 < closed.float().mean() < 0.5
    assert torch.equal(closed[0], closed[1]) != per_sample


@pytest.mark.parametrize("name", ["lenet5", "lenet-300-100", "small-resnet", "vgg", "depthwise"])
def test_removal_reproduces_the_gated_network(digits, name) -> None:
    model = build_like(name)
    session = Session(model, digits, model)
    gated_outputs = []
    x = torch.randn(8, 1, 28, 28)

    class Close(Callback):
        """Closes about half of the gates and keeps the outputs of the gated network."""

        def finish(self, trainer) -> None:
            with torch.no_grad():
                for item in callback.layers:
                    item.gate.log_alpha.copy_(torch.randn_like(item.gate.log_alpha) * 3 - 2)
                    item.gate.log_alpha[0] = 3.0
                gated_outputs.append(trainer.model.eval()(x))

    callback = L0(L0Regularization(ema_decay=0.0), session)
    session.train([Close(), callback], epochs=1, learning_rate=0.01)
    with torch.no_grad():
        torch.testing.assert_close(session.model(x), gated_outputs[0], rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, HardConcrete) for module in session.model.modules())
    assert sum(p.numel() for p in session.model.parameters()) < 0.8 * sum(
        p.numel() for p in build_like(name).parameters()
    )
    if name.startswith("lenet"):
        assert not session.sparse, "everything that closed is really gone"


def small_vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4),
        nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


def depthwise() -> nn.Module:
    """Only the depthwise convolution can be gated, and the one in front of it goes with it."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, 4, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
        nn.Conv2d(24, 24, 3, 2, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


class OneBlock(nn.Module):
    """One block on a residual stream, as in a stage of ConvNeXt: what the stem makes also goes around the block."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(1, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide, self.narrow, self.head = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1), nn.Linear(8, 10)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        inside = self.narrow(self.wide(self.deep(x)).relu())
        return self.head((x + inside if self.residual else inside).mean((2, 3)))


@pytest.mark.parametrize("residual", [True, False])
def test_a_depthwise_convolution_that_something_bypasses_gets_no_gate(residual) -> None:
    hosts = L0Regularization().hosts(OneBlock(residual), torch.zeros(2, 1, 28, 28))
    assert ("deep" in hosts) is not residual
    assert {"wide", "head"} <= set(hosts)


def build_like(name: str) -> nn.Module:
    return {"vgg": small_vgg, "depthwise": depthwise}.get(name, lambda: build(name))()


def test_run_removes_neurons_and_their_producers(trained, digits) -> None:
    method = L0Regularization(
        epochs=6,
        strength=0.004,
        gate_learning_rate=0.3,
        ema_decay=0.9,
        optimizer="adam",
        learning_rate=2e-3,
        batch_size=64,
    )
    result = compress(trained, digits, [method])
    opened = result.report.methods[0].findings["open"]
    assert {name: size for name, (_, size) in opened.items()} == {"conv1": 20, "conv2": 50, "fc1": 800, "fc2": 500}
    assert opened["fc1"][0] < 600
    assert result.after.metric.value > result.before.metric.value - 10
    assert result.after.macs < result.before.macs
    assert nonzero_parameters(result.model) == sum(p.numel() for p in result.model.parameters())
    fc2 = result.model.fc2[1] if isinstance(result.model.fc2, nn.Sequential) else result.model.fc2
    fc1 = result.model.fc1[1] if isinstance(result.model.fc1, nn.Sequential) else result.model.fc1
    assert fc1.out_features == fc2.in_features == opened["fc2"][0]
    assert fc1.in_features <= opened["fc1"][0]
    assert result.report.methods[0].findings["expected_flops"] < 2 * result.before.macs


def test_average_is_what_is_validated_and_handed_over(trained, digits) -> None:
    session = Session(trained, digits, trained)
    method = L0Regularization(epochs=2, ema_decay=0.9, drop_rate=0.01)
    history = session.train([method.callback(session)], epochs=2, learning_rate=0.05)
    assert session.evaluate() == pytest.approx(history[-1]["accuracy"])


def test_only_named_layers_are_gated_with_their_own_strength(digits) -> None:
    model = build("lenet5")
    hosts = L0Regularization(strength={"conv2": 0.5, "fc*": 0.1}).hosts(model, torch.zeros(1, 1, 28, 28))
    assert hosts == {"conv2": ("conv2", 0.5), "fc1": ("fc1", 0.1), "fc2": ("fc2", 0.1)}


def test_residual_blocks_are_gated_at_their_first_convolution_behind_its_batch_norm() -> None:
    model = build("cifar-resnet20")
    hosts = L0Regularization().hosts(model, torch.zeros(1, 3, 32, 32))
    convolutions = [name for name in hosts if isinstance(model.get_submodule(name), nn.Conv2d)]
    assert len(convolutions) == 9
    assert all(name.endswith("conv1") and hosts[name][0].endswith("bn1") for name in convolutions)


def test_from_scratch_starts_from_kaiming_normal_with_the_true_fan_in(trained, digits) -> None:
    session = Session(copy.deepcopy(trained), digits, trained)
    L0Regularization(from_scratch=True).prepare(session)
    assert session.model.fc1.weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert session.model.conv2.weight.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.05)
    assert not session.model.fc1.bias.any()
    L0Regularization().prepare(session)


def test_optimizer_decays_nothing() -> None:
    assert L0Regularization(weight_decay=0.1).settings()["weight_decay"] == 0.0


def test_expected_flops_follow_the_formula_of_the_paper(digits) -> None:
    model = build("lenet5")
    session = Session(model, digits, model)
    session.train([L0Regularization(epochs=0, ema_decay=0, drop_rate=0.3).callback(session)], epochs=0)
    p, flops = 0.9203, 0.0
    for maps, positions, n in ((20, 24 * 24, 25), (50, 8 * 8, 500)):
        flops += p * maps * (positions * (2 * n - 1) + positions)
    for inputs, outputs in ((800, 500), (500, 10)):
        flops += (2 * p * inputs - 1) * outputs + outputs
    assert session.findings["fit"]["expected_flops"] == pytest.approx(flops, rel=1e-3)


def test_gates_are_left_in_multiples_and_those_that_are_added_stay_open(digits) -> None:
    torch.manual_seed(0)
    model = build("lenet5")
    method = L0Regularization(epochs=1, strength=1.0, ema_decay=0, round_to=8)
    session = Session(model, digits, copy.deepcopy(model))
    trainer, callback = session_trainer(session), method.callback(session)
    callback.setup(trainer)
    with torch.no_grad():
        for item in callback.layers:
            item.gate.log_alpha.fill_(2.0 if item.name == "fc1" else -4.0)
            item.gate.log_alpha[torch.randperm(len(item.gate.log_alpha))[:11]] = 2.0
    callback.finish(trainer)
    small = trainer.model
    assert (small.conv1.out_channels, small.conv2.out_channels, small.fc1.out_features) == (16, 16, 16)
    assert small.conv1.weight.flatten(1).abs().amax(1).min() > 0, "rounding up keeps no dead filters"


def test_unknown_layer(trained, digits) -> None:
    with pytest.raises(ed.ConfigurationError, match="strength: no layer is called 'fc7'"):
        compress(trained, digits, [L0Regularization(strength={"fc7": 1.0})])
