"""A live comparison over simulated kernels: what it measures, whom it lets choose, and what it says of the rest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ramp_moe import KernelConfig, ProfileError, ProfileStore, Registry, RoutingError, load_sweep
from ramp_moe.dispatch.load_model import fit_recorded
from ramp_moe.dispatch.profile_store import relative_path
from ramp_moe.evaluation.comparison import Comparison
from ramp_moe.evaluation.regret import static_table, table_choice
from ramp_moe.measurements.sweep import Sweep
from ramp_moe.measurements.trace import RecordedBatch, Trace
from ramp_moe.profiler import live as live_module
from ramp_moe.profiler import pool
from ramp_moe.profiler.live import FIRST_SEED, STEPS, compare_live, trace_batches
from ramp_moe.profiler.plan import PlannedBatch, held_out
from ramp_moe.spec.kernel import usable_configs
from ramp_moe.spec.routing import expert_histogram
from simulated_bench import (
    BATCHES,
    ENVIRONMENT,
    HARDWARE,
    SHAPE,
    Call,
    Here,
    Script,
    Silent,
    Simulated,
    SimulatedBench,
    settings,
)

PROFILED = [*BATCHES, PlannedBatch(512, "uniform", 20, "tune"), PlannedBatch(2048, "uniform", 21, "tune")]
"""Of these, two are kept for judging."""
FITTED = {(b.num_tokens, *b.histogram(SHAPE).tolist()) for b in PROFILED if b.split == "tune"}
HELD_OUT = [b for b in held_out(SHAPE, FIRST_SEED)[:20] if (b.num_tokens, *b.histogram(SHAPE).tolist()) not in FITTED]
"""Of the 48, for the tests' sake; some are the same as what the profile is fitted on."""
TRACE = Trace(np.random.default_rng(0).integers(0, 8, (300, 2)), 8)


class Live:
    """A folder of profiles, and what `compare_live` is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "profiles"
        self.profiled = Call(Script(folder / "calls"), settings(self.folder), batches=PROFILED)
        self.script = Script(folder / "live", noise=0.02)
        self.progress = Silent()

    def compare(
        self,
        *kernels: Simulated,
        scripts: Sequence[Script] = (),
        trace: Trace | None = None,
        minutes: float = 60.0,
        **changes: Any,
    ) -> Comparison:
        """Of these kernels, "sim" where none is named. `scripts` are those of the first benches, one after another."""
        registry = Registry(load_entry_points=False)
        registry.kernels = {k.name: k for k in kernels or [Simulated()]}
        left: Iterator[Script] = iter(scripts)

        def make_bench() -> SimulatedBench:
            return SimulatedBench(next(left, self.script), kernels or [Simulated()])

        return compare_live(
            registry,
            ProfileStore([self.folder]),
            SHAPE,
            HARDWARE,
            list(registry.kernels),
            minutes,
            1,
            replace(ENVIRONMENT, **changes),
            make_bench,
            self.progress,
            trace,
        )

    def place(self, kernel: str = "sim") -> Path:
        return self.folder / relative_path(kernel, SHAPE, HARDWARE)

    def sweep(self, kernel: str = "sim") -> Sweep:
        return load_sweep(self.place(kernel))


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Live:
    monkeypatch.setattr(pool, "Worker", Here)
    monkeypatch.setattr(live_module, "held_out", lambda shape, first_seed: HELD_OUT)
    made = Live(tmp_path)
    made.profiled.run()
    return made


def config_of(name: str, kernel: Simulated) -> KernelConfig:
    return next(c for c in kernel.configs(SHAPE, HARDWARE) if c.name == name)


def check_choices(found: Comparison, batches: Sequence[PlannedBatch], sweep: Sweep) -> None:
    """What is chosen is what the model fitted on the profile's tune rows, and the static table of these, choose."""
    kernel = Simulated()
    model = fit_recorded(sweep, usable_configs(kernel, SHAPE, HARDWARE), HARDWARE)
    names = [c.config.name for c in model.candidates]
    tune = sweep.select(sweep.batches_of("tune")).only(["path"])
    table = static_table(tune.times_us, tune.labels)
    assert [c.key for c in tune.record.columns] == [f"path/sim/{n}" for n in names]
    assert [(b.tokens, b.routing) for b in found.batches] == [(b.num_tokens, b.routing) for b in batches]
    for judged, batch in zip(found.batches, batches, strict=True):
        histogram = batch.histogram(SHAPE)
        assert judged.histogram.config == names[model.choose(histogram)[0]]
        assert judged.static.config == names[table_choice(table, batch.num_tokens)]
        assert judged.active_experts == np.count_nonzero(histogram)


def test_profile_fit_and_compare(live: Live) -> None:
    """On batches that are twice as slow as those of the profile, so that one knows whose times are shown."""
    slower = Simulated(slower=2.0)
    found = live.compare(slower)
    assert found.mode == "live"
    check_choices(found, HELD_OUT, live.sweep())
    for judged, batch in zip(found.batches, HELD_OUT, strict=True):
        for pick in (judged.static, judged.histogram, judged.best):
            assert pick is not None
            us = slower.path_us(config_of(pick.config, slower), batch.histogram(SHAPE))
            assert pick.us == pytest.approx(us, rel=0.05)
    assert {(b.histogram.config, b.static.config) for b in found.batches} >= {
        ("bm16-a", "bm16-a"),
        ("bm64-a", "bm64-a"),
    }
    assert any(b.histogram.config != b.static.config for b in found.batches)
    assert found.noise is not None
    assert found.noise.batches == len(HELD_OUT)
    assert found.baselines["histogram"].mean < 0.1
    assert "time_stages" not in live.script.log.read_text()
    assert live.progress.notes == ["run 1 of 2", "run 2 of 2"]
    assert live.progress.phases == [("check", 5), ("measure", len(HELD_OUT))] * 2
    # the profile's two test batches are neither fitted on nor judged
    assert any(
        n.startswith(f"fitted, and static dispatch tuned, on 12 batches; judged on {len(HELD_OUT)}")
        for n in found.notes
    )
    assert len(found.notes) == 1


def test_the_noise_of_measuring(live: Live) -> None:
    quiet, noisy = (replace(live.script, noise=noise) for noise in (0.0, 0.3))
    repeated, changed = live.compare(scripts=[quiet] * 2).noise, live.compare(scripts=[quiet, noisy]).noise
    assert repeated is not None
    assert changed is not None
    assert repeated.selection.max == 0 < changed.selection.mean


def test_where_it_is_from(live: Live) -> None:
    """The profile, not what was measured beside it; nothing of that is kept."""
    before = live.place().read_bytes()
    found = live.compare(notes=["in use by others"])
    (source,) = found.sources
    assert source["file"] == str(live.place())
    assert len(source["runs"]) == 1
    assert "MEASURED on this machine's GPU just now; the cost model was fitted to: sim 1 on" in found.provenance()
    assert "runs)" not in found.provenance()
    assert found.notes[0] == "in use by others"
    assert live.place().read_bytes() == before
    assert sorted(p.name for p in live.folder.rglob("*") if p.is_file()) == [live.place().name]


def test_recorded_batches_are_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.split(TRACE.topk_ids[:300], [3, 7, 20, 35])
    recorded = [RecordedBatch(len(batch), expert_histogram(batch, 8)) for batch in ids]
    trace = Trace(TRACE.topk_ids[:0], 8, batches=recorded)
    of_trace = trace_batches(trace, SHAPE)
    assert [b.num_tokens for b in of_trace] == [3, 13, 265, 4, 15]
    assert {b.routing for b in of_trace} == {"trace recorded"}
    assert of_trace[3].topk_ids(SHAPE).shape == (4, 2)
    assert of_trace[3].histogram(SHAPE).tolist() == recorded[1].histogram.tolist()
    monkeypatch.setattr(live_module, "MAX_TOKENS", 14)
    assert [b.num_tokens for b in trace_batches(trace, SHAPE)] == [3, 13, 4]


def test_a_trace_is_measured_too(live: Live) -> None:
    found = live.compare(trace=TRACE)
    of_trace = trace_batches(TRACE, SHAPE)
    sizes = [1, 4, 16, 64, 256, 64, 256]
    assert [b.num_tokens for b in of_trace[: len(sizes)]] == sizes
    assert [b.routing for b in of_trace[: len(sizes)]] == ["trace decode"] * 5 + ["trace prefill"] * 2
    kinds = [(b.routing, b.num_tokens) for b in of_trace]
    # of 256 tokens there is one step, of the others as many as are asked for, from the first to the last
    assert {kinds.count(k) for k in kinds if k[1] < 256} == {STEPS}
    assert {kinds.count(k) for k in kinds if k[1] == 256} == {1}
    assert {b.seed for b in of_trace if (b.routing, b.num_tokens) == ("trace decode", 16)} == {0, 8, 17}
    batches = [b for b in found.batches if b.routing.startswith("trace")]
    assert [(b.routing, b.tokens) for b in batches] == kinds
    in_turns = [b for pair in zip(HELD_OUT, of_trace, strict=False) for b in pair]
    check_choices(found, [*in_turns, *HELD_OUT[len(of_trace) :]], live.sweep())
    assert found.noise is not None
    assert found.noise.batches == len(found.batches)


def test_batches_that_the_profile_was_fitted_on_are_not_held_out(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another draw may give the same routing."""
    fitted = replace(next(b for b in PROFILED if b.split == "tune"), split="test")
    monkeypatch.setattr(live_module, "held_out", lambda shape, first_seed: [fitted, *HELD_OUT])
    found = live.compare()
    assert [(b.tokens, b.routing) for b in found.batches] == [(b.num_tokens, b.routing) for b in HELD_OUT]


def test_a_short_trace() -> None:
    requests = np.array([0, 0, 0, 1, 1])
    found = trace_batches(Trace(TRACE.topk_ids[:5], None, requests), SHAPE)
    assert [(b.routing, b.num_tokens, b.seed) for b in found] == [
        ("trace decode", 1, 0),
        ("trace decode", 1, 2),
        ("trace decode", 1, 4),
    ]
    assert np.array_equal(found[1].topk_ids(SHAPE), TRACE.topk_ids[2:3])


def test_a_trace_of_another_shape_is_refused_before_anything_is_measured(live: Live) -> None:
    with pytest.raises(RoutingError, match="the trace names 2 of 16 experts a token, tiny 2 of 8"):
        live.compare(trace=replace(TRACE, num_experts=16))
    assert not live.script.log.exists()


def test_minutes(live: Live) -> None:
    """Held-out batches and those of the trace take turns."""
    found = live.compare(trace=TRACE, minutes=0)
    assert len(found.batches) == 8
    assert [b.routing.startswith("trace") for b in found.batches] == [False, True] * 4


def test_after_several_runs_of_the_profile(live: Live) -> None:
    for _ in range(2):
        live.profiled.run()
    assert len(live.sweep().record.runs) == 3
    found = live.compare()
    check_choices(found, HELD_OUT, live.sweep())
    assert found.noise is not None
    assert found.noise.batches == len(HELD_OUT)


@pytest.mark.parametrize("run", [1, 2])
def test_what_fails_is_left_out_with_a_note(live: Live, run: int) -> None:
    fails = replace(live.script, acts={"time/bm16-b/96": "raises"})
    found = live.compare(scripts=[live.script] * (run - 1) + [fails])
    assert "sim/bm16-b left out: cannot be timed: ValueError: wrong by far" in found.notes
    assert "sim: 1 of 6 configurations left out, the sweep has no times for them (path)" in found.notes
    shown = {p.config for b in found.batches for p in (b.static, b.histogram, b.best) if p}
    assert "bm16-b" not in shown
    assert len(found.batches) == len(HELD_OUT)
    assert found.noise is not None
    assert found.noise.batches == len(HELD_OUT)


class Gone(Simulated):
    def path_us(self, config: KernelConfig, histogram: Any) -> float:
        raise RuntimeError("gone")


def test_a_kernel_of_which_everything_fails_is_left_out(live: Live) -> None:
    kernels = Simulated(), Simulated("other", slower=0.5)
    replace(live.profiled, kernels=kernels).run()
    both = live.compare(*kernels)
    assert sorted(both.kernels) == ["other", "sim"]
    assert {b.best.kernel for b in both.batches if b.best} == {"other"}
    found = live.compare(Simulated(), Gone("other"))
    assert found.kernels == ["sim"]
    assert [s["kernel"] for s in found.sources] == ["sim"]
    assert any(
        n.startswith("other/bm16-a, ") and n.endswith("cannot be timed: RuntimeError: gone") for n in found.notes
    )
    assert "other left out: none of its configurations can be measured" in found.notes


def test_all_fail(live: Live) -> None:
    with pytest.raises(ProfileError, match="none of 5 configurations can be measured") as e:
        live.compare(Gone())
    # the journal lay in a folder that is gone
    assert str(e.value).endswith("; nothing is kept of a live comparison")
    assert ".journal" not in str(e.value)


def test_a_gpu_that_gives_up_is_told_without_advice_to_go_on(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MAX_LOST", 2)
    live.script = replace(live.script, acts={f"check/bm16-{k}": "breaks the context" for k in "ab"})
    with pytest.raises(ProfileError, match=r"2 configurations in a row broke .* nothing is kept of a live comp") as e:
        live.compare()
    assert "goes on" not in str(e.value)


def test_a_profile_of_another_version_is_noted(live: Live) -> None:
    assert "sim 2 was measured, its profile is of 1" in live.compare(Simulated(version="2")).notes
    assert not any("was measured" in n for n in live.compare().notes)


def test_a_profile_of_stages_alone_is_refused(live: Live) -> None:
    live.sweep().only(["gemm"]).save(live.place())
    with pytest.raises(
        ProfileError, match="the recorded times of sim are of gemm, not of whole paths; run `ramp-moe p"
    ):
        live.compare()
    assert not live.script.log.exists()


def test_a_profile_without_batches_to_fit_on_is_refused(live: Live) -> None:
    sweep = live.sweep()
    sweep.select(sweep.batches_of("test")).save(live.place())
    with pytest.raises(ProfileError, match="the profile of sim has no batches to fit on; run `ramp-moe profile` first"):
        live.compare()
    assert not live.script.log.exists()


def test_ctrl_c_leaves_nothing(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    class Interrupting(Silent):
        def at(self, done: int, doing: str, spent: float) -> None:
            if done == 3:
                assert list(temporary.rglob("*.journal"))
                raise KeyboardInterrupt

    live.progress = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        live.compare()
    assert list(temporary.iterdir()) == []
