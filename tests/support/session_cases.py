"""Checks and readers of logs for tests of a profiling run over simulated kernels."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ramp_moe import ProfileError, Sweep
from ramp_moe.dispatch.profile_store import relative_path
from ramp_moe.measurements.sweep import path_key
from ramp_moe.profiler.journal import journal_path
from ramp_moe.profiler.plan import PlannedBatch
from ramp_moe.profiler.session import FIRST_ROWS
from ramp_moe.spec.kernel import KernelConfig
from simulated_bench import BATCHES, HARDWARE, SHAPE, Call, Simulated

NAMES = ["bm16-a", "bm16-b", "bm16-slow", "bm64-a", "bm64-b", "bm64-slow"]
LOST = "on none of 8 spread batches among the kernel's 24 fastest within 1.15x of its best"
LOST_LATER = "on none of 16 spread batches among the kernel's 8 fastest within 1.05x of its best"


in_process = pytest.mark.usefixtures("here")


def place(call: Call, kernel: str = "sim") -> Path:
    return call.settings.folder / relative_path(kernel, SHAPE, HARDWARE)


def journal(call: Call) -> Path:
    return journal_path(call.settings.folder, SHAPE, HARDWARE)


def script(call: Call, acts: dict[str, str] | None = None, **changes: Any) -> Call:
    return replace(call, script=replace(call.script, acts=acts or {}, **changes))


def setting(call: Call, **changes: Any) -> Call:
    return replace(call, settings=replace(call.settings, **changes))


def configs(kernel: Simulated | None = None) -> dict[str, KernelConfig]:
    return {c.name: c for c in (kernel or Simulated()).configs(SHAPE, HARDWARE)}


def check_times(sweep: Sweep, kernel: Simulated, run: int = 0, within: float = 1e-3) -> None:
    """Assert that measured times equal the simulated ones and bounds hold. A batch has all stages measured, or none."""
    found = configs(kernel)
    for i, histogram in enumerate(sweep.histograms):
        stages = {k: us for c in found.values() for k, us in kernel.stage_us(c, histogram).items()}
        paths = {path_key(kernel.name, n): kernel.path_us(c, histogram) for n, c in found.items()}
        for column, us, bounded in zip(sweep.record.columns, sweep.runs_us[run, i], sweep.bounded[run, i], strict=True):
            if bounded:
                assert us < paths[column.key]
            elif column.stage == "path" or i in staged(sweep, run):
                assert us == pytest.approx((paths | stages)[column.key], rel=within, abs=2e-3), column.key
            else:
                assert np.isnan(us)


def staged(sweep: Sweep, run: int = 0) -> list[int]:
    """The batches on which a run timed stages, by index."""
    stages = [i for i, c in enumerate(sweep.record.columns) if c.stage != "path"]
    return np.flatnonzero(np.isfinite(sweep.runs_us[run][:, stages]).any(axis=1)).tolist()


STAGED = [0, 3, 5, 6, 9]
"""Indices into BATCHES on which stages are timed: every third batch, and those to judge on."""


def rounds(calls: list[dict[str, Any]], method: str = "time") -> dict[str, list[str]]:
    """The configurations by batch, in the order in which they were visited."""
    found: dict[str, list[str]] = {}
    for c in calls:
        if c["method"] == method:
            found.setdefault(c["batch"], []).append(c["config"])
    return found


TUNE = [b for b in BATCHES if b.split == "tune"]
PROBED = sorted(TUNE[:FIRST_ROWS], key=lambda b: b.num_tokens)


def name_of(batch: PlannedBatch) -> str:
    """The name of a batch in the log of calls."""
    return "-".join(map(str, batch.histogram(SHAPE)))


def checked(call: Call) -> str:
    """The batch that was checked."""
    return next(c["batch"] for c in call.calls() if c["method"] == "check")


def opened(call: Call) -> list[tuple[str, list[dict[str, Any]]]]:
    """The batches in the order in which they were opened, each with the calls that followed."""
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for c in call.calls():
        if c["method"] == "open":
            found.append((c["batch"], []))
        else:
            found[-1][1].append(c)
    return found


def journalled(call: Call) -> list[dict[str, Any]]:
    """The events of the journal, which must exist."""
    return [json.loads(line) for line in journal(call).read_text().splitlines()[1:]]


def take_an_hour(call: Call) -> None:
    """Rewrite the journal so that the run seems to have taken an hour."""
    *before, last = journal(call).read_text().splitlines()
    last = json.dumps(json.loads(last) | {"spent": 3600.0})
    journal(call).write_text("\n".join([*before, last, ""]))


def stop_at(call: Call, monkeypatch: pytest.MonkeyPatch, line: int) -> None:
    """Run until the journal has `line` lines, when the disk is full."""
    write, count = os.write, [0]

    def limited(descriptor: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(journal(call)):
            count[0] += 1
            if count[0] > line:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        with pytest.raises(ProfileError, match=r"No space left on device; everything measured so far is kept there"):
            call.run()


def same_but_for_when(*paths: Path) -> None:
    records = [json.loads(p.read_text()) for p in paths]
    for record in records:
        for run in record["runs"]:
            assert run.pop("measured")
            assert run.pop("seconds") >= 0
    assert all(r == records[0] for r in records)


def counted(call: Call) -> Counter[tuple[str, ...]]:
    return Counter((c["method"], c["config"], c["batch"]) for c in call.calls() if c["method"] != "open")
