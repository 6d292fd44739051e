"""Third-party kernels are tried in a process apart."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from ramp_moe import Hardware, MoEShape
from ramp_moe.registry.registry import get_registry
from ramp_moe.runtime import probe
from ramp_moe_kernels.triton.kernel import TritonMoE

SHAPE = MoEShape(16, 2, 256, 128, "bf16")
PRINTED = {
    "answers": ('print(\'{"checks": [{"check": "a", "result": "passed", "detail": ""}]}\')', None),
    "fails": (
        'print(\'{"checks": [{"check": "output", "result": "failed", "detail": "NaN"}]}\')',
        "output: NaN",
    ),
    "crashes": ("import os; os.abort()", "cannot be checked"),
    "raises": ("raise SystemExit('no such kernel')", "cannot be checked (no such kernel)"),
    "spins": ("import time\nwhile True: time.sleep(1)", "gave no answer within 3 s in a process apart"),
}


@pytest.mark.parametrize("case", PRINTED)
def test_whatever_the_child_does(case: str, monkeypatch: pytest.MonkeyPatch, h200: Hardware) -> None:
    code, said = PRINTED[case]
    real, commands = subprocess.Popen, []

    def popen(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return real([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    found = probe.fault("strange", SHAPE, h200, 3 if case == "spins" else 60)
    assert (found is None) if said is None else (found is not None and found.reason.startswith(said))
    assert found is None or found.passing == (case == "spins"), "what is slow today may answer tomorrow"
    ((_, *command),) = commands
    assert command[:4] == ["-m", "ramp_moe.cli", "check-kernel", "strange"]
    assert SHAPE.slug in command


def test_the_librarys_own_kernels_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange(TritonMoE):
        name = "strange"

    strange = Strange()
    monkeypatch.setattr(get_registry(), "third_party", {"strange"})
    assert probe.third_party([TritonMoE(), strange]) == [strange]
