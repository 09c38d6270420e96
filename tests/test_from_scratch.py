"""The from-scratch protocol: twins, budgets, masks, batches, the verdict, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import efficientdnns as ed
from efficientdnns.cli import app
from efficientdnns.from_scratch import from_scratch, scratch_epochs, verdict
from efficientdnns.measurement.macs import count_macs
from efficientdnns.models import build
from efficientdnns.parts.reinitialise import reinitialised
from efficientdnns.training import Trainer


def test_twin_has_the_shapes_and_none_of_the_weights() -> None:
    torch.manual_seed(0)
    model = build("small-resnet", in_channels=1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    twin, again = reinitialised(model, 3), reinitialised(model, 3)
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert value.shape == other.shape
        assert torch.equal(other, again.state_dict()[name])
        if value.dim() > 1:
            assert not torch.equal(value, other), name
            assert value.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
        if name.endswith("running_mean"):
            assert not other.any()


def test_a_parameter_without_a_module_of_its_own_is_drawn_anew() -> None:
    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(4, 5))
            self.scale = torch.nn.Parameter(torch.ones(5))

    model = Tokens()
    twin = reinitialised(model, 0)
    assert not torch.equal(twin.table, model.table)
    assert torch.equal(twin.scale, model.scale), "a constant start stays one"


def test_equal_budget() -> None:
    assert scratch_epochs(8, 362, 100) == 28
    assert scratch_epochs(160, 2.0, 1.0, cap=1.5) == 240
    assert scratch_epochs(10, 1.0, 1.0) == 10
    with pytest.raises(ed.ConfigurationError, match="nothing was saved"):
        scratch_epochs(10, 1.0, 2.0)


def test_verdict_is_that_of_the_paired_differences() -> None:
    assert verdict([90.0], [80.0])[1:] == (None, "fewer than three seeds say nothing")
    mean, half, says = verdict([91.0, 91.2, 90.9], [90.0, 90.1, 90.0])
    assert mean == pytest.approx(1.0, abs=0.01)
    # differences 1.0, 1.1, 0.9: deviation 0.1, t(0.975, 2) = 4.303
    assert half == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert says == "inherited weights help"
    assert verdict([90.0, 92.0, 91.0], [91.0, 90.0, 92.0])[2] == "the architecture is enough"


def test_arms_share_batches_and_keep_masks(trained, digits, monkeypatch) -> None:
    result = ed.compress(trained, digits, [ed.PruneWeights(sparsity=0.8)], quiet=True, latency=False)
    orders: list[list[int]] = []
    fit = Trainer.fit

    def spy(self):
        orders.append([])
        step = self.training_step

        def note(batch):
            orders[-1].extend(batch.indices.tolist())
            loss = step(batch)
            for name, weight in self.model.named_parameters():
                if weight.dim() > 1:
                    assert int(weight.count_nonzero()) <= round(0.2 * weight.numel()) + 1, name
            return loss

        monkeypatch.setattr(self, "training_step", note)
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", spy)
    macs = count_macs(trained, digits.example_input).total
    found = from_scratch(
        result.model,
        digits,
        macs_dense=2 * macs,
        macs_compressed=macs,
        epochs=2,
        fine_tune_epochs=1,
        seeds=[0],
        quiet=True,
    )
    assert [len(order) for order in orders] == [384, 768, 768, 1536]
    for order in orders[1:]:
        assert order[:384] == orders[0]
    assert found.arm("scratch-b").epochs == 4
    assert found.arm("scratch-e").training_macs == 3 * macs * len(digits.train) * 2
    assert found.arm("scratch-b").training_macs == 3 * (2 * macs) * len(digits.train) * 2
    assert found.arm("fine-tune").mean > found.arm("scratch-e").mean
    assert found.verdict == "fewer than three seeds say nothing"


def test_command_writes_its_finding_beside_the_result(tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: lenet-300-100\ntask: {name: digits, limit: 200, evaluation_limit: 100}\n"
        "training: {batch_size: 32}\nmethods:\n  - fit: {epochs: 1}\n  - prune-channels: {pruning_ratio: 0.7}\n"
    )
    ed.run(ed.Recipe.load(recipe), tmp_path / "out", quiet=True, latency=False)
    call = ["compare", str(tmp_path / "out"), "--from-scratch", "--epochs", "1", "--fine-tune-epochs", "1", "--quiet"]
    shown = CliRunner().invoke(app, [*call, "--seeds", "3"])
    assert shown.exit_code == 0, shown.output
    assert "scratch-b" in shown.output
    written = json.loads((tmp_path / "out" / "from-scratch.json").read_text())
    assert written["interval"] is not None
    assert len(written["arms"][0]["metric"]) == 3
    wrong = CliRunner().invoke(app, ["compare", str(tmp_path), "--from-scratch"])
    assert isinstance(wrong.exception, ed.ConfigurationError)
    assert "holds no result" in str(wrong.exception)
