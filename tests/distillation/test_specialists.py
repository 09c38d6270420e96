"""Specialists: clusters of confused classes, the dustbin, and the combination of many distributions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from efficientdnns.distillation.specialists import (
    SpecialistEnsemble,
    cluster_classes,
    combination_objective,
    combine,
    dustbin_correction,
    relabel,
    specialist_from,
    specialist_samples,
)
from efficientdnns.errors import ConfigurationError


def probabilities(rows: int, classes: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * 2).double().softmax(1)


def members(*subsets: list[int], classes: int = 6) -> torch.Tensor:
    return torch.stack([torch.isin(torch.arange(classes), torch.tensor(subset)) for subset in subsets])


def test_classes_that_are_confused_form_a_cluster():
    # Two groups of three classes; each sample's mass lies in one group.
    numbers = torch.Generator().manual_seed(0)
    group = torch.randint(0, 2, (500,), generator=numbers)
    mass = torch.rand(500, 6, generator=numbers) * (torch.arange(6)[None] // 3 == group[:, None])
    found = cluster_classes(mass / mass.sum(1, keepdim=True), 2, 3)
    assert sorted(found) == [[0, 1, 2], [3, 4, 5]]


def test_clusters_may_overlap_and_have_the_asked_size():
    found = cluster_classes(probabilities(300, 8), 3, 5)
    assert len(found) == 3
    assert all(len(set(subset)) == 5 for subset in found)
    with pytest.raises(ConfigurationError, match="specialists is 9, expected 1 to 8"):
        cluster_classes(probabilities(300, 8), 9, 5)


def test_labels_outside_the_subset_go_into_the_dustbin():
    assert relabel(torch.tensor([0, 1, 2, 3, 4]), [1, 3]).tolist() == [2, 0, 2, 1, 2]


def test_half_of_a_specialists_samples_are_its_own():
    labels = torch.arange(1000) % 10
    chosen, rho = specialist_samples(labels, [2, 5], torch.Generator().manual_seed(0))
    own = torch.isin(labels[chosen], torch.tensor([2, 5]))
    assert own.double().mean() == 0.5
    assert set(labels[chosen][~own].tolist()) == set(range(10)) - {2, 5}
    assert rho == pytest.approx(800 / 200)


def test_the_dustbin_correction():
    z = torch.randn(4, 3)
    assert torch.equal(dustbin_correction(z, 1.0), z)
    corrected = dustbin_correction(z, 4.0)
    assert torch.equal(corrected[:, :2], z[:, :2])
    odds, before = (x.softmax(1)[:, -1] / (1 - x.softmax(1)[:, -1]) for x in (corrected, z))
    assert torch.allclose(odds, 4 * before)


def test_without_active_specialists_the_generalist_answers():
    general = probabilities(5, 6)
    nobody = torch.zeros(5, 1, dtype=torch.bool)
    found = combine(general, [probabilities(5, 3)], members([0, 1]), nobody, 50)
    assert torch.equal(found, general)


def test_a_specialist_that_agrees_changes_nothing():
    general = probabilities(5, 6)
    special = torch.cat([general[:, [1, 4]], general[:, [0, 2, 3, 5]].sum(1, keepdim=True)], 1)
    everyone = torch.ones(5, 1, dtype=torch.bool)
    assert torch.allclose(combine(general, [special], members([1, 4]), everyone, 50), general, atol=1e-9)


@given(st.integers(0, 50), st.floats(0.1, 3.9))
def test_the_objective_falls_in_every_step(seed, rate):
    general, special = probabilities(4, 6, seed), [probabilities(4, 3, seed + 1), probabilities(4, 4, seed + 2)]
    sets = members([0, 3], [1, 2, 3])
    active = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
    path = [combine(general, special, sets, active, steps, rate) for steps in range(6)]
    values = torch.stack([combination_objective(q.log(), general, special, sets, active) for q in path])
    assert (values.diff(dim=0) <= 1e-12).all()


def test_descent_ends_where_autograd_finds_no_slope():
    general, special, sets = probabilities(4, 6), [probabilities(4, 3, 7)], members([0, 3])
    active = torch.ones(4, 1, dtype=torch.bool)
    z = combine(general, special, sets, active, 8000, 3.0).log().requires_grad_()
    combination_objective(z, general, special, sets, active).sum().backward()
    assert z.grad.abs().max() < 1e-4


def test_the_dustbins_mass_is_that_of_the_complement():
    general, sets = probabilities(3, 6), members([0, 3])
    special = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    everyone = torch.ones(3, 1, dtype=torch.bool)
    q = general
    mass = torch.stack([q[:, 0], q[:, 3], q[:, [1, 2, 4, 5]].sum(1)], 1)
    expected = (special * (special / mass).log()).sum(1)
    assert torch.allclose(combination_objective(q.log(), general, [special], sets, everyone), expected)


def test_a_specialist_starts_from_the_generalist():
    generalist = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
    specialist = specialist_from(generalist, "2", [1, 3])
    x = torch.randn(6, 4)
    assert specialist(x).shape == (6, 3)
    assert torch.allclose(specialist(x)[:, :2], generalist(x)[:, [1, 3]], atol=1e-6)
    assert torch.equal(specialist[0].weight, generalist[0].weight)


def test_a_specialist_that_knows_better_is_heard_on_its_own_classes():
    class Fixed(nn.Module):
        def __init__(self, row) -> None:
            super().__init__()
            self.row = torch.tensor(row)

        def forward(self, x):
            return self.row.log().expand(len(x), -1)

    generalist = Fixed([0.45, 0.40, 0.10, 0.05])
    specialist = Fixed([0.05, 0.90, 0.05])
    sure = SpecialistEnsemble(generalist, [specialist], [[0, 1]], classes=4, steps=200)
    with torch.inference_mode():
        assert sure(torch.zeros(3, 1)).argmax(1).tolist() == [1, 1, 1]
        assert torch.allclose(sure(torch.zeros(3, 1)).exp().sum(1), torch.ones(3))
    elsewhere = SpecialistEnsemble(generalist, [specialist], [[2, 3]], classes=4)
    assert torch.allclose(elsewhere(torch.zeros(1, 1)).exp(), torch.tensor([[0.45, 0.40, 0.10, 0.05]]))
    with pytest.raises(ConfigurationError, match="no rising list"):
        SpecialistEnsemble(generalist, [specialist], [[3, 2]], classes=4)
