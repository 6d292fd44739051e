"""The journal: what is read back, what is refused, and that a failed write spoils nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ramp_moe import ProfileError
from ramp_moe.measurements.sweep import Run
from ramp_moe.profiler import journal as journal_module
from ramp_moe.profiler.journal import (
    BatchDone,
    BatchRecord,
    Complete,
    Dropped,
    Header,
    Journal,
    Judged,
    KernelRecord,
    Noted,
    Passed,
    Stages,
    Visit,
    journal_path,
    open_journal,
)
from simulated_bench import HARDWARE, SHAPE

EVENTS = [
    Passed(0.5, "warm", "sim/a"),
    Passed(1.0, "check", "sim/a"),
    Dropped(1.5, "sim/b", "fails its check: wrong"),
    Noted(1.6, "the GPU is busy"),
    Visit(2.0, 0, "sim/a", [10.0, 11.0]),
    Visit(2.5, 0, "sim/a", [10.5]),
    Stages(3.0, 0, "sim/a", {"gemm": [9.0], "combine": [1.0]}),
    Stages(3.0, 0, "plain/a", {}),
    BatchDone(3.5, 0),
    Dropped(4.0, "sim/c", "slow", pruned=True),
    Judged(4.0, 8),
    Complete(5.0),
]


def header(version: str = "1", gpu: str = "GPU-0", measured: str = "2026-01-01") -> Header:
    run = Run(measured, "NVIDIA H200", "580", {"torch": "2.9"}, "a method", gpu)
    kernels = {"sim": KernelRecord(version, ["a", "b", "c"], None)}
    return Header.of(SHAPE, HARDWARE, run, 1.2, 3, 1.25, kernels, [BatchRecord(64, "uniform", 1, "tune")])


def opened(path: Path, notes: list[str] | None = None, **changes: str) -> Journal:
    said = [] if notes is None else notes
    return open_journal(path, lambda found: header(**changes), said.append)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return journal_path(tmp_path / "profiles", SHAPE, HARDWARE)


@pytest.fixture
def written(path: Path) -> Path:
    journal = opened(path)
    for event in EVENTS:
        journal.append(event)
    journal.close()
    return path


def test_what_is_appended_is_read_back(written: Path) -> None:
    notes: list[str] = []
    journal = opened(written, notes, measured="2026-02-02")
    taken = journal.taken
    assert notes == []
    assert journal.header.run.measured == "2026-01-01"
    assert taken.spent == 5.0
    assert taken.passed == {"warm": {"sim/a"}, "check": {"sim/a"}}
    assert {n: (d.reason, d.pruned) for n, d in taken.dropped.items()} == {
        "sim/b": ("fails its check: wrong", False),
        "sim/c": ("slow", True),
    }
    assert taken.visits == {0: {"sim/a": [[10.0, 11.0], [10.5]]}}
    assert taken.stages == {0: {"gemm": [9.0], "combine": [1.0]}}
    assert taken.staged == {0: {"sim/a", "plain/a"}}
    assert taken.stageless == {"plain"}
    assert (taken.batches, taken.notes, taken.judged, taken.complete) == ({0}, ["the GPU is busy"], 8, True)
    journal.close()
    first = json.loads(written.read_text().splitlines()[0])
    assert (first["format"], first["version"], first["kernels"]["sim"]["version"]) == ("ramp-moe/journal", 1, "1")


LINES = """\
{"event":"passed","spent":0.5,"phase":"warm","candidate":"sim/a"}
{"event":"passed","spent":1.0,"phase":"check","candidate":"sim/a"}
{"event":"dropped","spent":1.5,"candidate":"sim/b","reason":"fails its check: wrong","pruned":false}
{"event":"noted","spent":1.6,"text":"the GPU is busy"}
{"event":"visit","spent":2.0,"row":0,"candidate":"sim/a","us":[10.0,11.0]}
{"event":"visit","spent":2.5,"row":0,"candidate":"sim/a","us":[10.5]}
{"event":"stages","spent":3.0,"row":0,"candidate":"sim/a","us":{"gemm":[9.0],"combine":[1.0]}}
{"event":"stages","spent":3.0,"row":0,"candidate":"plain/a","us":{}}
{"event":"row","spent":3.5,"row":0}
{"event":"dropped","spent":4.0,"candidate":"sim/c","reason":"slow","pruned":true}
{"event":"judged","spent":4.0,"batches":8}
{"event":"complete","spent":5.0}
"""


def test_the_format_is_that_of_journals_which_wait_on_disks(written: Path) -> None:
    head, _, events = written.read_text().partition("\n")
    assert events == LINES
    assert json.loads(head)["version"] == 1, "another version sets the journals of before aside"


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_a_line_that_a_kill_cut_off_is_dropped(written: Path, cut: int) -> None:
    whole = written.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    written.write_bytes(whole[: -min(cut, len(last) - 1)])
    journal = opened(written)
    assert not journal.taken.complete
    assert journal.taken.judged == 8
    journal.append(EVENTS[-1])
    journal.close()
    assert written.read_bytes() == whole


def test_a_header_that_a_kill_cut_off(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"format":"ramp-moe/jou')
    notes: list[str] = []
    journal = opened(path, notes)
    journal.close()
    assert notes == []
    assert len(path.read_bytes().splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "damage", "message"),
    [
        (5, lambda text: text[:-4], r"line 6 is corrupt .*delete the file from that line on"),
        (5, lambda text: "\0" * 20, r"line 6 is corrupt"),
        (5, lambda text: '{"event":"dance","spent":1.0}', r"line 6 is corrupt \(Invalid value 'dance'"),
        (5, lambda text: "", r"line 6 is corrupt"),
        (0, lambda text: '{"format":"ramp-moe/sweep"}', r"line 1 is corrupt \(it is not a ramp-moe/journal file"),
        (0, lambda text: text[:-1], r"line 1 is corrupt"),
    ],
)
def test_a_corrupt_line_is_named(written: Path, line: int, damage: Callable[[str], str], message: str) -> None:
    lines = written.read_text().splitlines()
    lines[line] = damage(lines[line])
    written.write_text("\n".join(lines) + "\n")
    before = written.read_bytes()
    with pytest.raises(ProfileError, match=message) as e:
        opened(written)
    assert str(written) in str(e.value)
    assert "\n" not in str(e.value)
    assert written.read_bytes() == before


@pytest.mark.parametrize("changes", [{"version": "2"}, {"gpu": "GPU-1"}])
def test_a_journal_of_something_else_is_moved_aside(written: Path, changes: dict[str, str]) -> None:
    before = written.read_bytes()
    for i in (1, 2):
        notes: list[str] = []
        journal = opened(written, notes, **changes)
        assert journal.taken.spent == 0
        journal.close()
        aside = written.with_name(f"{written.name}.old-{i}")
        assert aside.read_bytes() == before
        assert notes == [
            f"{written} is of other kernels, versions, settings or another GPU; it is kept as {aside.name}"
        ]
        written.write_bytes(before)


def test_a_journal_of_another_version_is_moved_aside(written: Path) -> None:
    written.write_bytes(written.read_bytes().replace(b'"version":1', b'"version":2', 1))
    notes: list[str] = []
    opened(written, notes).close()
    assert len(notes) == 1


def test_only_one_run_at_a_time(written: Path) -> None:
    journal = opened(written)
    with pytest.raises(ProfileError, match=r"another `ramp-moe profile` is writing .*journal; wait for it, or stop it"):
        opened(written)
    journal.close()
    opened(written).close()


def test_one_that_was_deleted_while_it_was_waited_for(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, times = journal_module.fcntl.flock, []

    def finished_meanwhile(descriptor: int, operation: int) -> None:
        if not times:
            written.unlink()
        times.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(journal_module.fcntl, "flock", finished_meanwhile)
    journal = opened(written)
    assert len(times) == 2
    journal.append(EVENTS[0])
    journal.close()
    assert len(written.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("partly", [False, True])
def test_a_full_disk_spoils_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, partly: bool) -> None:
    journal, write = opened(path), os.write
    journal.append(EVENTS[0])
    before = path.read_bytes()

    def full(descriptor: int, data: bytes) -> int:
        if partly:
            return write(descriptor, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ProfileError, match=r"cannot write .*journal: No space left on device; everything measured so"):
        journal.append(EVENTS[1])
    assert path.read_bytes() == before
    assert "sim/a" not in journal.taken.passed["check"]
    monkeypatch.undo()
    journal.append(EVENTS[1])
    journal.close()
    assert opened(path).taken.passed["check"] == {"sim/a"}


def test_a_line_that_could_not_even_be_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write = opened(path), os.write

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
    monkeypatch.setattr(os, "ftruncate", fail)
    with pytest.raises(ProfileError, match="No space left"):
        journal.append(EVENTS[0])
    monkeypatch.undo()
    journal.close()
    journal = opened(path)
    assert journal.taken.spent == 0
    journal.append(EVENTS[0])
    journal.close()
    assert opened(path).taken.spent == 0.5


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match=r"cannot open .*file/h200/E8.*journal: Not a directory"):
        opened(journal_path(tmp_path / "file", SHAPE, HARDWARE))
