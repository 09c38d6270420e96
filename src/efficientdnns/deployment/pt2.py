"""``model.pt2``: the traced graph as ``torch.export`` keeps it; PyTorch runs it without the classes of the network.

What ``torch.export.save`` writes is slimmed and holds no pickle: no example inputs, no call stacks (with the paths of the
machine that wrote it), the description of the graph deflated.
"""

from __future__ import annotations

import operator
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efficientdnns.deployment.files import replacing
from efficientdnns.deployment.graph import Graph, arguments, first_line, quiet, trace
from efficientdnns.errors import FileFormatError, ModelError
from efficientdnns.measurement.inference import Forward

_EMPTY = torch.fx.Graph()
_KEPT = ("val", "tensor_meta")
"""What a node must remember to be written; the rest says where it came from."""


def write_pt2(
    model: nn.Module,
    example_input: Any,
    path: Path,
    *,
    dynamic_batch: bool = True,
    batch: int | None = None,
    forward: Forward | None = None,
) -> Path:
    """Write ``model`` with ``torch.export``, atomically. The arguments are those of `write_onnx`.

    Raises:
        ModelError: the network cannot be traced or written.
    """
    graph = trace(model, example_input, dynamic_batch=dynamic_batch, batch=batch, forward=forward)
    write_graph(graph, Path(path))
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


def open_file(path: Path, threads: int | None = None) -> nn.Module:
    """See `open_pt2`."""
    return Pt2Network(path)


def open_pt2(path: Path, threads: int | None = None) -> nn.Module:
    """Open a ``.pt2`` file as a module; what it computes from constants alone (weights that are decoded) is computed now.

    ``threads`` is there for likeness with the other formats; PyTorch's setting holds for all networks.

    Raises:
        FileFormatError: no such file, or one that PyTorch cannot open.
    """
    return Pt2Network(Path(path))


class Pt2Network(nn.Module):
    """An opened ``.pt2`` file, called with inputs as the task has them."""

    runtime = "pytorch-export"

    def __init__(self, path: Path, fold: bool = True) -> None:
        super().__init__()
        if not path.is_file():
            raise FileFormatError(f"{path} is no file; give a .pt2 file")
        try:
            with quiet():
                program = torch.export.load(path)
                self.graph = folded(program.module()) if fold else program.module()
        except Exception as error:
            raise FileFormatError(f"PyTorch cannot open {path}: {first_line(error)}") from error

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


def _deflate(path: Path) -> None:
    small = path.with_name(path.name + ".small")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(small, "w") as new:
        for entry in old.infolist():
            method = zipfile.ZIP_DEFLATED if entry.filename.endswith(".json") else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(entry.filename), old.read(entry), method)
    small.replace(path)
