"""OpenVINO's files: ``model.xml`` with ``model.bin``, read from the ONNX file and written without further changes.

OpenVINO's converter would compute decoded weights once and for all, and round them to float16; here coded weights stay
coded in the file and are decoded when it is compiled.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from efficientdnns.deployment import onnx
from efficientdnns.deployment.extras import need
from efficientdnns.deployment.files import first_line, opening, replacing
from efficientdnns.deployment.graph import Graph, Path_, unflatten
from efficientdnns.errors import ModelError

_OUTPUTS = ["efficientdnns", "outputs"]


def write_graph(graph: Graph, path: Path, calibration: Any = ()) -> None:
    """Write a traced network; see the module.

    Raises:
        ConfigurationError: openvino, onnx or onnxscript is not installed. ModelError: it cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        onnx.write_graph(graph, Path(folder) / "model.onnx")
        from_onnx(Path(folder) / "model.onnx", path, graph.places)


def from_onnx(source: Path, path: Path, places: Sequence[Path_]) -> None:
    """Turn an ONNX file into OpenVINO's form."""
    need("openvino", "openvino")
    import openvino

    with replacing(path) as partial:
        try:
            model = openvino.Core().read_model(source)
            model.set_rt_info(json.dumps(places), _OUTPUTS)
            openvino.save_model(model, partial, compress_to_fp16=False)
        except Exception as error:
            raise ModelError(f"OpenVINO cannot read this network: {first_line(error)}") from error


class OpenvinoNetwork:
    """An opened file on the CPU, in float32 where it was."""

    runtime = "openvino"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        need("openvino", "openvino")
        import openvino

        options = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        with opening(path, "OpenVINO's .xml file", "OpenVINO"):
            model = openvino.Core().read_model(path)
            self.places = [tuple(place) for place in json.loads(model.get_rt_info(_OUTPUTS).astype(str))]
            self.inputs = [value.any_name for value in model.inputs]
            self.compiled = openvino.compile_model(model, "CPU", options)

    def __call__(self, inputs: Any) -> Any:
        """The outputs: a tensor, or tuples and named outputs of them."""
        found = self.compiled(onnx.feed(self.inputs, inputs))
        return unflatten(self.places, [torch.from_numpy(found[i].copy()) for i in range(len(self.places))])


def open_file(path: Path, threads: int | None = None) -> OpenvinoNetwork:
    """Open the file with OpenVINO.

    Raises:
        ConfigurationError: openvino is not installed. FileFormatError: no such file, or one it cannot open.
    """
    return OpenvinoNetwork(path, threads)
