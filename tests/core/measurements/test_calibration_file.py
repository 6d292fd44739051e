"""What a calibration measured, on disk: for this GPU and these versions alone, and safe for many processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ramp_moe.errors import ProfileError
from ramp_moe.measurements.calibration_file import (
    VARIABLE,
    CalibrationRecord,
    PlanRow,
    Timing,
    folder,
    load,
    locked,
    path_of,
    records,
    save,
)

KEY = {"gpu": "NVIDIA H200", "driver": "580.1", "shape": "E64-k8-h2048-i1024-bf16", "vllm": "0.33.0"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def record(**changed: object) -> CalibrationRecord:
    rows = [PlanRow(1, "triton/a", "single", 1, 9.0, 9.5, 10.0, 0.0), PlanRow(8192, "", "eager", 1, None, None, 300.0)]
    given: dict[str, object] = {
        "key": KEY, "complete": True, "seconds": 1.5, "timings": [Timing(1, "uniform", "triton/a", 9.5)],
        "dropped": {"cute/b": "raised"}, "plan": rows, "left": "8192: vLLM's own is faster",
    }  # fmt: skip
    return CalibrationRecord(**{**given, **changed})  # type: ignore[arg-type]


def test_what_is_saved_is_loaded() -> None:
    assert load(KEY) is None
    save(record())
    assert load(KEY) == record()
    assert list(records()) == [record()]


@pytest.mark.parametrize("name", KEY)
def test_every_part_of_the_key_counts(name: str) -> None:
    save(record())
    assert load({**KEY, name: "another"}) is None


def test_a_file_that_cannot_be_used() -> None:
    save(record())
    path = path_of(KEY)
    good = path.read_bytes()
    for bad, said in (
        (good[: len(good) // 2], "corrupt or truncated"),
        (good.replace(b'"version": 1', b'"version": 9'), "upgrade ramp-moe"),
        (good.replace(b"NVIDIA H200", b"NVIDIA H100"), "of another GPU, shape or version"),
        (b"", "corrupt or truncated"),
        (good.replace(b'"us":9.5', b'"us":0.0'), "timings"),
        (good.replace(b'"us":9.5', b'"us":-9.5'), "timings"),
        (good.replace(b'"us":9.5', b'"us":null'), "timings"),
        (good.replace(b'"tokens":1,"routing"', b'"tokens":0,"routing"'), "timings"),
    ):
        assert bad != good
        path.write_bytes(bad)
        with pytest.raises(ProfileError, match=said) as raised:
            load(KEY)
        assert "\n" not in str(raised.value), "one line"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_read_only(cache: Path) -> None:
    cache.mkdir(mode=0o500)
    with pytest.raises(ProfileError, match="cannot write"):
        save(record())
    with pytest.raises(ProfileError, match="cannot write"), locked(KEY, 0):
        pass


def test_a_folder_that_cannot_be_made(cache: Path) -> None:
    cache.write_text("a file")
    with (
        pytest.raises(ProfileError, match=f"cannot write {folder()}.*set {VARIABLE} to another folder"),
        locked(KEY, 0),
    ):
        pass
    with pytest.raises(ProfileError, match="cannot write"):
        save(record())
    assert list(records()) == []


def test_a_folder_that_cannot_be_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of another user; here one whose name is too long."""
    monkeypatch.setenv(VARIABLE, "x" * 300)
    for use in (lambda: load(KEY), lambda: save(record())):
        with pytest.raises(ProfileError, match=r"cannot (read|write) .*name too long"):
            use()
    with pytest.raises(ProfileError, match="cannot write"), locked(KEY, 0):
        pass
    assert list(records()) == []


HOLD = """
import sys, time
from ramp_moe.measurements.calibration_file import locked
with locked({key!r}, 0) as held:
    print(held, flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_killed_one_holds_nothing() -> None:
    path = [*sys.path]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(key=KEY)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "True"
        with locked(KEY, 0) as held:
            assert not held
        with locked({**KEY, "gpu": "another"}, 0) as held:
            assert held, "another GPU's"
    finally:
        holder.kill()
        holder.wait()
    with locked(KEY, 30) as held:
        assert held
