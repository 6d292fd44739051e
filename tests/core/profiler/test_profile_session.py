"""A profiling run over simulated kernels: what it measures, leaves out, and writes."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ramp_moe import MoEShape, ProfileError, ProfileStore, load_sweep
from ramp_moe.dispatch.load_model import view
from ramp_moe.measurements.sweep import path_key
from ramp_moe.profiler import pool
from ramp_moe.profiler.journal import Journal
from ramp_moe.profiler.plan import PlannedBatch
from ramp_moe.profiler.session import FIRST_ROWS, cover
from ramp_moe.profiler.worker import Died
from session_cases import (
    LOST,
    NAMES,
    PROBED,
    STAGED,
    TUNE,
    check_times,
    configs,
    in_process,
    journal,
    journalled,
    name_of,
    opened,
    place,
    rounds,
    script,
    setting,
    staged,
    stop_at,
    take_an_hour,
)
from simulated_bench import BATCHES, HARDWARE, SHAPE, SLOW, Call, Script, Silent, Simulated

pytestmark = pytest.mark.usefixtures("quick_ends")


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
    assert [(r.num_tokens, r.routing, r.seed, r.split) for r in sweep.record.batches] == [
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
def test_a_kernel_that_counts_a_repeated_expert_once(call: Call) -> None:
    """It is not measured where tokens name an expert twice; the others are, in the same run."""
    merging = Simulated("merging")
    merging.counts_repeats = False
    replace(call, kernels=(Simulated(), merging)).run()
    everything, distinct = (load_sweep(place(call, name)) for name in ("sim", "merging"))
    labels = [(b.num_tokens, b.routing) for b in BATCHES]
    assert everything.labels == labels
    assert distinct.labels == [(n, routing) for n, routing in labels if routing != "one-hot"]
    check_times(everything, Simulated())
    assert [
        (r.num_tokens, r.routing) for r in distinct.record.batches if all(t is None for t in r.runs_us[0] or ())
    ] == []


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


@in_process
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw | {"version": 99}, "has ramp-moe/sweep version 99, this ramp-moe reads up to 3"),
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
    rows = load_sweep(place(call)).record.batches
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


@pytest.mark.parametrize("fails", [0, 1])
def test_the_process_that_measures_starts_beside_those_that_compile(
    monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """If it cannot start meanwhile, it is started when it is needed."""
    made: list[list[str]] = []

    class Started:
        def __init__(self, make_bench: object) -> None:
            made.append([])
            if len(made) <= fails:
                raise Died("no memory left")

        def call(self, method: str, *args: object, timeout: float) -> None:
            made[-1].append(method)

        def close(self) -> None:
            made[-1].append("closed")

    monkeypatch.setattr(pool, "Worker", Started)
    measurer = pool.Measurer(lambda: None, 10.0)  # type: ignore[arg-type,return-value]
    measurer.begin(np.zeros((1, 2), np.int64))
    measurer.open(np.zeros((1, 2), np.int64))
    assert made == ([[], ["open"]] if fails else [["open", "open"]])
    measurer.close()
    assert made[-1][-1] == "closed"
    measurer.begin(np.zeros((1, 2), np.int64))
    measurer.close()
    for thread in [t for t in threading.enumerate() if t.name.startswith("ramp-moe-measurer")]:
        thread.join()
    assert made[-1] == ["open", "closed"]
