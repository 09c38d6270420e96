"""Joint sparsity: the regularisers, their learned coefficients, the quantizer, and the file for both domains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import efficientdnns as ed
from efficientdnns.measurement.size import nonzero_parameters
from efficientdnns.parts.winograd import WinogradConv2d, winograd_transform
from efficientdnns.pruning.joint_sparsity import (
    JointSparsity,
    QuantizedWeight,
    deployments,
    partial_l2,
    smallest_threshold,
    weighted,
)
from efficientdnns.session import Session

QUICK = {"epochs": 1, "codebook_epochs": 1, "refresh": 4}


def compress(model, task, methods, **options):
    return ed.compress(model, task, methods, quiet=True, latency=False, **options)


def test_regulariser_at_the_ends() -> None:
    weights = [torch.randn(7, 5), torch.randn(11)]
    everything = torch.cat([w.flatten() for w in weights])
    torch.testing.assert_close(partial_l2(weights, smallest_threshold(weights, 1.0)), everything.square().mean())
    assert float(partial_l2(weights, smallest_threshold(weights, 0.0))) == 0.0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.83])
def test_threshold_selects_the_share_exactly(share) -> None:
    weights = [torch.randn(40, 5), torch.randn(31)]
    threshold = smallest_threshold(weights, share)
    assert sum(int((w.abs() <= threshold).sum()) for w in weights) == round(share * 231)


def test_gradients_are_those_of_finite_differences_and_of_the_formula() -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    u = winograd_transform(weight, 2)
    threshold = smallest_threshold([u], 0.6)
    inside = (u.detach().abs() <= threshold).double()

    def frozen(w: torch.Tensor) -> torch.Tensor:
        return (winograd_transform(w, 2) * inside).square().sum() / u.numel()

    assert torch.autograd.gradcheck(frozen, [weight])
    (found,) = torch.autograd.grad(partial_l2([u], threshold), [weight])
    (expected,) = torch.autograd.grad(frozen(weight), [weight])
    torch.testing.assert_close(found, expected)
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(found, 2 / u.numel() * g.T @ (u.detach() * inside) @ g)


def test_coefficients_settle_at_alpha_over_the_penalty() -> None:
    penalty, alpha = torch.tensor(0.02), 0.1
    zeta = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([zeta], lr=1.0)
    for _ in range(400):
        optimizer.zero_grad()
        weighted(penalty, zeta, alpha).backward()
        optimizer.step()
    assert float(zeta) == pytest.approx(math.log(alpha / 0.02), abs=1e-3)


@pytest.mark.parametrize("seed", [None, 5])
def test_quantizer_keeps_zeros_counts_and_half_a_step(seed) -> None:
    weight = nn.Parameter(torch.randn(60, 50) * (torch.rand(60, 50) > 0.7))
    book = QuantizedWeight(weight, 16, seed)
    dense = book.dense()
    assert torch.equal(dense != 0, weight != 0), "zeros stay zeros, and nothing else becomes one"
    assert (dense - weight).abs().max() <= book.step / 2 + 1e-6
    assert len(book.centroids) <= 18
    if seed is not None:
        error = (dense - weight)[weight != 0].detach()
        assert abs(float(error.mean())) < book.step / 20
        assert float(error.var()) == pytest.approx(book.step**2 / 12, rel=0.15)
    gradient = torch.randn(60, 50)
    level = 1 + int(book.index[book.index > 0][0]) - 1
    expected = gradient[book.index == level].mean()
    torch.testing.assert_close(book.gradient(gradient)[level - 1], expected, atol=1e-5, rtol=1e-4)


def test_training_makes_the_small_weights_small_in_both_domains(trained, digits) -> None:
    session = Session(trained, digits, trained)
    method = JointSparsity(sparsity=0.8, epochs=4, refresh=2, levels=None)

    def share_left(model: nn.Module) -> dict[str, float]:
        spatial = [model.get_parameter(name) for name in method.weights(model)]
        winograd = [winograd_transform(layer.weight, 2) for layer in method.convolutions(model).values()]
        return {
            name: (partial_l2(values, smallest_threshold(values, 0.8)) / partial_l2(values, 1e9)).item()
            for name, values in (("spatial", spatial), ("winograd", winograd))
        }

    before = share_left(session.model)
    callback = method.callback(session)
    callback.finish = lambda trainer: None
    started: dict[str, float] = {}
    callback.start = lambda trainer: started.update({domain: zeta.item() for domain, zeta in callback.zetas.items()})
    session.train([callback], epochs=4, batch_size=16, optimizer="adam", learning_rate=2e-3)
    after = share_left(session.model)
    assert all(after[domain] < 0.8 * before[domain] for domain in before)
    assert all(zeta.item() > started[domain] for domain, zeta in callback.zetas.items())


@pytest.mark.parametrize("dither", [False, True])
def test_file_holds_few_levels_and_later_training_keeps_the_zeros(trained, digits, dither, tmp_path) -> None:
    method = JointSparsity(sparsity=0.9, dither=dither, **QUICK)
    result = compress(trained, digits, [method])
    finding = result.report.methods[0].findings
    weights = {name: result.model.get_parameter(name) for name in finding["kept"]}
    total = sum(w.numel() for w in weights.values())
    assert sum(int((w == 0).sum()) for w in weights.values()) == round(0.9 * total)
    for name, weight in weights.items():
        distinct = len(weight[weight != 0].unique())
        assert distinct > 0.8 * int(weight.count_nonzero()) if dither else distinct <= 18, name
    assert result.after.bytes < 0.06 * result.before.bytes
    assert finding["bytes"]["file"] == result.after.bytes
    assert finding["accuracy"].keys() == {"pruned", "spatial", "winograd"}
    assert finding["sparsity"]["winograd"] == pytest.approx(0.9, abs=5e-3)  # of quantized weights some are equal
    result.save(tmp_path / "out")
    loaded = ed.load(tmp_path / "out")
    assert all(torch.equal(loaded.get_parameter(name), weight) for name, weight in weights.items())


def test_deployed_in_the_winograd_domain(trained, digits, tmp_path) -> None:
    method = JointSparsity(sparsity=0.5, deploy="winograd", levels=None, **QUICK)
    result = compress(trained, digits, [method])
    assert isinstance(result.model.conv2, WinogradConv2d)
    result.save(tmp_path / "out")
    x = next(iter(digits.evaluation.batches(8))).inputs
    with torch.inference_mode():
        assert torch.equal(ed.load(tmp_path / "out")(x), result.model(x))


def test_multiplications_of_both_domains(digits) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 28 * 28, 10))
    winograd = nn.Sequential(WinogradConv2d.of(model[0], 2), *model[1:])
    found = deployments(model, winograd, Session(model, digits, model))
    linear = 4 * 28 * 28 * 10
    assert found["multiplications"]["dense"] == 4 * 9 * 784 + linear
    u = winograd[0].transformed()
    assert found["multiplications"]["winograd"] == round(int(u.count_nonzero()) * 784 / 4) + linear


def test_meets_a_budget(trained, digits) -> None:
    result = compress(trained, digits, [JointSparsity(**QUICK)], budget="params=0.5")
    assert 0.48 * nonzero_parameters(trained) < nonzero_parameters(result.model) <= 0.5 * nonzero_parameters(trained)


def test_controls_regularise_one_domain(trained, digits) -> None:
    for domain in ("spatial", "winograd"):
        result = compress(trained, digits, [JointSparsity(domains=domain, levels=None, **QUICK)])
        assert list(result.report.methods[0].findings["zeta"]) == [domain]
    fixed = compress(trained, digits, [JointSparsity(learned=False, zeta=1.5, levels=None, **QUICK)])
    assert set(fixed.report.methods[0].findings["zeta"].values()) == {1.5}


def test_networks_without_a_winograd_form(digits) -> None:
    result = compress(ed.models.build("lenet-300-100"), digits, [JointSparsity(**QUICK)])
    assert "winograd" not in result.report.methods[0].findings["sparsity"]


def test_refuses_wrong_fields(trained, digits) -> None:
    with pytest.raises(ed.ConfigurationError, match="tile is 8"):
        JointSparsity(tile=8)
    with pytest.raises(ed.ConfigurationError, match="skip: no layer is called 'conv9'"):
        compress(trained, digits, [JointSparsity(skip=("conv9",))])
