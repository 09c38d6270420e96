"""Auxiliary classifiers in the middle of a network: small heads on the outputs of layers, trained beside its own loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficientdnns.data.split import Batch
from efficientdnns.parts.tap import evaluating
from efficientdnns.session import Session
from efficientdnns.surgery import ChannelGraph
from efficientdnns.training import Callback, Trainer


class AuxiliaryHead(nn.Module):
    """Logits from a layer's output: batch norm, ReLU, average over positions, linear.

    Args:
        channels: n_p, of the layer.
        classes: number of classes.

    Shape:
        (B, n_p, ...) or, with ``last=True``, (B, ..., n_p) -> (B, classes).
    """

    def __init__(self, channels: int, classes: int, last: bool = False) -> None:
        super().__init__()
        self.last, self.norm, self.linear = last, nn.BatchNorm1d(channels), nn.Linear(channels, classes)

    def features(self, output: Tensor) -> Tensor:
        """(B, n_p): average of the rectified, normalised maps."""
        if output.dim() > 2:
            output = output.flatten(1, -2).transpose(1, 2) if self.last else output.flatten(2)
        x = torch.relu(self.norm(output))
        return x.mean(-1) if x.dim() > 2 else x

    def forward(self, output: Tensor) -> Tensor:
        return self.linear(self.features(output))


def auxiliary_layers(model: nn.Module, graph: ChannelGraph, count: int) -> dict[str, float]:
    """Evenly spread layers that get a classifier, with their relative depth; never the last one."""
    layers = [n for n in graph.order if isinstance(model.get_submodule(n), nn.Linear | nn.modules.conv._ConvNd)]
    count = min(count, len(layers) - 1)
    at = [round((p + 1) * len(layers) / (count + 1)) for p in range(count)]
    return {layers[max(1, place) - 1]: max(1, place) / len(layers) for place in at}


class AuxiliaryTraining(Callback):
    """For every batch a step on the classifiers' losses, then one on the network's own.

    Attributes:
        heads: classifiers by layer.
        depths: weight of each is max(0.01, depth^2).
    """

    def __init__(self, session: Session, depths: Mapping[str, float]) -> None:
        self.session, self.depths = session, dict(depths)
        self.seen: dict[str, Tensor] = {}
        shapes, linear = output_shapes(session, depths)
        classes = session.task.num_classes or 1
        self.heads = {
            name: AuxiliaryHead(shapes[name][-1 if linear[name] else 1], classes, linear[name]).to(session.device)
            for name in depths
        }

    def setup(self, trainer: Trainer) -> None:
        self.handles = [listen(trainer.model, name, self.seen) for name in self.heads]

    def parameter_groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        return [{"params": list(head.parameters())} for head in self.heads.values()]

    def training_step(self, trainer: Trainer, batch: Batch) -> Tensor:
        trainer.forward(batch)
        terms = [
            max(0.01, self.depths[name] ** 2) * trainer.task.loss(head.train()(self.seen[name]), batch.targets)
            for name, head in self.heads.items()
        ]
        if terms:
            trainer.update(torch.stack(terms).sum())
        return trainer.training_step(batch)

    def finish(self, trainer: Trainer) -> None:
        for handle in self.handles:
            handle.remove()
        self.seen.clear()

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(head.state_dict()) for name, head in self.heads.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, head in self.heads.items():
            head.load_state_dict(state[name])


def listen(model: nn.Module, name: str, into: dict[str, Tensor]) -> Any:
    """Keep the output of a module in ``into`` at every call; returns the hook's handle."""

    def keep(_: nn.Module, inputs: Any, output: Tensor) -> None:
        into[name] = output

    return model.get_submodule(name).register_forward_hook(keep)


@torch.no_grad()
def output_shapes(
    session: Session, names: Sequence[str] | Mapping[str, Any]
) -> tuple[dict[str, torch.Size], dict[str, bool]]:
    """Shape of the output of layers, and whether its channels come last (linear layers)."""
    seen: dict[str, Tensor] = {}
    handles = [listen(session.model, name, seen) for name in names]
    with evaluating(session.model):
        session.task.outputs(session.model, session.example_input)
    for handle in handles:
        handle.remove()
    linear = {name: isinstance(session.model.get_submodule(name), nn.Linear) for name in names}
    return {name: output.shape for name, output in seen.items()}, linear
