"""The probe of a profiling run, and what it and later batches prune."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ramp_moe import ProfileError, load_sweep
from ramp_moe.profiler.journal import Journal
from ramp_moe.profiler.plan import PlannedBatch
from ramp_moe.profiler.session import FIRST_ROWS, MORE_ROWS
from session_cases import (
    LOST,
    LOST_LATER,
    NAMES,
    PROBED,
    TUNE,
    check_times,
    checked,
    configs,
    counted,
    in_process,
    journalled,
    name_of,
    opened,
    place,
    same_but_for_when,
    script,
    setting,
    stop_at,
)
from simulated_bench import BATCHES, SHAPE, Call, Script, Silent, Simulated, settings

pytestmark = pytest.mark.usefixtures("quick_ends")


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


@pytest.mark.slow
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
