"""What every method that removes channels must satisfy on networks that are not its paper's: residual, depthwise, attention."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import efficientdnns as ed
from efficientdnns.deployment import check_result
from efficientdnns.models import build
from efficientdnns.task import Task

KINDS = ("residual", "depthwise", "attention")
METHODS = [
    m for m in (*ed.methods("pruning"), ed.PruneChannels) if "macs" in m.budgets and not issubclass(m, ed.ADMMPruning)
]
"""All but ADMM's columns of a matrix, which are not channels."""


class DepthwiseNet(nn.Module):
    """An inverted residual as in MobileNet: 1x1, depthwise 3x3, squeeze-excite, 1x1, and the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6()
        )
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head((x + self.project(y)).mean((2, 3)))


class AttentionNet(nn.Module):
    """A small vision transformer: patches, class token, position table, two heads, layer norms, an MLP."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norm1(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "residual":
        return build("small-resnet", in_channels=1)
    return DepthwiseNet() if kind == "depthwise" else AttentionNet()


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.from_name("digits", limit=160, evaluation_limit=60)


@pytest.fixture(scope="module")
def networks(task) -> dict[str, nn.Module]:
    """One of each, trained for a moment so that weights and statistics are not those of the start."""
    made = {kind: make(kind) for kind in KINDS}
    for model in made.values():
        ed.fit(model, task, epochs=1, quiet=True, learning_rate=0.05, batch_size=32)
    return made


def ident(method: type[ed.Method]) -> str:
    return method.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS, ids=ident)
def test_meets_a_budget_on_any_network(method, kind, networks, task, tmp_path) -> None:
    model = copy.deepcopy(networks[kind])
    fields = dict(method.contract_fields)
    if method is ed.SoftFilterPruning and kind == "attention":
        fields["linear"] = ("mlp.0",)  # its one convolution is too little
    if "epochs" in method.model_fields and fields.get("epochs", 0):
        fields["epochs"] = 1
    result = ed.compress(model, task, [method(**fields)], budget="macs=0.7", quiet=True, latency=False)
    assert result.budget[0].met, result.budget
    assert result.after.macs < result.before.macs
    assert result.after.params < result.before.params, "channels are removed, not masked"
    # The small networks are alike whoever cut them: each kind's files are checked for every third method.
    if KINDS[METHODS.index(method) % len(KINDS)] == kind:
        result.save(tmp_path)
        check_result(tmp_path, inputs=next(iter(task.evaluation.batches(5))).inputs, model=make(kind))
