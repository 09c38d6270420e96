"""``model.pt2``: the traced graph as ``torch.export`` keeps it; PyTorch runs it without the classes of the network.

What ``torch.export.save`` writes is slimmed and holds no pickle: no example inputs, no call stacks (with the paths of the
machine that wrote it), the description of the graph deflated.
"""

from __future__ import annotations

import operator
import zipfile
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from efficientdnns.deployment.files import first_line, opening, replacing
from efficientdnns.deployment.graph import Graph, Tracing, arguments, quiet, trace
from efficientdnns.errors import ModelError

_EMPTY = torch.fx.Graph()
_KEPT = ("val", "tensor_meta")
"""What a node must remember to be written; the rest says where it came from."""


def write_pt2(model: nn.Module, example_input: Any, path: Path, **tracing: Unpack[Tracing]) -> Path:
    """Write ``model`` with ``torch.export``, atomically.

    Args: ``example_input`` and ``tracing`` (``dynamic_batch``, ``batch``, ``forward``) as `trace` takes them.

    Raises:
        ModelError: the network cannot be traced or written.
    """
    write_graph(trace(model, example_input, **tracing), Path(path))
    return Path(path)


def write_graph(graph: Graph, path: Path, calibration: Any = ()) -> None:
    """Write a traced network, without its example inputs and the origins of its nodes."""
    program = graph.program
    nodes = [node for module in program.graph_module.modules() for node in getattr(module, "graph", _EMPTY).nodes]
    notes, example = [node.meta for node in nodes], program.example_inputs
    with replacing(path) as partial:
        try:
            for node in nodes:
                node.meta = {key: value for key, value in node.meta.items() if key in _KEPT}
            program.example_inputs = None
            with quiet():
                torch.export.save(program, partial)
        except Exception as error:
            raise ModelError(f"torch.export cannot write this network: {first_line(error)}") from error
        finally:
            program.example_inputs = example
            for node, note in zip(nodes, notes):
                node.meta = note
        _deflate(partial)


def open_pt2(path: Path, threads: int | None = None) -> nn.Module:
    """Open a ``.pt2`` file as a module; what it computes from constants alone (weights that are decoded) is computed now.

    ``threads`` is there for likeness with the other formats; PyTorch's setting holds for all networks.

    Raises:
        FileFormatError: no such file, or one that PyTorch cannot open.
    """
    return Pt2Network(Path(path))


open_file = open_pt2


class Pt2Network(nn.Module):
    """An opened ``.pt2`` file, called with inputs as the task has them."""

    runtime = "pytorch-export"

    def __init__(self, path: Path, fold: bool = True) -> None:
        super().__init__()
        with opening(path, "a .pt2 file", "PyTorch"), quiet():
            _know_operations(path)
            program = torch.export.load(path)
            self.graph = folded(program.module()) if fold else program.module()

    def forward(self, inputs: Any) -> Any:
        """See the class."""
        positional, named = arguments(inputs)
        return self.graph(*positional, **named)

    def train(self, mode: bool = True) -> Pt2Network:
        """Nothing: the mode was built in when it was traced."""
        return self


@torch.no_grad()
def folded(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """``graph`` (in place) with everything that follows from its weights alone computed: coded weights are decoded."""
    known: dict[torch.fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            known[node] = operator.attrgetter(node.target)(graph)
        elif node.op == "call_function" and not node.is_impure() and all(n in known for n in node.all_input_nodes):
            arguments, named = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*arguments, **named)
    for number, node in enumerate(list(known)):
        if node.op == "get_attr" or not isinstance(known[node], Tensor) or all(user in known for user in node.users):
            continue
        graph.register_buffer(f"folded_{number}", known[node])
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(f"folded_{number}"))
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _know_operations(path: Path) -> None:
    """Load torchvision where the graph has operations of it (a detector's), so that PyTorch knows them."""
    with zipfile.ZipFile(path) as archive:
        if any(b"torchvision." in archive.read(name) for name in archive.namelist() if name.endswith(".json")):
            import torchvision  # noqa: F401


def _deflate(path: Path) -> None:
    small = path.with_name(path.name + ".small")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(small, "w") as new:
        for entry in old.infolist():
            method = zipfile.ZIP_DEFLATED if entry.filename.endswith(".json") else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(entry.filename), old.read(entry), method)
    small.replace(path)
