"""ONNX Runtime's exact kernels are asked for where the fast ones clip."""

from __future__ import annotations

import onnxruntime
import pytest

from efficientdnns.deployment import processor
from efficientdnns.deployment.processor import compute_exactly, lacks_vnni

X86 = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu sse4_2 avx2 {}\nbugs\t\t: avx512_vnni_of_old\n"


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        (X86.format("avx512f"), True),
        (X86.format("avx512f avx512_vnni"), False),
        (X86.format("avx_vnni fma"), False),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", False),
        ("", False),
    ],
)
def test_processors_without_vnni_are_known_by_their_flags(text, lacks, tmp_path, monkeypatch) -> None:
    assert lacks_vnni(text) is lacks
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert not lacks_vnni(), "nothing is known without the file"
    (tmp_path / "cpuinfo").write_text(text)
    options = onnxruntime.SessionOptions()
    compute_exactly(options)
    if lacks:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError, match="x64quantprecision"):
            options.get_session_config_entry("session.x64quantprecision")


def test_the_report_says_so(trained, digits, tmp_path, monkeypatch) -> None:
    import efficientdnns as ed

    (tmp_path / "cpuinfo").write_text(X86.format("avx512f"))
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    result = ed.compress(trained, digits, [ed.Int8Quantization()], quiet=True, latency=False)
    result.save(tmp_path / "out", exports=("onnx",))
    assert "session.x64quantprecision = 1" in result.exports[0].note
