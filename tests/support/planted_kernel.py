"""A third-party plugin whose kernel goes wrong as the variable PLANTED says: it raises, returns NaN or spins."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plain_kernel import Plain
from ramp_moe.plugin import Batch, KernelConfig, Workspace, hookimpl
from torch import Tensor

SPINS = 30.0
"""Seconds, at the first launch of a process."""


class Planted(Plain):
    name = "planted"
    spun = False

    def run(
        self, config: KernelConfig, prepared: Any, batch: Batch, out: Tensor, workspace: Workspace
    ) -> Iterator[None]:
        how = os.environ.get("PLANTED", "")
        if how == "raises":
            raise RuntimeError("planted")
        if how == "spins" and not Planted.spun:
            Planted.spun = True
            time.sleep(SPINS)
        yield from super().run(config, prepared, batch, out, workspace)
        if how == "NaN":
            out.fill_(float("nan"))


@hookimpl
def ramp_moe_kernels() -> list[Planted]:
    return [Planted()]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Install the plugin for processes that are started from now on."""
    info = folder / "planted-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[ramp_moe]\nplanted = planted_kernel\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, sys.path)]))
    monkeypatch.setenv("PLANTED", how)
