import copy
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from efficientdnns.distributed.deep_gradient_compression import (
    DeepGradientCompression,
    Worker,
    accumulate,
    local_threshold,
    sparsity_at,
)
from efficientdnns.errors import ConfigurationError
from efficientdnns.models import build
from efficientdnns.parts.sparse_gradients import decode, entries_to_send, mean
from efficientdnns.session import Session
from efficientdnns.task import Task
from efficientdnns.training import Callback, TrainingSettings


def test_warmup_has_the_papers_sparsities():
    assert [sparsity_at(epoch) for epoch in range(6)] == [0.75, 0.9375, 0.984375, 0.996, 0.999, 0.999]
    assert [sparsity_at(quarter / 4, warmup_epochs=1) for quarter in range(5)] == [0.75, 0.9375, 0.984375, 0.996, 0.999]
    assert sparsity_at(0, warmup_epochs=0) == 0.999
    assert sparsity_at(0, sparsity=0.5) == 0.5


@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_delayed_entry_carries_the_momentum_it_would_have_had(steps, nesterov):
    momentum, g = 0.9, torch.tensor([2.0])
    u, v = torch.zeros(1), torch.zeros(1)
    for _ in range(steps):
        accumulate(u, v, g, momentum, nesterov)
    weight = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], lr=1.0, momentum=momentum, nesterov=nesterov)
    for _ in range(steps):
        weight.grad = g.clone()
        sgd.step()
    torch.testing.assert_close(v, -weight.detach())
    if not nesterov:
        torch.testing.assert_close(v, g * sum(momentum**i for t in range(1, steps + 1) for i in range(t)))


def test_naive_dropping_loses_the_momentum_of_the_wait():
    method = DeepGradientCompression(momentum_correction=False, min_dim=1)
    worker = Worker(method, {"w": torch.zeros(2)})
    for _ in range(5):
        worker.compress({"w": torch.tensor([1.0, 100.0])}, 0.5)
    assert float(worker.v["w"][0]) == 5


@pytest.mark.parametrize("selection", ["exact", "sampled"])
def test_nothing_is_lost_and_what_was_sent_is_cleared(selection):
    method = DeepGradientCompression(selection=selection)
    worker = Worker(method, {"w": torch.zeros(40, 50), "b": torch.zeros(40)})
    g = torch.Generator().manual_seed(0)
    sent = torch.zeros(40, 50)
    velocities = torch.zeros(40, 50)
    for _ in range(20):
        gradient = torch.randn(40, 50, generator=g)
        velocities += 0.9 * worker.u["w"] + gradient
        parts = worker.compress({"w": gradient, "b": gradient[:, 0]}, 0.99, random=g)
        message = decode(parts["w"], (40, 50))
        sent += message
        there = message != 0
        assert not worker.v["w"][there].any()
        assert not worker.u["w"][there].any()
        if selection == "exact":
            assert int(there.sum()) == entries_to_send(2000, 0.99) == 20
        assert torch.equal(parts["b"], gradient[:, 0])
    torch.testing.assert_close(sent + worker.v["w"], velocities, atol=1e-4, rtol=1e-4)


def test_both_conventions_of_local_clipping_give_the_same_trajectory():
    workers, threshold = 4, 0.7
    method = DeepGradientCompression(selection="exact")
    g = torch.Generator().manual_seed(0)
    averaging, adding = ([Worker(method, {"w": torch.zeros(6, 5)}) for _ in range(workers)] for _ in range(2))
    for _ in range(5):
        gradients = torch.randn(workers, 6, 5, generator=g)
        limit = local_threshold(threshold, workers)
        first = mean([w.compress({"w": x}, 0.5, limit) for w, x in zip(averaging, gradients)], {"w": (6, 5)})["w"]
        limit = local_threshold(threshold, workers, averaged=False)
        parts = [w.compress({"w": x / workers}, 0.5, limit) for w, x in zip(adding, gradients)]
        second = sum(decode(part["w"], (6, 5)) for part in parts)
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)
    assert local_threshold(1.0, 4) == 2
    assert local_threshold(1.0, 4, averaged=False) == 0.5


@pytest.fixture(scope="module")
def task():
    return Task.from_name("digits", limit=256)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("mlp", hidden=[24])


def trained(method, model, task, callbacks=(), directory=None, **settings):
    session = Session(
        model=copy.deepcopy(model),
        task=task,
        original=model,
        settings=TrainingSettings(learning_rate=0.1, batch_size=32, schedule="constant", **settings),
        directory=directory,
        label="dgc",
    )
    method.check(session)
    if callbacks:
        session.train([method.callback(session), *callbacks], epochs=method.epochs, **method.settings())
    else:
        method.apply(session)
    return session


def close(one, other, atol):
    for a, b in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, {"momentum": 0.9, "weight_decay": 1e-2}),
        ({"nesterov": True}, {"momentum": 0.9, "weight_decay": 1e-2, "optimizer": "nesterov"}),
        ({"min_dim": 1, "workers": 4}, {"momentum": 0.9, "weight_decay": 0.0}),
        ({"momentum_correction": False, "workers": 2}, {"momentum": 0.9, "weight_decay": 1e-2}),
        ({"momentum_masking": True, "min_dim": 1}, {"momentum": 0.0, "weight_decay": 0.0}),
    ],
)
def test_sending_everything_is_dense_sgd(model, task, fields, settings):
    """Without masking it has the momentum, with masking it has none."""
    fields = {"momentum_masking": False, **fields}
    method = DeepGradientCompression(
        sparsity=0, warmup_epochs=0, epochs=2, weight_decay=settings["weight_decay"], **fields
    )
    ours = trained(method, model, task)
    dense = Session(
        model=copy.deepcopy(model),
        task=task,
        original=model,
        settings=TrainingSettings(learning_rate=0.1, batch_size=32, schedule="constant", **settings),
    )
    dense.train(epochs=2)
    close(ours.model, dense.model, 1e-5)


def test_one_simulated_worker_is_the_ordinary_process(model, task):
    one = trained(DeepGradientCompression(epochs=1, warmup_epochs=0.5, sparsity=0.9), model, task)
    assert one.findings["dgc"]["workers"] == 1
    four = trained(DeepGradientCompression(epochs=1, warmup_epochs=0.5, sparsity=0.9, workers=4), model, task)
    assert four.findings["dgc"]["workers"] == 4
    assert four.findings["dgc"]["messages"] == 4 * one.findings["dgc"]["messages"]


def test_all_traffic_is_counted(model, task):
    method = DeepGradientCompression(epochs=1, warmup_epochs=0, workers=2, min_dim=1, selection="exact")
    found = trained(method, model, task).findings["dgc"]
    sizes = [p.numel() for p in model.parameters()]
    entries = [entries_to_send(size, 0.999) for size in sizes]
    steps = found["messages"] // 2
    assert found["bytes_sent_per_worker"] == steps * sum(4 + 6 * count for count in entries)
    assert found["bytes_dense_per_worker"] == steps * 4 * sum(sizes)
    assert found["entry_ratio_after_warmup"] == pytest.approx(sum(sizes) / sum(entries))
    assert found["compression_ratio"] < found["entry_ratio_after_warmup"]
    warm = trained(DeepGradientCompression(epochs=1, warmup_epochs=0.5, min_dim=1), model, task).findings["dgc"]
    assert warm["compression_ratio"] < warm["compression_ratio_after_warmup"]


class Stop(Callback):
    def epoch_start(self, trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt


def test_a_killed_run_resumes_to_the_same_result(model, task, tmp_path):
    method = DeepGradientCompression(epochs=2, warmup_epochs=1, sparsity=0.95, workers=2, selection="sampled")
    straight = trained(method, model, task)
    with pytest.raises(KeyboardInterrupt):
        trained(method, model, task, [Stop()], directory=tmp_path)
    resumed = trained(method, model, task, [Callback()], directory=tmp_path)
    close(straight.model, resumed.model, 0)
    assert straight.findings == resumed.findings


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({"optimizer": "adam"}, {}, "leave out optimizer"),
        ({}, {"mixed_precision": "fp16"}, "bf16"),
        ({"workers": 64}, {}, "at least 64"),
    ],
)
def test_what_cannot_work_is_refused_before_work(model, task, fields, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        trained(DeepGradientCompression(**fields), model, task, **settings)


SCRIPT = """
import copy, sys
import torch
from safetensors.torch import save_file
from accelerate import Accelerator
from efficientdnns.distributed.deep_gradient_compression import DeepGradientCompression
from efficientdnns.models import build
from efficientdnns.session import Session
from efficientdnns.task import Task
from efficientdnns.training import Callback, TrainingSettings
from pathlib import Path

out = Path(sys.argv[1])
torch.manual_seed(0)
model = build("mlp", hidden=[24])
task = Task.from_name("digits", limit=256)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2

class Stop(Callback):
    def epoch_start(self, trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

def run(name, extra=(), directory=None, **fields):
    method = DeepGradientCompression(epochs=2, **fields)
    settings = TrainingSettings(learning_rate=0.1, batch_size=32, schedule="constant", weight_decay=1e-2)
    session = Session(model=copy.deepcopy(model), task=task, original=model, settings=settings, accelerator=accelerator,
                      directory=directory, label="dgc")
    method.check(session)
    session.train([method.callback(session), *extra], epochs=2, **method.settings())
    state = {key: value.contiguous() for key, value in session.model.state_dict().items()}
    save_file(state, out / f"{name}-{accelerator.process_index}.safetensors")
    return session

session = run("sparse", sparsity=0.95, warmup_epochs=1, clip_norm=0.5, selection="sampled")
(out / f"bytes-{accelerator.process_index}").write_text(str(session.findings["dgc"]["bytes_sent_per_worker"]))
run("dense", sparsity=0, warmup_epochs=0, momentum_masking=False)
try:
    run("none", [Stop()], out / "checkpoints", sparsity=0.95, warmup_epochs=1, clip_norm=0.5, selection="sampled")
except KeyboardInterrupt:
    accelerator.wait_for_everyone()
run("resumed", [Callback()], out / "checkpoints", sparsity=0.95, warmup_epochs=1, clip_norm=0.5, selection="sampled")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two real gloo processes with the DistributedDataParallel hook have trained."""
    out = tmp_path_factory.mktemp("ddp")
    (out / "train.py").write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(out / "train.py"), str(out)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return out


def test_real_processes_agree_bit_for_bit(two_processes):
    for name in ("sparse", "dense", "resumed"):
        first, second = (load_file(two_processes / f"{name}-{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_real_processes_do_what_simulated_workers_do(two_processes, model, task):
    method = DeepGradientCompression(
        epochs=2, sparsity=0.95, warmup_epochs=1, clip_norm=0.5, selection="sampled", workers=2
    )
    simulated = trained(method, model, task, weight_decay=1e-2)
    real = load_file(two_processes / "sparse-0.safetensors")
    for name, parameter in simulated.model.state_dict().items():
        torch.testing.assert_close(parameter, real[name], atol=1e-6, rtol=0)
    sent = [int((two_processes / f"bytes-{rank}").read_text()) for rank in range(2)]
    assert simulated.findings["dgc"]["bytes_sent_per_worker"] == sum(sent) // 2


def test_real_processes_that_send_everything_are_dense_sgd(two_processes, model, task):
    settings = TrainingSettings(learning_rate=0.1, batch_size=32, schedule="constant", weight_decay=1e-2)
    dense = Session(model=copy.deepcopy(model), task=task, original=model, settings=settings)
    dense.train(epochs=2)
    real = load_file(two_processes / "dense-0.safetensors")
    for name, parameter in dense.model.state_dict().items():
        torch.testing.assert_close(parameter, real[name], atol=1e-5, rtol=0)


def test_killed_processes_resume_with_every_workers_memory(two_processes):
    straight, resumed = (load_file(two_processes / f"{name}-0.safetensors") for name in ("sparse", "resumed"))
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
