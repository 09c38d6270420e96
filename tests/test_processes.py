"""The same recipe in two processes (as `torchrun` or `accelerate launch` start them): they train one network, one writes it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import torch

import efficientdnns as ed

RECIPE = """\
model: lenet-300-100
task: {name: digits, limit: 300, evaluation_limit: 100}
training: {batch_size: 32, learning_rate: 0.1}
methods:
  - fit: {epochs: 8}
  - nisp: {pruning_ratio: 0.4, epochs: 1}
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_processes_train_one_network(tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    run = ["-m", "efficientdnns", "run", str(recipe), "--out", str(tmp_path / "out"), "--quiet", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*launch, *run], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["environment"]["processes"] == 2
    assert report["after"]["params"] < 0.7 * report["before"]["params"]
    assert report["history"][7]["loss"] < 0.7 * report["history"][0]["loss"]
    assert ed.load(tmp_path / "out")(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
