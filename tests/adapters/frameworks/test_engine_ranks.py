"""Ranks of one group decide alike, in processes of their own, whatever becomes of the one that measures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import rank_worker


def ranks(how: str, folder: Path) -> list[Any]:
    """What two ranks decide, or two servers that start at once on one cache; None for one that was killed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([p for p in sys.path if p]),
        "RAMP_MOE_CACHE": str(folder / "cache"),
        "RAMP_MOE_CALIBRATE_S": "0.01" if how == "late" else "60",
        "TRITON_INTERPRET": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, rank_worker.__file__, str(rank), how, str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    found: list[Any] = []
    try:
        for process in started:
            printed, errors = process.communicate(timeout=100)
            assert process.returncode in (0, -signal.SIGKILL), errors
            found.append(json.loads(printed.splitlines()[-1]) if printed else None)
    finally:
        for process in started:
            process.kill()
    return found


def test_both_choose_by_what_the_first_measured(tmp_path: Path) -> None:
    first, second = ranks("well", tmp_path)
    assert first["keeps"] == second["keeps"] == [n >= 8 for n in rank_worker.SIZES]
    assert first["chosen"] == second["chosen"]
    assert first["asked"]
    assert not second["asked"]
    assert any("what computes batches" in line for line in first["said"])
    assert second["said"] == [], "the first rank tells"


@pytest.mark.slow
def test_two_servers_that_start_at_once_on_one_cache_measure_once(tmp_path: Path) -> None:
    """Also after others were killed while they measured."""
    assert ranks("alone-killed", tmp_path) == [None, None]
    assert not list((tmp_path / "cache").rglob("*.json"))
    found = ranks("alone", tmp_path)
    assert found[0]["keeps"] == found[1]["keeps"] == [n >= 8 for n in rank_worker.SIZES]
    assert found[0]["chosen"] == found[1]["chosen"]
    assert sorted(bool(one["asked"]) for one in found) == [False, True]
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    assert all(any("what computes batches" in line for line in one["said"]) for one in found)


@pytest.mark.slow
def test_a_first_rank_that_is_killed_keeps_nobody_waiting(tmp_path: Path) -> None:
    first, second = ranks("killed", tmp_path)
    assert first is None
    assert second["refused"].startswith("rank 0 of 2 "), second
    assert "\n" not in second["refused"]


@pytest.mark.slow
def test_a_first_rank_that_is_late_learns_that_it_was_given_up(tmp_path: Path) -> None:
    """Both then leave the layer to the engine, for one reason."""
    first, second = ranks("late", tmp_path)
    assert "did not say within" in second["refused"]
    assert first["refused"] == second["refused"]


@pytest.mark.slow
def test_a_first_rank_that_makes_no_layer_keeps_nobody_waiting(tmp_path: Path) -> None:
    """The other then chooses by what is predicted, and measures nothing."""
    _, second = ranks("fails", tmp_path)
    assert "refused" not in second
    assert "chosen" not in second
    assert not second["asked"]


@pytest.mark.slow
def test_another_rank_that_is_killed_keeps_the_first_from_nothing(tmp_path: Path) -> None:
    first, second = ranks("other-killed", tmp_path)
    assert second is None
    assert first["keeps"] == [n >= 8 for n in rank_worker.SIZES]
