"""A profiling run that is interrupted, goes on, and joins what was recorded before."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simulated_bench
from ramp_moe import ProfileError, ProfileStore, Sweep, load_sweep
from ramp_moe.measurements.sweep import path_key
from ramp_moe.profiler.session import FIRST_ROWS
from session_cases import (
    LOST,
    NAMES,
    PROBED,
    TUNE,
    check_times,
    counted,
    in_process,
    journal,
    journalled,
    name_of,
    opened,
    place,
    rounds,
    same_but_for_when,
    script,
    setting,
    staged,
    stop_at,
)
from simulated_bench import BATCHES, SHAPE, Call, Script, Silent, Simulated, settings

pytestmark = pytest.mark.usefixtures("quick_ends")


@pytest.fixture
def undisturbed(tmp_path: Path) -> Call:
    call = Call(Script(tmp_path / "undisturbed"), settings(tmp_path / "elsewhere"))
    call.run()
    return call


@in_process
def test_going_on_after_a_full_disk(call: Call, undisturbed: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in (4, 40, 90):
        stop_at(call, monkeypatch, line)
        assert not place(call).exists()
    call.run()
    same_but_for_when(place(call), place(undisturbed))
    # what was measured when the line could not be written is measured again
    again = counted(call) - counted(undisturbed)
    assert sum(again.values()) <= 3
    assert not counted(undisturbed) - counted(call)


@in_process
def test_what_a_run_began_with_stays_if_it_goes_on_in_another_time(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run measures fewer configurations. Going on for longer does not add to them."""
    few = replace(call, only={"sim": {"bm16-b", "bm64-a"}})
    stop_at(few, monkeypatch, 20)
    assert call.run().profiles[0].configs == 2
    assert call.run().profiles[0].configs == 2


def in_order(call: Call) -> dict[str, list[str]]:
    """By batch, the configurations in the order of their visits; once, where a visit was repeated at once."""
    return {batch: [name for name, _ in itertools.groupby(names)] for batch, names in rounds(call.calls()).items()}


@in_process
def test_the_probe_goes_on_as_if_undisturbed(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it stops, and although the best of the smaller batches fails on a larger one."""
    fails = script(call, {"time/bm16-a/32": "raises"})
    whole = replace(
        fails, script=replace(fails.script, log=tmp_path / "whole"), settings=settings(tmp_path / "whole.d")
    )
    whole.run()
    reasons = [o.reason for o in load_sweep(place(whole)).record.left_out]
    assert reasons == ["cannot be timed: ValueError: wrong by far", LOST]
    header_checks_and_first_visit, probed = 1 + 6 + 1, sum(len(calls) for _, calls in opened(whole)[1 : 1 + FIRST_ROWS])
    for line in range(header_checks_and_first_visit, header_checks_and_first_visit + probed + 3, 4):
        folder = tmp_path / str(line)
        stopped = replace(fails, script=replace(fails.script, log=tmp_path / f"{line}.log"), settings=settings(folder))
        stop_at(stopped, monkeypatch, line)
        stopped.run()
        same_but_for_when(place(stopped), place(whole))
        assert sum((counted(stopped) - counted(whole)).values()) <= 1
        assert not counted(whole) - counted(stopped)
        assert in_order(stopped) == in_order(whole)


def test_a_kill_inside_the_probe(call: Call, undisturbed: Call, tmp_path: Path) -> None:
    killed = script(call, {"time/bm64-b/8": "kills the run"})
    (tmp_path / "call").write_bytes(pickle.dumps(killed))
    process = subprocess.run([sys.executable, simulated_bench.__file__, str(tmp_path / "call")])
    assert process.returncode == -signal.SIGKILL
    assert {e["event"] for e in journalled(call)} == {"passed", "visit"}
    assert FIRST_ROWS > len(opened(call)) - 1 == 4
    silent = Silent()
    call.run(silent)
    assert silent.phases == [("probe", 8), ("measure", 12)]
    same_but_for_when(place(call), place(undisturbed))
    # nothing is measured twice but what the kill interrupted
    assert counted(call) - counted(undisturbed) == Counter({("time", "bm64-b", name_of(PROBED[3])): 1})
    assert not counted(undisturbed) - counted(call)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_going_on_after_kills(call: Call, undisturbed: Call, tmp_path: Path) -> None:
    slowly = script(call, delay_s=0.002)
    (tmp_path / "call").write_bytes(pickle.dumps(slowly))
    command = [sys.executable, simulated_bench.__file__, str(tmp_path / "call")]
    rng, total = random.Random(7), sum(counted(undisturbed).values())
    for share in (0.0, 0.02, 0.4, 0.9):
        process = subprocess.Popen(command)
        target = share * total + rng.randrange(total // 12)
        deadline = time.monotonic() + 300
        while lines(journal(call)) <= target and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    slowly.run()
    same_but_for_when(place(call), place(undisturbed))
    again = counted(call) - counted(undisturbed)
    assert sum(again.values()) <= 4
    assert not counted(undisturbed) - counted(call)


def test_ctrl_c_leaves_the_journal(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(Silent):
        def at(self, done: int, doing: str, spent: float) -> None:
            if done == 3:
                raise KeyboardInterrupt

    for warmers in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            setting(call, warmers=warmers).run(Interrupting())
        assert journal(call).exists()
    call.run()
    check_times(load_sweep(place(call)), Simulated())


@in_process
def test_a_second_run_joins_the_first(call: Call) -> None:
    setting(call, minutes=0).run()
    before = load_sweep(place(call))
    assert len(before.labels) == 8
    own = list(reversed(BATCHES))
    other = replace(call, batches=own, environment=replace(call.environment, gpu="GPU-1", notes=["busy"]))
    result = script(other, {"time/bm16-b": "raises"}).run()
    sweep = load_sweep(place(call))
    assert (result.profiles[0].run, result.profiles[0].pruned) == (2, [])
    assert [r.gpu for r in sweep.record.runs] == ["GPU-00000000", "GPU-1"]
    assert sweep.record.runs[1].notes == ["busy", "no times of bm16-b: cannot be timed: ValueError: wrong by far"]
    # the file's batches first, in its order; then those of the plan
    expected = TUNE[:8] + [b for b in own if b not in TUNE[:8]]
    assert sweep.labels == [(b.num_tokens, b.routing) for b in expected]
    assert sweep.record.columns == before.record.columns
    assert np.array_equal(sweep.runs_us[0, :8], before.runs_us[0], equal_nan=True)
    assert all(row.runs_us[0] is None for row in sweep.record.batches[8:])
    for i, column in enumerate(sweep.record.columns):
        timed = np.flatnonzero(np.isfinite(sweep.runs_us[1, :, i])).tolist()
        if column.key in {path_key("sim", "bm16-b"), "sim/bm16-b"}:
            assert timed == []
        else:
            assert timed == (list(range(12)) if column.stage == "path" else staged(sweep, run=1))
    splits = [r.split for r in sweep.record.batches]
    assert staged(sweep, run=1) == [i for i, split in enumerate(splits) if split == "test" or i % 3 == 0]


@in_process
def test_a_second_run_measures_the_files_configurations_only(call: Call) -> None:
    call.run()
    calls = len(call.calls())
    call.run()
    assert {c["config"] for c in call.calls()[calls:]} == {"", *NAMES} - {"bm16-slow"}
    sweep = load_sweep(place(call))
    assert [o.configs for o in sweep.record.left_out] == [["bm16-slow"]]
    check_times(sweep, Simulated(), run=1)
    assert np.array_equal(sweep.runs_us[0], sweep.runs_us[1], equal_nan=True)


@in_process
def test_rows_that_cannot_be_drawn_again_stay(call: Call) -> None:
    setting(call, minutes=0).run()
    raw = json.loads(place(call).read_text())
    raw["batches"][0]["seed"] = None
    raw["batches"][1]["histogram"] = [2, 0, 0, 0, 0, 0, 0, 0]
    place(call).write_text(json.dumps(raw))
    call.run()
    sweep = load_sweep(place(call))
    measured = [[us is not None for us in r.runs_us] for r in sweep.record.batches]
    assert measured == [[True, False]] * 2 + [[True, True]] * 6 + [[False, True]] * 6
    assert [(r.num_tokens, r.seed) for r in sweep.record.batches[8:10]] == [(64, 0), (1, 1)]


@in_process
def test_another_version_begins_anew(call: Call) -> None:
    for version, copies in (("1", 0), ("2", 1), ("3", 2)):
        before = place(call).read_bytes() if copies else b""
        result = replace(call, kernels=(Simulated(version=version),)).run()
        assert load_sweep(place(call)).record.kernel_version == version
        assert len(load_sweep(place(call)).record.runs) == 1
        kept = sorted((call.settings.folder / "superseded" / "h200" / "sim").glob("*"))
        assert len(kept) == copies
        if copies:
            superseded = result.profiles[0].superseded
            assert superseded in kept
            assert superseded.read_bytes() == before
    assert ProfileStore([call.settings.folder]).recorded() >= {("h200", "sim", SHAPE.slug)}
    assert all(device == "h200" for device, _, _ in ProfileStore([call.settings.folder]).recorded())


@in_process
def test_a_profile_without_whole_paths_makes_way(call: Call) -> None:
    call.run()
    only_stages = load_sweep(place(call)).only(["gemm"])
    only_stages.save(place(call))
    result = call.run()
    assert result.profiles[0].run == 1
    assert load_sweep(result.profiles[0].superseded).stages == ("gemm",)
    assert "path" in load_sweep(place(call)).stages


@in_process
def test_only_writing_is_left_after_a_failed_write(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two profiles the first is written, the second not."""
    kernels = Simulated(), Simulated("other", version="2")
    both = replace(call, kernels=kernels)
    replace(call, kernels=(Simulated("other"),)).run()
    old = place(call, "other").read_bytes()
    calls, save = len(call.calls()), Sweep.save

    def failing(self: Sweep, path: Path) -> None:
        if path == place(call, "other"):
            raise ProfileError(f"cannot write {path}: No space left on device")
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "save", failing)
        with pytest.raises(ProfileError, match="cannot write"):
            both.run()
    assert journal(call).exists()
    assert place(call, "other").read_bytes() == old
    first, measured = place(call).read_bytes(), len(call.calls())
    assert measured > calls
    result = both.run()
    assert len(call.calls()) == measured
    assert not journal(call).exists()
    assert place(call).read_bytes() == first
    assert [p.run for p in result.profiles] == [1, 1]
    check_times(load_sweep(place(call, "other")), kernels[1])
    (copy,) = (call.settings.folder / "superseded").glob("*/*/*")
    assert copy.read_bytes() == old


@in_process
def test_other_settings_set_the_journal_aside(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(call, monkeypatch, 40)
    silent = Silent()
    setting(call, launches=3).run(silent)
    assert "is kept as" in silent.notes[0]
    assert load_sweep(place(call)).record.runs[0].method.count("9 launches, 3 in each of 3 rounds") == 1
    assert journal(call).with_name(f"{journal(call).name}.old-1").exists()


@in_process
def test_notes_of_every_sitting_are_kept(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(call, monkeypatch, 40)
    replace(call, environment=replace(call.environment, notes=["in use by others"])).run()
    assert load_sweep(place(call)).record.runs[0].notes == ["in use by others"]
