"""The training loop: hooks, determinism, exact resumption."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from efficientdnns.errors import ConfigurationError, FileFormatError
from efficientdnns.task import Task
from efficientdnns.training import (
    Callback,
    ExponentialMovingAverage,
    Trainer,
    TrainingSettings,
    factor,
    load_state,
    save_state,
)
from efficientdnns.training.sparsity import KeepZeros, MaskedTraining


@pytest.fixture
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(96, 6, generator=generator)
    targets = (inputs[:, 0] > 0).long()
    return Task.from_tensors((inputs, targets), (inputs[:32], targets[:32]))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


def trainer(task, callbacks=(), epochs=4, model=None, **options) -> Trainer:
    settings = TrainingSettings(batch_size=16, **options.pop("settings", {}))
    return Trainer(
        model or network(),
        task,
        callbacks,
        epochs=epochs,
        settings=settings,
        accelerator=Accelerator(cpu=True),
        **options,
    )


def test_learns(task) -> None:
    run = trainer(task, epochs=10)
    history = run.fit()
    assert len(history) == 10
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert not run.model.training


def test_equals_a_hand_written_loop(task) -> None:
    run = trainer(task, epochs=2, settings={"schedule": "constant", "learning_rate": 0.1, "weight_decay": 0.0})
    torch.manual_seed(3)
    run.fit()
    model = network()
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        model.train()
        for batch in task.train.batches(16, shuffle=True, seed=0, epoch=epoch, drop_last=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
    for a, b in zip(run.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("augment", [True, False])
def test_inputs_are_changed_unless_told_otherwise(task, augment) -> None:
    changed = []

    def change(x, generator):
        changed.append(len(x))
        return x

    task.train.augment = change
    trainer(task, epochs=1, settings={"augment": augment}).fit()
    assert bool(changed) is augment


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_killed_run_resumes_to_the_same_result(task, tmp_path, optimizer, stop) -> None:
    settings = {"optimizer": optimizer, "learning_rate": 0.01}
    torch.manual_seed(5)
    whole = trainer(task, settings=settings)
    whole.fit()

    class Killed(Callback):
        def epoch_start(self, trainer: Trainer) -> None:
            if trainer.epoch == stop:
                raise KeyboardInterrupt

    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        trainer(task, [Killed()], settings=settings, checkpoint=tmp_path / "run.safetensors").fit()
    torch.manual_seed(99)
    resumed = trainer(task, [Callback()], settings=settings, checkpoint=tmp_path / "run.safetensors")
    history = resumed.fit()
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4]
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_hooks_come_in_order(task) -> None:
    calls: list[str] = []

    class Log(Callback):
        def __getattribute__(self, name):
            if name in vars(Callback) and not name.startswith("_") and name != "structural":
                calls.append(name)
            return super().__getattribute__(name)

        def batch(self, trainer, batch):
            return batch

        def task_loss(self, trainer, batch, outputs, loss):
            return loss

        def penalty(self, trainer):
            return None

        def after_backward(self, trainer):
            pass

        def after_step(self, trainer):
            pass

    trainer(task, [Log()], epochs=1).fit()
    assert calls[:5] == ["setup", "parameter_groups", "start", "epoch_start", "batch"]
    assert calls[5:9] == ["task_loss", "penalty", "after_backward", "after_step"]
    assert calls[-2:] == ["epoch_end", "finish"]


def test_validation_sees_what_would_be_deployed_and_nothing_else_does(task) -> None:
    class Deployed(Callback):
        @contextmanager
        def validation(self, trainer):
            kept = copy.deepcopy(trainer.model.state_dict())
            with torch.no_grad():
                trainer.model[4].weight.zero_()
                trainer.model[4].bias.copy_(torch.tensor([0.0, 1.0]))
            yield
            trainer.model.load_state_dict(kept)

    torch.manual_seed(5)
    plain = trainer(task, epochs=2)
    plain.fit()
    torch.manual_seed(5)
    run = trainer(task, [Deployed()], epochs=2)
    history = run.fit()
    always_one = 100 * task.calibration.targets.float().mean().item()
    assert [entry["accuracy"] for entry in history] == pytest.approx([always_one] * 2)
    for a, b in zip(plain.model.state_dict().values(), run.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_two_owners_of_the_step_are_refused(task) -> None:
    class Owner(Callback):
        def training_step(self, trainer, batch):
            return trainer.training_step(batch)

    with pytest.raises(ConfigurationError, match="both own the training step"):
        trainer(task, [Owner(), Owner()])


def test_masks_hold_in_spite_of_momentum_and_decay(task) -> None:
    model = network()
    mask = (torch.rand_like(model[0].weight) > 0.5).float()
    run = trainer(task, [MaskedTraining({"0.weight": mask})], model=model, settings={"weight_decay": 0.1})
    run.fit()
    assert torch.equal(model[0].weight != 0, mask.bool())
    assert not model[0].weight[mask == 0].signbit().any()
    again = trainer(task, [KeepZeros({"0.weight", "gone.weight"})], model=model)
    again.fit()
    assert torch.equal(model[0].weight != 0, mask.bool())


def test_parameter_groups_leave_the_main_group(task) -> None:
    class Group(Callback):
        def parameter_groups(self, trainer):
            return [{"params": [trainer.model[4].bias], "lr": 1.0, "weight_decay": 0.0}]

    run = trainer(task, [Group()], epochs=1)
    run.fit()
    sizes = [len(group["params"]) for group in run.optimizer.param_groups]
    assert sizes == [5, 1]
    assert run.optimizer.param_groups[1]["initial_lr"] == 1.0


@given(st.floats(0, 1), st.sampled_from(["constant", "cosine", "linear", "step"]), st.floats(0, 0.5))
def test_schedule_stays_between_zero_and_one(progress, schedule, warmup) -> None:
    assert 0 <= factor(schedule, progress, warmup) <= 1


def test_schedule_values() -> None:
    assert factor("cosine", 0) == 1
    assert factor("cosine", 1) == pytest.approx(0)
    assert factor("linear", 0.25) == 0.75
    assert [factor("step", x) for x in (0.4, 0.6, 0.9)] == [1, 0.1, 0.01]
    assert factor("cosine", 0.05, warmup=0.1) == 0.5


def test_average_is_bias_corrected() -> None:
    layer = nn.Linear(3, 2)
    average = ExponentialMovingAverage(layer.named_parameters(), 0.9)
    constant = layer.weight.detach().clone()
    for _ in range(3):
        average.update()
    with average.applied():
        torch.testing.assert_close(layer.weight, constant)
    assert torch.equal(layer.weight, constant)


def test_checkpoint_round_trip_is_exact(tmp_path) -> None:
    tied = torch.randn(3)
    state = {"a": [1, 2.5, None, True, "x"], 3: (tied, tied[1:]), "empty": {}, "t": torch.tensor(7)}
    save_state(tmp_path / "s", state)
    again = load_state(tmp_path / "s")
    assert again["a"] == state["a"]
    assert torch.equal(again[3][1], tied[1:])
    assert again["empty"] == {}
    assert again["t"].dtype == torch.int64
    assert list(tmp_path.iterdir()) == [tmp_path / "s"]


def test_a_file_that_is_no_checkpoint(tmp_path) -> None:
    (tmp_path / "s").write_bytes(b"nonsense")
    with pytest.raises(FileFormatError, match="not a checkpoint"):
        load_state(tmp_path / "s")


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="no setting 'lr'"):
        TrainingSettings(lr=0.1)
    with pytest.raises(ConfigurationError, match="learning_rate is -1"):
        TrainingSettings(learning_rate=-1)
