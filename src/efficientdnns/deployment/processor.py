"""Processors on which ONNX Runtime's fast integer kernels are not exact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
VNNI = {"avx512_vnni", "avx_vnni"}
"""Flags of processors that add products of 8-bit integers in 32 bits."""
NOTE = "this processor has no VNNI: opened with session.x64quantprecision = 1, without which sums may be clipped to 16 bits"


def lacks_vnni(cpuinfo: str | None = None) -> bool:
    """Whether this is an x86 processor without VNNI, as far as Linux tells; False where it cannot be known.

    Args:
        cpuinfo: the text of ``/proc/cpuinfo``, by default this machine's.
    """
    if cpuinfo is None:
        cpuinfo = CPUINFO.read_text() if CPUINFO.is_file() else ""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)  # an ARM processor has "Features"
    return flags is not None and VNNI.isdisjoint(flags[1].split())


def compute_exactly(options: Any) -> None:
    """Let an ONNX Runtime session multiply uint8 by int8 without clipping sums of two products to 16 bits.

    Only x86 processors without VNNI do that, and only there is the option set: the exact kernels are slower.
    """
    if lacks_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
