"""Criteria: how much a weight, or everything that belongs to a channel, matters. The higher the score, the later it goes.

Criteria that look at data average a gradient over training samples (`loss_gradients`); the others need nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from efficientdnns.data.nested import length, to_device
from efficientdnns.errors import ConfigurationError, DataError
from efficientdnns.parts.tap import evaluating
from efficientdnns.session import Session
from efficientdnns.surgery import Group

WeightCriterion = Literal["magnitude", "taylor", "random"]
"""|w|, |g w| with the gradient of the loss, or chance."""
ChannelCriterion = Literal["l1", "l2", "group-norm", "geometric-median", "batch-norm", "taylor", "random"]
"""What scores a channel: see `channel_scores`."""
NEEDS_GRADIENTS = frozenset({"taylor"})
"""Criteria that need labelled training data."""

Reduction = Literal["sum", "mean"]
Normalization = Literal["none", "mean", "max", "top"]


def weight_scores(
    weights: Mapping[str, Tensor],
    criterion: WeightCriterion = "magnitude",
    gradients: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The score of every single weight, in the shape of its tensor.

    Args:
        weights: tensors by name.
        criterion: see `WeightCriterion`.
        gradients: of the loss, by the same names; for 'taylor'.
        generator: of the random numbers; for 'random'.
    """
    if criterion == "random":
        return {n: torch.rand(w.shape, generator=generator).to(w.device) for n, w in weights.items()}
    if criterion == "taylor":
        return {n: (w.detach() * _gradient(gradients, n)).abs() for n, w in weights.items()}
    return {n: w.detach().abs() for n, w in weights.items()}


def channel_scores(
    model: nn.Module,
    groups: Sequence[Group],
    criterion: ChannelCriterion = "l1",
    gradients: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""(size,) scores of the channels of every group, on the CPU.

    ========================  =======================================================================================
    ``l1``, ``l2``            norm of the weights that make the channel (of all layers that write it, where several do)
    ``group-norm``            :math:`\sum_{w \in g} \|w[k]\|_2^2` over all that belongs to it, see `group_importance`
    ``geometric-median``      distance of its weights to those of all other channels of the group, summed
    ``batch-norm``            :math:`|\gamma|`, averaged over the batch norms of the group; ``l1`` where there is none
    ``taylor``                :math:`\sum |g w|` over the weights that make it
    ``random``                chance
    ========================  =======================================================================================
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    if criterion == "random":
        return {group.name: torch.rand(group.size, generator=generator) for group in groups}
    if criterion == "group-norm":
        return {group.name: group_importance(group, parameters).cpu() for group in groups}
    if criterion == "taylor":
        if gradients is None:
            raise ConfigurationError("the criterion 'taylor' needs gradients; give those of loss_gradients")
        products = _Each({n: p for n, p in parameters.items() if n in gradients}, lambda n, p: (p * gradients[n]).abs())
        return {group.name: group.reduce(products).cpu() for group in groups}
    if criterion == "geometric-median":
        vectors = {group.name: unit_rows(group, parameters).double() for group in groups}
        return {name: torch.cdist(rows, rows).sum(1).float().cpu() for name, rows in vectors.items()}
    if criterion == "batch-norm":
        scales = _scales(model, parameters)
        norms = {g.name: g.reduce(scales, ("vector",), "mean").cpu() for g in groups}
        plain = channel_scores(model, [g for g in groups if not norms[g.name].any()], "l1")
        return norms | plain
    if criterion == "l1":
        sizes = _Each(parameters, lambda _, p: p.abs())
        return {group.name: group.reduce(sizes).cpu() for group in groups}
    squares = _Each(parameters, lambda _, p: p.square())
    return {group.name: group.reduce(squares).sqrt().cpu() for group in groups}


class _Each(Mapping[str, Tensor]):
    """What a function makes of each tensor, computed when it is read: in a large network never all at once."""

    def __init__(self, tensors: Mapping[str, Tensor], function: Callable[[str, Tensor], Tensor]) -> None:
        self.tensors, self.function = tensors, function

    def __getitem__(self, name: str) -> Tensor:
        return self.function(name, self.tensors[name])

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def group_importance(
    group: Group, parameters: Mapping[str, Tensor], reduction: Reduction = "sum", normalize: Normalization = "none"
) -> Tensor:
    r"""Importance of the channels of a group: squared norms of all slices that belong to them.

    :math:`I_k = \sum_{w \in g} \|w[k]\|_2^2` over the weights that make channel k, batch-norm scales and the weights
    that read it; biases do not count.

    Args:
        group: the channels.
        parameters: tensors by state-dict name.
        reduction: over the layers of the group, 'sum' or 'mean'.
        normalize: what the scores are divided by: nothing, their mean, their maximum, or ('top') the mean of the upper
            half, which makes groups comparable.
    """
    layers = [_squares(group, index, parameters) for index in range(len(group.members))]
    found = [score for score in layers if score is not None]
    total = torch.stack(found).sum(0) if found else torch.zeros(group.size)
    if reduction == "mean":
        total = total / max(1, len(found))
    scale = {
        "none": total.new_ones(()),
        "mean": total.mean(),
        "max": total.max(),
        "top": total.sort(descending=True).values[: max(1, group.size // 2)].mean(),
    }[normalize]
    return total / scale.clamp_min(1e-30)


def _squares(group: Group, index: int, parameters: Mapping[str, Tensor]) -> Tensor | None:
    member = group.members[index]
    value = parameters.get(member.tensor)
    if value is None or "bias" in member.attribute:
        return None
    rows = value.movedim(member.dim, 0).flatten(1) if value.dim() > 1 else value[:, None]
    return rows.square().sum(1)[member.index.to(rows.device)].sum(1)


def unit_rows(group: Group, values: Mapping[str, Tensor], roles: Sequence[str] = ("out",)) -> Tensor:
    """All entries of the members with these roles that belong to each channel, side by side: (size, entries)."""
    parts = []
    for member in group.members:
        if member.role in roles and member.tensor in values:
            value = values[member.tensor].movedim(member.dim, 0)
            rows = value.reshape(value.shape[0], -1)
            parts.append(rows[member.index.to(rows.device)].flatten(1))
    return torch.cat(parts, 1) if parts else torch.zeros(group.size, 0)


def loss_gradients(
    session: Session, model: nn.Module, samples: int, absolute: bool = False, batch_size: int = 128
) -> dict[str, Tensor]:
    """Gradient of the task's loss in eval mode, averaged over some training samples; the model's own are left alone.

    Args:
        session: gives task and device.
        model: on the session's device.
        samples: training samples drawn with the session's seed, rounded up to whole batches; labels are used.
        absolute: average magnitudes of the batches' gradients instead, so that opposite ones do not cancel.
        batch_size: samples at a time.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    seen = 0
    with evaluating(model), torch.enable_grad():
        for inputs, targets, count in _labelled(session, samples, batch_size):
            loss = session.task.loss(session.task.outputs(model, inputs, targets), targets)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += (gradient.abs() if absolute else gradient) * count
            seen += count
    return {name: value / max(1, seen) for name, value in total.items()}


def _labelled(session: Session, samples: int, batch_size: int) -> Iterator[tuple[Any, Any, int]]:
    train = session.task.train
    if train is None or not train.has_labels:
        raise DataError(
            f"{session.label}: gradients need labelled training data, but task '{session.task.name}' has none"
        )
    seen = 0
    for batch in train.batches(min(batch_size, samples), shuffle=True, seed=session.seed):
        count = length(batch.inputs)
        yield to_device(batch.inputs, session.device), to_device(batch.targets, session.device), count
        seen += count
        if seen >= samples:
            return


def _gradient(gradients: Mapping[str, Tensor] | None, name: str) -> Tensor:
    if gradients is None or name not in gradients:
        raise ConfigurationError(f"the criterion 'taylor' needs gradients of '{name}'; give those of loss_gradients")
    return gradients[name]


def _scales(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|gamma| of every batch norm, by parameter name."""
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return {f"{n}.weight": parameters[f"{n}.weight"].abs() for n in norms if f"{n}.weight" in parameters}
