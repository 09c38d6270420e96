"""What methods that zero single weights share: how many weights a budget of parameters or bytes leaves, what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from efficientdnns.budget import Plan, most
from efficientdnns.measurement.macs import count_macs
from efficientdnns.measurement.size import nonzero_parameters
from efficientdnns.parts.budgets import costs, meet, targets_of

if TYPE_CHECKING:
    from efficientdnns.method import Method
    from efficientdnns.session import Session


AIM = {"bytes": 1.015}
"""Share of a limit of bytes that is aimed at before training; what is over the limit afterwards is trimmed."""


@torch.no_grad()
def sparse_macs(model: nn.Module, example_input: Any, forward: Any = None) -> int:
    """Multiply-accumulates of one sample that have a non-zero weight: theoretical, for dense kernels skip none of them.

    For a convolution this is the number of its non-zero weights times the output positions.
    """
    total = 0.0
    for name, macs in count_macs(model, example_input, forward).by_module.items():
        weights = [p for p in model.get_submodule(name).parameters(recurse=False) if p.dim() > 1]
        size = sum(p.numel() for p in weights)
        total += macs * (sum(int(p.count_nonzero()) for p in weights) / size if size else 1.0)
    return round(total)


def coded_size(kept: int, total: int, bits: float = 32) -> float:
    r"""Bytes that ``kept`` of ``total`` weights need with their positions: :math:`(k b + n H_2(k / n)) / 8`."""
    share = kept / total
    entropy = 0.0 if share in (0, 1) else -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    return (kept * bits + total * entropy) / 8


def kept_weights(
    session: Session, method: Method, build: Callable[[int], nn.Module], least: int, total: int, bits: float = 32
) -> int:
    """The most of ``total`` weights that can stay within the budget.

    Args:
        session: the run.
        method: whose limits (params, bytes).
        build: the network with that many weights; more weights contain fewer.
        least: weights that stay in any case.
        total: all that may go.
        bits: of a coded weight.

    Raises:
        BudgetError: ``least`` weights are too many.
    """
    others = nonzero_parameters(session.model)

    def estimate(plan: Plan) -> dict[str, float]:
        return {"params": others + plan["kept"], "bytes": coded_size(plan["kept"], total, bits)}

    plan = meet(
        session,
        method,
        propose=most(least, total),
        estimate=estimate,
        build=lambda plan: build(plan["kept"]),
        least={"kept": least},
        full={"kept": total},
        margins=AIM,
    )
    return plan["kept"]


@torch.no_grad()
def trim(
    session: Session,
    method: Method,
    model: nn.Module,
    names: Iterable[str],
    measure: Callable[[nn.Module], float] | None = None,
) -> int:
    """Zero the smallest of the named weights, by magnitude over the mean of their tensor, until the file is within the bytes.

    Training changes how well what stays can be coded. ``measure`` gives the bytes, by default as `costs` does. Returns
    the number of weights that went.
    """
    measure = measure or (lambda model: costs(session, model, ["bytes"])["bytes"])
    target = targets_of(session, method).get("bytes")
    parameters = [model.get_parameter(name) for name in names]
    sizes = [(p.abs() / p[p != 0].abs().mean()).flatten().cpu() for p in parameters if p.count_nonzero()]
    parameters = [p for p in parameters if p.count_nonzero()]
    everything = torch.cat([*sizes, torch.zeros(0)])
    order = torch.argsort(everything, stable=True)[int((everything == 0).sum()) :]
    gone = 0
    while target is not None and gone < len(order) - 1 and (over := measure(model) - target) > 0:
        gone = min(len(order) - 1, gone + max(1, math.ceil(over / 4)))
        stays = torch.ones(len(everything), dtype=torch.bool)
        stays[order[:gone]] = False
        for parameter, mask in zip(parameters, stays.split([p.numel() for p in parameters])):
            parameter[~mask.view_as(parameter).to(parameter.device)] = 0
    return gone
