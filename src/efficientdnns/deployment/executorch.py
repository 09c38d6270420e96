"""ExecuTorch programs (``model.pte``) for phones and boards, lowered to XNNPACK's kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils._pytree import tree_leaves

from efficientdnns.deployment.extras import need
from efficientdnns.deployment.files import first_line, opening, replacing
from efficientdnns.deployment.graph import Graph, quiet, unflatten
from efficientdnns.errors import ModelError

_PLACES = "efficientdnns_outputs"


def write_graph(graph: Graph, path: Path, calibration: Any = ()) -> None:
    """Write a traced network. What XNNPACK has no kernel for runs in ExecuTorch's own.

    Raises:
        ConfigurationError: executorch is not installed. ModelError: it cannot be lowered.
    """
    need("executorch", "executorch")
    try:
        with quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            # Methods without inputs that return a constant: the file's own place for such notes.
            notes = {_PLACES: json.dumps(graph.places)}
            lowered = to_edge_transform_and_lower(
                graph.program, partitioner=[XnnpackPartitioner()], constant_methods=notes
            )
            buffer = lowered.to_executorch().buffer
    except Exception as error:
        raise ModelError(f"ExecuTorch cannot lower this network: {first_line(error)}") from error
    with replacing(path) as partial:
        partial.write_bytes(buffer)


class ExecutorchNetwork:
    """An opened program in ExecuTorch's runtime."""

    runtime = "executorch"

    def __init__(self, path: Path) -> None:
        need("executorch", "executorch")
        with opening(path, "a .pte file", "ExecuTorch"), quiet():
            from executorch.runtime import Runtime

            self.program = Runtime.get().load_program(path)
            self.method = self.program.load_method("forward")
            notes = self.program.load_method(_PLACES).execute([])
        self.places = [tuple(place) for place in json.loads(notes[0])]

    def __call__(self, inputs: Any) -> Any:
        """The outputs: a tensor, or tuples and named outputs of them."""
        found = self.method.execute([leaf.contiguous() for leaf in tree_leaves(inputs)])
        return unflatten(self.places, [tensor.clone() for tensor in found])


def open_file(path: Path, threads: int | None = None) -> ExecutorchNetwork:
    """Open the program; ExecuTorch chooses its threads.

    Raises:
        ConfigurationError: executorch is not installed. FileFormatError: no such file, or one it cannot open.
    """
    return ExecutorchNetwork(path)
