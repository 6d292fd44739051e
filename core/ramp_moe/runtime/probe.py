"""Tries kernels of third-party plugins in a separate process before a server runs them.

So a kernel that crashes or hangs takes nothing else with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

from ..registry.registry import get_registry
from ..spec.hardware import Hardware
from ..spec.launchable import LaunchableKernel
from ..spec.shapes import MoEShape

SECONDS = 60.0
"""Time limit for one kernel. `ramp-moe check-kernel` takes about half of it if everything must be compiled."""
SECONDS_AGAIN = 25.0
"""A check that takes longer is repeated within this limit. What it compiled is cached by then; what is slow for another
reason would be so whenever a server starts."""
CONFIGS = 2
"""How many configurations are launched."""


def third_party(kernels: Iterable[LaunchableKernel]) -> list[LaunchableKernel]:
    """The kernels that are not the library's own."""
    return [k for k in kernels if k.name in get_registry().third_party]


class Fault(NamedTuple):
    """Why a kernel must not run here. passing: it gave no answer in time, which it may do another day."""

    reason: str
    passing: bool = False


def fault(kernel: str, shape: MoEShape, hardware: Hardware, seconds: float = SECONDS) -> Fault | None:
    """Why a registered kernel must not run in this process; None if it may. `ramp-moe check-kernel` decides.

    A kernel that gives no answer within `seconds` must not run either, nor one that is slow again (SECONDS_AGAIN).
    """
    began = time.monotonic()
    found = _checked(kernel, shape, hardware, seconds)
    if found is None and time.monotonic() - began > SECONDS_AGAIN:
        found = _checked(kernel, shape, hardware, SECONDS_AGAIN)
    return found


def _checked(kernel: str, shape: MoEShape, hardware: Hardware, seconds: float) -> Fault | None:
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
        return Fault(f"gave no answer within {seconds:g} s in a process apart", passing=True)
    try:
        checks = json.loads(printed)["checks"]
        failed = [f"{c['check']}: {c['detail']}" for c in checks if c["result"] == "failed"]
    except (ValueError, KeyError, TypeError):
        lines = (errors or printed).strip().splitlines()
        failed = [f"cannot be checked ({lines[-1] if lines else f'exit code {child.returncode}'})"]
    return Fault(" ".join("; ".join(failed).split())) if failed else None
