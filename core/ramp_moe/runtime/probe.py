"""Kernels of third-party plugins are tried in a process apart before a server runs them.

One that crashes or hangs takes nothing else with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable

from ..registry.registry import get_registry
from ..spec.hardware import Hardware
from ..spec.launchable import LaunchableKernel
from ..spec.shapes import MoEShape

SECONDS = 60.0
"""For one kernel: `ramp-moe check-kernel` takes about half of that where everything must be compiled."""
CONFIGS = 2
"""How many configurations are launched."""


def third_party(kernels: Iterable[LaunchableKernel]) -> list[LaunchableKernel]:
    """Those that are not the library's own."""
    return [k for k in kernels if k.name in get_registry().third_party]


def fault(kernel: str, shape: MoEShape, hardware: Hardware, seconds: float = SECONDS) -> str | None:
    """Why a registered kernel must not run in this process, as `ramp-moe check-kernel` finds it; None if it may.

    It has failed if it gives no answer within `seconds`.
    """
    told = ("--model", shape.slug, "--device", hardware.name, "--configs", str(CONFIGS), "--json")
    child = subprocess.Popen(
        [sys.executable, "-m", "ramp_moe.cli", "check-kernel", kernel, *told],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        printed, errors = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # its own children, too
        child.communicate()
        return f"gave no answer within {seconds:g} s in a process apart"
    try:
        checks = json.loads(printed)["checks"]
        failed = [f"{c['check']}: {c['detail']}" for c in checks if c["result"] == "failed"]
    except (ValueError, KeyError, TypeError):
        lines = (errors or printed).strip().splitlines()
        failed = [f"cannot be checked ({lines[-1] if lines else f'exit code {child.returncode}'})"]
    return " ".join("; ".join(failed).split()) or None
