"""Files that run without this library: ``torch.export``, ONNX, torchao, OpenVINO and ExecuTorch.

`export` writes one, opens it again, compares it with the network and says what came out.
"""

from efficientdnns.deployment.check import check_result
from efficientdnns.deployment.export import DEFAULT, FORMATS, Exported, export, export_all
from efficientdnns.deployment.onnx import open_onnx, write_onnx
from efficientdnns.deployment.pt2 import open_pt2, write_pt2

__all__ = [
    "DEFAULT",
    "FORMATS",
    "Exported",
    "check_result",
    "export",
    "export_all",
    "open_onnx",
    "open_pt2",
    "write_onnx",
    "write_pt2",
]
