"""A profiling run over simulated kernels: what it measures, drops, keeps over interruptions, and writes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated_bench
from ramp_moe import MoEShape, ProfileError, ProfileStore, Sweep, load_sweep
from ramp_moe.kernel import KernelConfig
from ramp_moe.profiler import pool, worker
from ramp_moe.profiler.journal import Journal, journal_path
from ramp_moe.profiler.plan import PlannedBatch
from ramp_moe.profiler.session import FIRST_ROWS, MORE_ROWS, cover
from ramp_moe.replay import view
from ramp_moe.store import relative_path
from ramp_moe.sweep import path_key
from simulated_bench import BATCHES, HARDWARE, SHAPE, SLOW, Call, Here, Script, Silent, Simulated, settings

NAMES = ["bm16-a", "bm16-b", "bm16-slow", "bm64-a", "bm64-b", "bm64-slow"]
LOST = "on none of 8 spread batches among the kernel's 24 fastest within 1.15x of its best"
LOST_LATER = "on none of 16 spread batches among the kernel's 8 fastest within 1.05x of its best"


@pytest.fixture(autouse=True)
def quick_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE_SECONDS", 0.5)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "Worker", Here)


in_process = pytest.mark.usefixtures("here")


@pytest.fixture
def call(tmp_path: Path) -> Call:
    return Call(Script(tmp_path / "calls"), settings(tmp_path / "profiles"))


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
    """Every measured time is the simulated one, every bound holds; on a batch all stages were measured, or none."""
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
    """The rows on which a run timed stages."""
    stages = [i for i, c in enumerate(sweep.record.columns) if c.stage != "path"]
    return np.flatnonzero(np.isfinite(sweep.runs_us[run][:, stages]).any(axis=1)).tolist()


STAGED = [0, 3, 5, 6, 9]
"""Of BATCHES, every third, and those to judge on."""


def test_a_whole_run(call: Call) -> None:
    silent = Silent()
    result = script(call, noise=0.02).run(silent)
    sweep = load_sweep(place(call))
    assert not journal(call).exists()
    # bm64-slow is slow, but the kernel's default for 8192 tokens
    kept = ["bm16-a", "bm16-b", "bm64-a", "bm64-b", "bm64-slow"]
    keys = [c.key for c in sweep.record.columns]
    assert keys[:5] == [path_key("sim", n) for n in kept]
    assert set(keys[5:]) == {"schedule/bm16", "schedule/bm64", "combine", *(f"sim/{n}" for n in kept[:4])}
    assert sweep.record.columns[0].params == {"block": 16, "kind": "a"}
    assert [(o.reason, o.configs) for o in sweep.record.left_out] == [(LOST, ["bm16-slow"])]
    assert [(r.num_tokens, r.routing, r.seed, r.split) for r in sweep.record.rows] == [
        (b.num_tokens, b.routing, b.seed, b.split) for b in BATCHES
    ]
    check_times(sweep, Simulated(), within=0.04)
    assert staged(sweep) == STAGED
    assert view(sweep, ["gemm"]).labels == [sweep.labels[i] for i in STAGED]
    assert view(sweep).labels == sweep.labels
    (run,) = sweep.record.runs
    assert (run.device_name, run.gpu, run.driver, run.software) == (
        "NVIDIA H200",
        "GPU-00000000",
        "580.1",
        {"torch": "2.9"},
    )
    assert "median of up to 15 launches, 5 in each of 3 rounds" in run.method
    assert "one round where it is over 1.1x the kernel's best; one launch where it is over 3x the best" in run.method
    assert sweep.record.kernel_version == "1"
    (profile,) = result.profiles
    assert (profile.path, profile.run, profile.configs, profile.pruned, profile.failed) == (
        place(call),
        1,
        5,
        ["bm16-slow"],
        {},
    )
    assert (result.batches, result.planned) == (12, 12)
    assert silent.phases == [("check", 6), ("probe", 8), ("measure", 12)]
    store = ProfileStore([call.settings.folder])
    assert store.find("sim", SHAPE, HARDWARE) is not None


def rounds(calls: list[dict[str, Any]], method: str = "time") -> dict[str, list[str]]:
    """By batch, the configurations in the order of their visits."""
    found: dict[str, list[str]] = {}
    for c in calls:
        if c["method"] == method:
            found.setdefault(c["batch"], []).append(c["config"])
    return found


@in_process
def test_configurations_take_turns_and_the_near_ones_more(call: Call) -> None:
    setting(call, prune=float("inf")).run()
    visits = rounds(call.calls())
    assert len(visits) == len(BATCHES)
    sweep = load_sweep(place(call)).only(["path"])
    assert [c.key for c in sweep.record.columns] == [path_key("sim", n) for n in NAMES]
    orders = set()
    for (batch, names), bounded in zip(visits.items(), sweep.bounded[0], strict=True):
        timed = [n for n, b in zip(NAMES, bounded, strict=True) if not b]
        assert {"bm16-a", "bm16-b", "bm64-a", "bm64-b"} <= {*timed}
        assert sorted(names[: len(timed)]) == timed
        orders.add(tuple(n for n in names[: len(timed)] if "slow" not in n))
        us = {n: Simulated().path_us(c, np.array(list(map(int, batch.split("-"))))) for n, c in configs().items()}
        near = [n for n in NAMES if us[n] <= 1.1 * min(us.values())]
        assert len(near) < 6
        later = names[len(timed) : len(timed) + len(near)], names[len(timed) + len(near) :]
        assert all(sorted(turn) == sorted(near) for turn in later)
    assert len(orders) > 6
    # every gemm is of one configuration alone; of one over three times slower than the best no stage is timed
    of_stages = rounds(call.calls(), "time_stages")
    assert list(of_stages) == [name_of(BATCHES[i]) for i in STAGED]
    assert all({"bm16-a", "bm16-b", "bm64-a", "bm64-b"} <= {*v} for v in of_stages.values())
    assert sum("bm64-slow" in v for v in of_stages.values()) < len(STAGED)
    assert [c["config"] for c in call.calls() if c["method"] == "check"] == NAMES
    assert load_sweep(place(call)).record.left_out == []


TUNE = [b for b in BATCHES if b.split == "tune"]
PROBED = sorted(TUNE[:FIRST_ROWS], key=lambda b: b.num_tokens)


def name_of(batch: PlannedBatch) -> str:
    """As calls name it."""
    return "-".join(map(str, batch.histogram(SHAPE)))


def checked(call: Call) -> str:
    """The batch that was checked."""
    return next(c["batch"] for c in call.calls() if c["method"] == "check")


def opened(call: Call) -> list[tuple[str, list[dict[str, Any]]]]:
    """The batches that were opened, one after the other, each with what was then asked."""
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for c in call.calls():
        if c["method"] == "open":
            found.append((c["batch"], []))
        else:
            found[-1][1].append(c)
    return found


@in_process
def test_the_probe_goes_from_small_to_large_batches(call: Call) -> None:
    call.run()
    (_, checks), *batches = opened(call)
    assert [c["method"] for c in checks] == ["check"] * 6
    assert [batch for batch, _ in batches] == [name_of(b) for b in (*PROBED, *BATCHES)]
    first, *others = (calls for _, calls in batches[:FIRST_ROWS])
    assert sorted(c["config"] for c in first) == NAMES
    assert all({*NAMES} - {"bm16-slow", "bm64-slow"} <= {c["config"] for c in calls} for calls in others)
    assert all(c["method"] == "time" for calls in (first, *others) for c in calls)


@in_process
def test_what_the_probe_measured_is_the_first_round(call: Call) -> None:
    """bm64-slow is the default for 8192 tokens, and stays."""
    call.run()
    asked = [[(c["method"], c["config"]) for c in calls] for _, calls in opened(call)[1 + FIRST_ROWS :]]
    for batch, calls in zip(BATCHES, asked, strict=True):
        visits = Counter(config for method, config in calls if method == "time")
        probed = 0 if batch not in PROBED else 1
        for name in ("bm16-a", "bm16-b", "bm64-a", "bm64-b"):
            assert visits[name] in (1 - probed, 3 - probed)
        # pruned, it is neither timed, nor its stages
        assert "bm16-slow" not in {config for _, config in calls}
    assert np.isfinite(load_sweep(place(call)).only(["path"]).runs_us).all()


@in_process
def test_what_is_far_behind_is_not_timed_on_a_large_batch(call: Call) -> None:
    """On one expert a slow configuration is behind, on all of them it is estimated far too slow: it gets a bound."""
    batches = [PlannedBatch(1, "one-hot", 0, "tune"), PlannedBatch(8192, "uniform", 1, "tune"), *BATCHES[3:]]
    setting(replace(call, batches=batches), prune=float("inf")).run()
    asked = {c["config"] for c in call.calls() if c["method"] == "time" and c["batch"] == name_of(batches[1])}
    sweep = load_sweep(place(call)).only(["path"])
    never = {n for n, bounded in zip(NAMES, sweep.bounded[0, 1], strict=True) if bounded}
    assert never
    assert asked == {*NAMES} - never
    assert never <= {"bm16-slow", "bm64-slow"}
    us = dict(zip(NAMES, sweep.times_us[1], strict=True))
    assert all(us[n] == pytest.approx(3 * min(us.values()), abs=2e-3) for n in never)
    assert not sweep.bounded[0, 0].any()


@in_process
@pytest.mark.parametrize("changes", [{"prune": float("inf")}, {"batches": [*TUNE[:7], *BATCHES[5::4]]}])
def test_no_probe_where_nothing_can_be_pruned(call: Call, changes: dict[str, Any]) -> None:
    """All is kept, there are seven tune batches, or, in the second run, the file says what is measured."""
    call = replace(call, **changes) if "batches" in changes else setting(call, **changes)
    for run in (1, 2):
        silent = Silent()
        result = call.run(silent)
        assert silent.phases == [("check", 6), ("measure", len(call.batches))]
        assert (result.profiles[0].run, result.profiles[0].pruned) == (run, [])


@in_process
def test_a_second_run_probes_nothing_unless_another_kernel_begins(call: Call) -> None:
    call.run()
    silent = Silent()
    replace(call, kernels=(Simulated(), Simulated("other"))).run(silent)
    assert silent.phases == [("check", 11), ("probe", 8), ("measure", 12)]
    first, second = (load_sweep(place(call, kernel)) for kernel in ("sim", "other"))
    for run in (0, 1):
        check_times(first, Simulated(), run=run)
    assert [o.configs for o in second.record.left_out] == [["bm16-slow"]]
    silent = Silent()
    call.run(silent)
    assert silent.phases == [("check", 5), ("measure", 12)]


@in_process
def test_patience(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the kernel's best so far on the batch, but no less than 500 us; what takes longer has one time."""
    monkeypatch.setattr(Journal, "delete", lambda self: None)
    kernels = Simulated(slower=15.0), Simulated("other", slower=5.0)
    setting(replace(call, kernels=kernels), prune=float("inf")).run()
    visits = [e for e in journalled(call) if e["event"] == "visit"]
    timed = [c for c in call.calls() if c["method"] == "time"]
    first: dict[tuple[int, str], dict[str, float]] = {}
    lengths = set()
    for visit, given in zip(visits, timed, strict=True):
        assert visit["candidate"] == f"{given['kernel']}/{given['config']}"
        known = first.setdefault((visit["row"], given["kernel"]), {})
        assert given["patience_us"] == max(3 * min(known.values(), default=float("inf")), 500.0)
        known.setdefault(given["config"], visit["us"][0])
        lengths.add((len(visit["us"]), visit["us"][0] > given["patience_us"]))
    assert lengths == {(5, False), (1, True)}
    assert {3 * min(us.values()) > 500 for us in first.values()} == {True, False}


MANY = [PlannedBatch(8 + 16 * (7 * i % 18), "uniform", i, "tune") for i in range(18)]
"""On none of them bm16-b and bm64-b come within 1.05x of the best; the former is nearer, the third of the kernel."""


def test_the_simulation_of_many_batches_is_as_the_tests_think() -> None:
    for batches in (MANY[:FIRST_ROWS], MANY[:MORE_ROWS]):
        us = [{n: Simulated().path_us(c, b.histogram(SHAPE)) for n, c in configs().items()} for b in batches]
        nearest = {n: min(u[n] / min(u.values()) for u in us) for n in NAMES}
        assert nearest["bm16-a"] == nearest["bm64-a"] == 1.0
        assert 1.05 < nearest["bm16-b"] < nearest["bm64-b"] < 1.15


@in_process
def test_after_more_batches_more_is_pruned(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replace(call, batches=MANY)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "delete", lambda self: None)
        whole.run()
    record = load_sweep(place(call)).record
    assert {o.reason: o.configs for o in record.left_out} == {LOST: ["bm16-slow"], LOST_LATER: ["bm64-b"]}
    later = [{c["config"] for c in calls} for _, calls in opened(call)[1 + FIRST_ROWS :]]
    assert ["bm64-b" in configs for configs in later] == [True] * MORE_ROWS + [False] * 2
    events = journalled(call)
    assert [e["batches"] for e in events if e["event"] == "judged"] == [FIRST_ROWS, MORE_ROWS]
    # stopped between the pruning and its end
    at = next(i for i, e in enumerate(events, 2) if e.get("reason") == LOST_LATER)
    stopped = replace(whole, script=Script(tmp_path / "again"), settings=settings(tmp_path / "again.d"))
    stop_at(stopped, monkeypatch, at)
    assert journalled(stopped)[-1]["reason"] == LOST_LATER
    stopped.run()
    same_but_for_when(place(stopped), place(whole))
    assert counted(stopped) == counted(whole)


@in_process
def test_not_enough_batches_to_prune_again(call: Call) -> None:
    replace(call, batches=MANY[: MORE_ROWS - 1]).run()
    assert [o.reason for o in load_sweep(place(call)).record.left_out] == [LOST]


def test_compiling_in_several_processes(call: Call) -> None:
    silent = Silent()
    call = script(call, {"warm/bm16-b": "raises", "warm/bm64-b": "exits"}, delay_s=0.01)
    setting(call, warmers=2).run(silent)
    warm = [c for c in call.calls() if c["method"] == "warm"]
    on_batch: dict[str, list[str]] = {}
    for c in warm:
        on_batch.setdefault(c["batch"], []).append(c["config"])
    assert sorted(on_batch.pop(checked(call))) == NAMES
    # what schedules and combines, once for each size
    sizes = [sum(map(int, batch.split("-"))) // SHAPE.top_k for batch in on_batch]
    assert sorted(sizes) == sorted(b.num_tokens for b in BATCHES)
    assert all(sorted(names) == ["bm16-a", "bm64-a"] for names in on_batch.values())
    assert len({c["pid"] for c in warm}) >= 2
    assert silent.phases == [("compile", 6 + 2 * 12), ("check", 4), ("probe", 8), ("measure", 12)]
    assert {o.reason: o.configs for o in load_sweep(place(call)).record.left_out} == {
        "cannot be compiled: ValueError: wrong by far": ["bm16-b"],
        "cannot be compiled: the worker ended with exit code 3": ["bm64-b"],
    }


@in_process
def test_what_cannot_be_compiled_is_tried_once(call: Call) -> None:
    """By each of the two processes at most, although there are twelve more sizes to launch it on."""
    result = setting(script(call, {"warm/bm16-a": "raises"}), warmers=2).run()
    assert result.profiles[0].failed == {"cannot be compiled: ValueError: wrong by far": ["bm16-a"]}
    assert [c["config"] for c in call.calls()].count("bm16-a") in (1, 2)
    call = setting(script(call, {"warm/bm64-a/512": "breaks the context"}), warmers=2)
    result = replace(call, kernels=(Simulated("late"),)).run()
    assert result.profiles[0].failed == {
        "cannot be compiled: RuntimeError: an illegal memory access was encountered": ["bm64-a"]
    }


@in_process
def test_what_fails_in_the_probe_is_left_out_there(call: Call) -> None:
    """The best of the smaller batches breaks the context on a larger one, where all others are tried without it."""
    result = script(call, {"time/bm16-a/8": "breaks the context"}).run()
    reason = "cannot be timed: RuntimeError: an illegal memory access was encountered"
    assert result.profiles[0].failed == {reason: ["bm16-a"]}
    probed = opened(call)[1:]
    of_eight = [calls for batch, calls in probed[: FIRST_ROWS + 1] if batch == name_of(PROBED[3])]
    # the batch is opened again in another worker, for the rest of the candidates
    assert len(of_eight) == 2
    assert sorted(c["config"] for calls in of_eight for c in calls) == NAMES
    assert all("bm16-a" not in {c["config"] for c in calls} for _, calls in probed[FIRST_ROWS:])
    # nearest without what failed
    assert [o.configs for o in load_sweep(place(call)).record.left_out] == [["bm16-a"], ["bm16-slow"]]
    check_times(load_sweep(place(call)), Simulated())


@in_process
def test_nothing_left_after_the_probe(call: Call) -> None:
    call = script(call, {f"time/{n}": "raises" for n in NAMES})
    for _ in range(2):
        with pytest.raises(
            ProfileError, match=r"none of 6 configurations .*\(6 of them: cannot be timed: .*move .*jour"
        ):
            call.run()
    assert [c["method"] for c in call.calls()].count("time") == 6
    assert "measure" not in [c["method"] for c in call.calls()]


def test_what_fails_is_left_out_and_the_rest_goes_on(call: Call) -> None:
    acts = {
        "check/bm16-a": "raises",
        "time/bm16-b": "exits",
        "time/bm16-slow": "hangs",
        "time/bm64-a": "breaks the context",
        "time_stages/bm64-b": "raises",
    }
    result = setting(script(call, acts), call_s=1.5).run()
    sweep = load_sweep(place(call))
    assert [c.key for c in sweep.record.columns if c.stage == "path"] == [path_key("sim", "bm64-slow")]
    check_times(sweep, Simulated())
    assert staged(sweep) == STAGED
    reasons = {o.configs[0]: o.reason for o in sweep.record.left_out}
    assert reasons == {
        "bm16-a": "fails its check: ValueError: wrong by far",
        "bm16-b": "cannot be timed: the worker ended with exit code 3",
        "bm16-slow": "cannot be timed: the worker gave no answer within 1.5 s and was killed",
        "bm64-a": "cannot be timed: RuntimeError: an illegal memory access was encountered",
        "bm64-b": "its stages cannot be timed: ValueError: wrong by far",
    }
    assert result.profiles[0].failed == {why: [name] for name, why in reasons.items()}
    counts = Counter((c["method"], c["config"]) for c in call.calls())
    assert all(counts[tuple(act.split("/"))] == 1 for act in acts)
    assert len({c["pid"] for c in call.calls()}) == 4


@in_process
def test_a_kernel_that_does_not_tell_its_stages_apart(call: Call) -> None:
    script(call, stageless=True).run()
    sweep = load_sweep(place(call))
    assert sweep.stages == ("path",)
    check_times(sweep, Simulated())
    assert len(rounds(call.calls(), "time_stages")) == 1


@in_process
def test_paths_alone(call: Call) -> None:
    setting(call, stages=False).run()
    assert load_sweep(place(call)).stages == ("path",)
    check_times(load_sweep(place(call)), Simulated())
    assert {c["method"] for c in call.calls()} == {"open", "check", "time"}


@in_process
def test_nothing_left(call: Call) -> None:
    call = script(call, {f"check/{n}": "raises" for n in NAMES})
    for _ in range(2):
        with pytest.raises(
            ProfileError, match=r"none of 6 configurations .*\(6 of them: fails its check: .*move .*jour"
        ):
            call.run()
    assert len([c for c in call.calls() if c["method"] == "check"]) == 6
    assert not place(call).exists()


def test_no_worker_can_be_made(call: Call) -> None:
    for warmers in (1, 2):
        with pytest.raises(ProfileError, match=r"on this GPU: MemoryError: no room; the same command goes on"):
            setting(script(call, {"make": "no room"}), warmers=warmers).run()
    result = call.run()
    assert result.profiles[0].failed == {}


def test_one_worker_after_another_is_lost(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the configurations that are at fault: a run on a sound GPU has them all."""
    monkeypatch.setattr(pool, "MAX_LOST", 2)
    with pytest.raises(
        ProfileError, match=r"2 configurations in a row broke the measuring process, the last with: the"
    ):
        script(call, {f"time/{n}": "exits" for n in NAMES}).run()
    events = [e["event"] for e in journalled(call)]
    assert events.count("dropped") == events.count("restored") == 1
    (profile,) = call.run().profiles
    assert (profile.failed, profile.configs) == ({}, 5)


@in_process
def test_two_kernels_share_batches_and_stages(call: Call) -> None:
    kernels = Simulated(), Simulated("other", slower=3.0)
    replace(call, kernels=kernels).run()
    fast, slow = (load_sweep(place(call, k.name)) for k in kernels)
    assert fast.labels == slow.labels
    check_times(fast, kernels[0])
    check_times(slow, kernels[1])
    # none comes near the other kernel's best: each kernel's are compared with its own
    for sweep in (fast, slow):
        assert sum(c.stage == "path" for c in sweep.record.columns) == 5
        assert [(o.reason, o.configs) for o in sweep.record.left_out] == [(LOST, ["bm16-slow"])]
    # each batch once for both kernels, and those of the probe before
    assert [batch for batch, _ in opened(call)[1:]] == [name_of(b) for b in (*PROBED, *BATCHES)]


@in_process
def test_minutes(call: Call) -> None:
    """Over before the first batch: the eight that were probed are measured, and no test batch between them."""
    result = setting(call, minutes=0).run()
    assert (result.batches, result.planned) == (8, 12)
    sweep = load_sweep(place(call))
    assert sweep.labels == [(b.num_tokens, b.routing) for b in TUNE[:8]]
    check_times(sweep, Simulated())
    assert [o.configs for o in sweep.record.left_out] == [["bm16-slow"]]


@in_process
def test_minutes_without_a_probe(call: Call) -> None:
    result = setting(call, minutes=0, prune=float("inf")).run()
    assert result.batches == 8
    sweep = load_sweep(place(call))
    assert sweep.labels == [(b.num_tokens, b.routing) for b in BATCHES[:8]]
    assert sweep.record.left_out == []


@in_process
def test_a_batch_that_is_begun_is_finished(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    call = setting(call, prune=float("inf"))
    whole = replace(call, script=Script(call.script.log.with_name("whole")), settings=replace(call.settings))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "delete", lambda self: None)
        whole.run()
    of_tenth = [i for i, e in enumerate(journalled(call), 2) if e.get("row") == 9]
    journal(call).unlink()
    place(call).unlink()
    stop_at(call, monkeypatch, of_tenth[2])
    take_an_hour(call)
    result = call.run()
    assert result.batches == 10
    assert load_sweep(place(call)).labels == [(b.num_tokens, b.routing) for b in BATCHES[:10]]


@in_process
def test_time_spent_before_an_interruption_counts(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(call, monkeypatch, 70)
    take_an_hour(call)
    silent = Silent()
    result = call.run(silent)
    assert result.batches == 8
    assert result.spent >= 3600
    assert "batches measured in 60.0 minutes" in silent.notes[0]


def journalled(call: Call) -> list[dict[str, Any]]:
    """The events of a journal that is still there."""
    return [json.loads(line) for line in journal(call).read_text().splitlines()[1:]]


def take_an_hour(call: Call) -> None:
    """By the journal, it took the run so long to get where it is."""
    *before, last = journal(call).read_text().splitlines()
    last = json.dumps(json.loads(last) | {"spent": 3600.0})
    journal(call).write_text("\n".join([*before, last, ""]))


def stop_at(call: Call, monkeypatch: pytest.MonkeyPatch, line: int) -> None:
    """Run until the journal has so many lines; then the disk is full."""
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


def test_going_on_after_kills(call: Call, undisturbed: Call, tmp_path: Path) -> None:
    slowly = script(call, delay_s=0.002)
    (tmp_path / "call").write_bytes(pickle.dumps(slowly))
    command = [sys.executable, simulated_bench.__file__, str(tmp_path / "call")]
    rng, total = random.Random(7), sum(counted(undisturbed).values())
    for share in (0.0, 0.02, 0.4, 0.9):
        process = subprocess.Popen(command)
        target = share * total + rng.randrange(total // 12)
        deadline = time.monotonic() + 20
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
    assert all(row.runs_us[0] is None for row in sweep.record.rows[8:])
    for i, column in enumerate(sweep.record.columns):
        timed = np.flatnonzero(np.isfinite(sweep.runs_us[1, :, i])).tolist()
        if column.key in {path_key("sim", "bm16-b"), "sim/bm16-b"}:
            assert timed == []
        else:
            assert timed == (list(range(12)) if column.stage == "path" else staged(sweep, run=1))
    splits = [r.split for r in sweep.record.rows]
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
    raw["rows"][0]["seed"] = None
    raw["rows"][1]["histogram"] = [2, 0, 0, 0, 0, 0, 0, 0]
    place(call).write_text(json.dumps(raw))
    call.run()
    sweep = load_sweep(place(call))
    measured = [[us is not None for us in r.runs_us] for r in sweep.record.rows]
    assert measured == [[True, False]] * 2 + [[True, True]] * 6 + [[False, True]] * 6
    assert [(r.num_tokens, r.seed) for r in sweep.record.rows[8:10]] == [(64, 0), (1, 1)]


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
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw | {"version": 99}, "has ramp-moe/sweep version 99, this ramp-moe reads up to 2"),
        (lambda raw: raw | {"kernel": "other"}, "is for other, E8.*not what its place says; move it"),
        (lambda raw: [], "is not a ramp-moe/sweep file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_anything_is_measured(
    call: Call, damage: Any, message: str
) -> None:
    setting(call, minutes=0).run()
    place(call).write_text(json.dumps(damage(json.loads(place(call).read_text()))))
    before, calls = place(call).read_bytes(), len(call.calls())
    with pytest.raises(ProfileError, match=message):
        call.run()
    assert place(call).read_bytes() == before
    assert len(call.calls()) == calls


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


class Given(PlannedBatch):
    """A batch that no seed draws."""

    def topk_ids(self, shape: MoEShape) -> Any:
        return np.full((self.num_tokens, shape.top_k), self.seed)


@in_process
def test_given_batches_of_some_configurations(call: Call) -> None:
    batches = [Given(n, "recorded", n % 8, "test") for n in (4, 9, 17)]
    only = replace(call, batches=batches, only={"sim": {"bm16-b", "bm64-a"}})
    for run in (1, 2):
        result = only.run()
        assert (result.profiles[0].run, result.profiles[0].configs) == (run, 2)
    sweep = load_sweep(place(call))
    assert [c.key for c in sweep.record.columns if c.stage == "path"] == [
        path_key("sim", n) for n in ("bm16-b", "bm64-a")
    ]
    assert sweep.histograms.tolist() == [[8 * (e == 4) for e in range(8)], [0, 18, *[0] * 6], [0, 34, *[0] * 6]]
    assert np.isfinite(sweep.runs_us).all()
    check_times(sweep, Simulated(), run=1)
    # without those who know them, they stay, and only the plan's are measured
    setting(call, minutes=0).run()
    rows = load_sweep(place(call)).record.rows
    assert [[us is not None for us in r.runs_us] for r in rows] == [[True, True, False]] * 3 + [
        [False, False, True]
    ] * 8


def test_cover() -> None:
    assert cover({"a": {"1"}, "b": {"1", "2", "3"}, "c": {"3", "4"}, "d": {"2"}}) == ["b", "c"]
    assert cover({"a": set()}) == []
    assert cover({}) == []


def test_the_simulation_is_as_the_tests_think() -> None:
    slow = [c for n, c in configs().items() if n.endswith("slow")]
    histogram = BATCHES[0].histogram(SHAPE)
    us = {n: Simulated().path_us(c, histogram) for n, c in configs().items()}
    assert all(us[c.name] > 1.1 * min(us.values()) for c in slow)
    assert SLOW > 1.1
    assert sum(b.split == "tune" for b in BATCHES[:9]) == FIRST_ROWS
