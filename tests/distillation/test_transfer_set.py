"""Less data for the student."""

from __future__ import annotations

import pytest
import torch

from efficientdnns.distillation.transfer_set import TransferSet, transfer_set
from efficientdnns.errors import ConfigurationError, DataError


def test_only_the_training_data_shrinks(session, digits):
    work = session()
    TransferSet(samples=50, omit_classes=[3, 4]).apply(work)
    targets = work.task.train.take(range(50)).targets
    assert len(work.task.train) == 50
    assert set(targets.tolist()) <= {0, 1, 2, 5, 6, 7, 8, 9}
    assert work.task.calibration is digits.calibration
    assert work.task.evaluation is digits.evaluation
    assert len(digits.train) > 400
    assert work.findings["fit"] == {"samples": 50}


def test_the_choice_is_the_seeds(digits):
    first, again, other = (transfer_set(digits.train, 20, seed=seed) for seed in (0, 0, 1))
    inputs = [split.take(range(20)).inputs for split in (first, again, other)]
    assert torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs[0], inputs[2])
    assert len(transfer_set(digits.train)) == len(digits.train)


def test_errors_come_before_work(session, digits):
    with pytest.raises(DataError, match="needs labels"):
        TransferSet(omit_classes=[1]).check(session(task=digits.without_labels()))
    with pytest.raises(ConfigurationError, match="expected at most"):
        TransferSet(samples=10**6).check(session())
