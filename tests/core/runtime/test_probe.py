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
from tiers import slow_except

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


@pytest.mark.parametrize("case", slow_except(PRINTED.keys() - {"spins"}, PRINTED))
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


GOOD = '{"checks": [{"check": "a", "result": "passed", "detail": ""}]}'
BAD = '{"checks": [{"check": "a", "result": "failed", "detail": "NaN"}]}'


@pytest.mark.parametrize(
    ("took", "printed", "runs", "reason"),
    [
        ([10], GOOD, 1, None),
        ([40, 10], GOOD, 2, None),  # it compiled
        ([40, 40], GOOD, 2, "gave no answer within 25 s in a process apart"),  # it spins whenever it is warmed up
        ([100], GOOD, 1, "gave no answer within 60 s in a process apart"),
        ([40], BAD, 1, "a: NaN"),
    ],
)
def test_what_is_slow_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, h200: Hardware, took: list[float], printed: str, runs: int, reason: str | None
) -> None:
    clock, started = [0.0], list[Any]()

    class Child:
        pid, returncode = 0, 0

        def __init__(self, *_: Any, **__: Any) -> None:
            self.left = took[len(started)]
            started.append(self)

        def communicate(self, timeout: float | None = None) -> tuple[str, str]:
            spent = self.left if timeout is None else min(self.left, timeout)
            clock[0] += spent
            self.left -= spent
            if self.left:
                raise subprocess.TimeoutExpired("check-kernel", timeout or 0)
            return printed, ""

    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setattr(probe.os, "killpg", lambda *_: None)
    monkeypatch.setattr(probe.time, "monotonic", lambda: clock[0])
    found = probe.fault("strange", SHAPE, h200)
    assert (None if found is None else found.reason) == reason
    assert len(started) == runs


def test_the_librarys_own_kernels_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange(TritonMoE):
        name = "strange"

    strange = Strange()
    monkeypatch.setattr(get_registry(), "third_party", {"strange"})
    assert probe.third_party([TritonMoE(), strange]) == [strange]
