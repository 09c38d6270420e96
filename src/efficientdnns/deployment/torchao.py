"""int8 in PyTorch: weights and activations quantized by torchao (PT2E), written as a ``.pt2`` file.

torchao keeps the float weights beside the integers that replace them, and ``torch.export`` writes both: a file larger than
the float one. Here what no operation reads is dropped first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efficientdnns.deployment import pt2
from efficientdnns.deployment.extras import need
from efficientdnns.deployment.files import first_line
from efficientdnns.deployment.graph import Graph, arguments, quiet, shapes_of
from efficientdnns.errors import ConfigurationError, ModelError

BATCHES = 16
"""Batches that the ranges of activations are taken from."""


def write_graph(graph: Graph, path: Path, calibration: Iterable[Any] = ()) -> None:
    """Quantize a traced network with the ranges of ``calibration`` (batches of inputs) and write it.

    Weights are int8 with a scale per channel, activations uint8 with one scale and zero point, as the x86 kernels behind
    ``torch.compile`` want them. The file is opened with ``open_file``, or with ``torch.export.load`` after
    ``import torchao.quantization.pt2e``.

    Raises:
        ConfigurationError: torchao is not installed, or there is no calibration data. ModelError: it cannot be quantized.
    """
    need("torchao", "torchao")
    batches = list(islice(calibration, BATCHES))
    if not batches:
        raise ConfigurationError("format torchao measures the ranges of activations; give a task with calibration data")
    try:
        with quiet(), torch.no_grad():
            network = _quantized(graph, batches)
            positional, named = arguments(graph.example)
            shapes = shapes_of(graph.example) if graph.dynamic_batch else None
            program = torch.export.export(network, positional, named, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ModelError(f"torchao cannot quantize this network: {first_line(error)}") from error
    pt2.write_graph(dataclasses.replace(graph, program=program), path)


def open_file(path: Path, threads: int | None = None) -> nn.Module:
    """Open the file as a module.

    Raises:
        ConfigurationError: torchao is not installed. FileFormatError: no such file, or one that PyTorch cannot open.
    """
    need("torchao", "torchao")
    with quiet():
        import torchao.quantization.pt2e  # noqa: F401  (registers the operations)
    return pt2.Pt2Network(path, fold=False)


def _quantized(graph: Graph, batches: list[Any]) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(graph.program.module(check_guards=False), quantizer)
    for batch in batches:
        positional, named = arguments(batch)
        prepared(*positional, **named)
    converted = convert_pt2e(prepared)
    _drop_unread(converted)
    return converted


def _drop_unread(network: torch.fx.GraphModule) -> None:
    """Remove parameters and buffers that no node reads: the float weights, most of all."""
    read = {node.target for node in network.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*network.named_parameters(), *network.named_buffers()) if name not in read]:
        owner, _, last = name.rpartition(".")
        delattr(network.get_submodule(owner), last)
