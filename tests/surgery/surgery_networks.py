"""Small networks of the shapes that surgery has to get right, and the exactness check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientdnns.surgery import ChannelGraph, remove, zero_contributions
from efficientdnns.surgery.reference import reference_outputs


class LeNet5(nn.Module):
    def __init__(self, hard_coded: bool = False) -> None:
        super().__init__()
        self.hard_coded = hard_coded
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 30), nn.Linear(30, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        x = x.view(-1, 400) if self.hard_coded else x.view(x.size(0), -1)
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2
        self.project: nn.Module | None = None
        if self.pad and option == "B":
            self.project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.project is not None:
            x = self.project(x)
        elif self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return (x + y).relu()


class ResNet(nn.Module):
    def __init__(self, option: str = "A") -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(
            Block(8, 8, 1, option), Block(8, 16, 2, option), Block(16, 16, 1, option), Block(16, 32, 2, option)
        )
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.bn1(self.conv1(x)).relu())
        return self.fc(F.avg_pool2d(x, x.size(3)).view(x.size(0), -1))


class CharModel(nn.Module):
    def __init__(self, cell: type[nn.RNNBase] = nn.LSTM, layers: int = 2, both: bool = False, tied: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.rnn = cell(8, 8, layers, batch_first=True, bidirectional=both)
        self.head = nn.Linear(16 if both else 8, 20)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


def function_module(forward: Any, **modules: nn.Module) -> nn.Module:
    """A module with these children and this forward."""
    module = type("Net", (nn.Module,), {"forward": forward})()
    for name, child in modules.items():
        module.add_module(name, child)
    return module


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64, eval mode, batch norms with statistics that matter."""
    torch.manual_seed(seed)
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
    return model


def random_selection(graph: ChannelGraph, share: float = 0.4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        g.name: torch.randperm(g.size, generator=generator)[: max(1, int(g.size * share))]
        for g in graph.groups
        if g.size > 1
    }


def check_exact(model: nn.Module, x: Tensor) -> tuple[ChannelGraph, nn.Module]:
    """Remove channels at random from every group; outputs must equal those with their contributions zeroed."""
    randomise(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = ChannelGraph.trace(model, x)
    selection = random_selection(graph)
    assert selection
    smaller = remove(model, x, selection, graph, verify=False)
    with torch.no_grad():
        got, original = smaller(x), model(x)
        if graph.exported is None:
            expected = zero_contributions(model, selection, graph)(x)
        else:
            expected = reference_outputs(model, selection, graph, (x,))[0]
    assert (expected - got).abs().max() < 1e-9
    assert (expected - original).abs().max() > 1e-6, "the removed channels did not matter: this says nothing"
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return graph, smaller
