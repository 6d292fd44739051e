"""`import ramp_moe` is light: no GPU library, and quick enough for a command line."""

from __future__ import annotations

import subprocess
import sys


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_imports_no_gpu_library() -> None:
    heavy = "{'torch', 'triton', 'cutlass', 'cuda', 'flashinfer', 'deep_gemm', 'matplotlib', 'rich', 'click'}"
    code = f"import sys, ramp_moe; ramp_moe.get_registry(); print(sorted({heavy} & set(sys.modules)))"
    assert _run(code) == "[]"


def test_public_names_exist() -> None:
    import ramp_moe

    assert all(hasattr(ramp_moe, name) for name in ramp_moe.__all__)
