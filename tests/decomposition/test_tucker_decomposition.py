import copy
import itertools

import pytest
import torch
from torch import nn

from efficientdnns.budget import Budget
from efficientdnns.compress import compress
from efficientdnns.decomposition.tucker_decomposition import (
    TuckerDecomposition,
    base_ranks,
    decompose,
    full_ranks,
    layers_of,
    saves,
    tucker2,
)
from efficientdnns.errors import BudgetError, ConfigurationError
from efficientdnns.fit import fit
from efficientdnns.models import build
from efficientdnns.session import Session
from efficientdnns.task import Task
from efficientdnns.training import TrainingSettings


def test_full_ranks_give_the_convolution_back():
    conv = nn.Conv2d(6, 10, 3, stride=2, padding=1)
    chain, error = decompose(conv, (6, 10))
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(chain(x), conv(x), atol=1e-5, rtol=1e-5)
    assert error < 1e-5


def test_hooi_improves_on_hosvd_and_keeps_orthonormal_factors():
    torch.manual_seed(0)
    kernel = torch.randn(12, 8, 3, 3, dtype=torch.float64)
    core, u_in, u_out, errors = tucker2(kernel, 3, 4)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]
    torch.testing.assert_close(u_in.T @ u_in, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(u_out.T @ u_out, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(core, torch.einsum("tsij,sa,tb->baij", kernel, u_in, u_out))
    rebuilt = torch.einsum("baij,sa,tb->tsij", core, u_in, u_out)
    assert float((kernel - rebuilt).norm() / kernel.norm()) == pytest.approx(errors[-1], abs=1e-9)


def test_chain_has_the_papers_weights_and_output_shape():
    conv = nn.Conv2d(16, 24, 3, stride=2, padding=1)
    chain, _ = decompose(conv, (5, 7))
    assert sum(p.numel() for p in chain.parameters()) == 16 * 5 + 9 * 5 * 7 + 24 * 7 + 24
    assert chain(torch.randn(1, 16, 11, 11)).shape == conv(torch.randn(1, 16, 11, 11)).shape


def test_layer_kinds_get_the_right_number_of_ranks():
    assert full_ranks(nn.Conv2d(3, 64, 3)) == (27,)
    assert full_ranks(nn.Conv2d(32, 64, 1)) == (32,)
    assert full_ranks(nn.Conv2d(32, 64, 3)) == (32, 64)
    assert full_ranks(nn.Linear(30, 20)) == (20,)
    assert base_ranks(nn.Conv2d(32, 64, 3), 0.25) == (8, 16)
    assert base_ranks(nn.Linear(30, 20), (8, 12)) == (12,)


def test_break_even_counts_the_first_convolution_before_the_stride():
    assert saves(nn.Conv2d(32, 32, 3), (25, 25))
    assert not saves(nn.Conv2d(32, 32, 3), (32, 32))
    assert not saves(nn.Conv2d(32, 32, 3, stride=2), (25, 25))


def test_what_cannot_be_decomposed_is_named():
    model = nn.ModuleDict(
        {
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "up": nn.ConvTranspose2d(8, 8, 3),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16),
            "head": nn.Linear(8, 4),
        }
    )
    able, unable = layers_of(model)
    assert list(able) == ["head"]
    assert unable["depthwise"] == "grouped"
    assert unable["encoder.linear1"] == "read by a fused kernel"
    assert set(unable) >= {"up", "encoder.self_attn.out_proj"}


@pytest.fixture(scope="module")
def digits():
    return Task.from_name("digits")


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    model = build("lenet5")
    fit(model, digits, epochs=4, quiet=True, optimizer="adam", learning_rate=2e-3, batch_size=64)
    return model


def applied(method, model, task, **options):
    settings = TrainingSettings(optimizer="adam", batch_size=64)
    session = Session(
        model=copy.deepcopy(model), task=task, original=model, settings=settings, label=method.name, **options
    )
    method.check(session)
    method.apply(session)
    return session


def test_a_decomposed_network_recovers_in_an_epoch_and_is_smaller(digits, trained):
    dense = digits.evaluate(trained).value
    rough = applied(TuckerDecomposition(ranks=0.25, skip=("fc2",), finetune_epochs=0), trained, digits)
    tuned = applied(TuckerDecomposition(ranks=0.25, skip=("fc2",), finetune_epochs=2), trained, digits)
    assert digits.evaluate(tuned.model).value > max(dense - 2, digits.evaluate(rough.model).value)
    assert sum(p.numel() for p in tuned.model.parameters()) < sum(p.numel() for p in trained.parameters()) / 2
    assert tuned.findings["tucker-decomposition"]["layers"]["conv2"]["ranks"] == (5, 12)
    assert type(trained.conv2) is nn.Conv2d


def test_evbmf_needs_no_ranks(digits, trained):
    session = applied(TuckerDecomposition(finetune_epochs=0), trained, digits)
    finding = session.findings["tucker-decomposition"]
    assert 1 <= finding["layers"]["fc1"]["ranks"][0] < 250
    assert session.model(digits.example_input).shape == (1, 10)


@pytest.mark.parametrize("budget", [{"macs": 0.4}, {"params": 0.2}, {"macs": 0.6, "params": 0.3}])
def test_budgets_are_met_by_the_mildest_ranks(digits, trained, budget):
    result = compress(
        trained, digits, TuckerDecomposition(finetune_epochs=0), budget=Budget(**budget), quiet=True, latency=False
    )
    assert all(line.met for line in result.budget)
    assert max(line.got / line.asked for line in result.budget) > 0.85


def test_an_impossible_budget_names_what_is_reachable(digits, trained):
    with pytest.raises(BudgetError, match="least that is reachable"):
        applied(TuckerDecomposition(finetune_epochs=0), trained, digits, budget=Budget(macs=1e-4))


def test_unknown_layers_to_skip_are_refused_before_work(digits, trained):
    with pytest.raises(ConfigurationError, match="conv2"):
        applied(TuckerDecomposition(skip=("conv22",)), trained, digits)
    session = applied(TuckerDecomposition(skip=("conv2",), linear=False, finetune_epochs=0), trained, digits)
    assert session.findings["tucker-decomposition"]["kept"]["conv2"] == "left alone as asked"
    assert type(session.model.conv2) is nn.Conv2d


@pytest.mark.long
def test_decomposition_is_the_initialisation(digits, trained):
    """The same thin network from random weights is clearly worse after the same few steps."""
    method = TuckerDecomposition(ranks=(8, 8), finetune_epochs=2)
    torch.manual_seed(1)
    from_trained = applied(method, trained, digits)
    from_random = applied(method, build("lenet5"), digits)
    assert digits.evaluate(from_trained.model).value > digits.evaluate(from_random.model).value + 20
