"""What a calibration makes of a plan: compiled in time, kept, in one order of rows, and told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from graph_cases import SHAPE, priced, triton_of
from ramp_moe import Hardware, KernelError
from ramp_moe.cost_model.model import join
from ramp_moe.measurements.calibration_file import CalibrationRecord, PlanRow, Timing, load, locked, save
from ramp_moe.measurements.plan_table import table
from ramp_moe.runtime import calibrated_plan
from ramp_moe.runtime.calibrated_plan import LATE, best_layout, calibrated, compile_ahead, fastest_layout, measured
from ramp_moe.runtime.calibration import ENGINE, ROUTINGS, Calibration, Search
from ramp_moe.runtime.layer_factory import LayerPlan
from ramp_moe.runtime.plan_report import left, plan_rows
from ramp_moe.spec.kernel import BuildableKernel, Built, KernelConfig, Progress
from ramp_moe_kernels.triton.kernel import TritonMoE
from test_calibration import FakeTimer

SIZES = (1, 16, 256)
KEY = {"shape": SHAPE.slug, "gpu": "NVIDIA H200", "engine": "vLLM"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMP_MOE_CACHE", str(tmp_path))


def search_of(hardware: Hardware, found: Calibration | None = None, kernel: Any = None) -> Search:
    kernel = kernel or TritonMoE()
    return Search(SHAPE, hardware, [kernel], priced(hardware, triton_of(kernel=kernel)), SIZES, known=found)


class Buildable(TritonMoE, BuildableKernel):
    """Notes what it is to compile; `answers` has reasons, by part of the name."""

    name = "buildable"

    def __init__(self, **answers: str) -> None:
        self.asked: list[str] = []
        self.answers = answers

    def build(self, *_: Any) -> Built:
        raise NotImplementedError

    def prune(self) -> int:
        return 0

    def build_some(self, configs: Sequence[KernelConfig], report: Progress) -> dict[str, str]:
        self.asked += [c.name for c in configs]
        for i, config in enumerate(configs):
            report(i + 1, len(configs), config.name)
        return {c.name: reason for c in configs for part, reason in self.answers.items() if part in c.name}


def test_what_the_search_begins_with_is_compiled_before(h200: Hardware) -> None:
    kernel = Buildable()
    search, said = search_of(h200, kernel=kernel), list[str]()
    compile_ahead(search, [kernel], math.inf, said.append)
    assert kernel.asked == [c.config.name for c in search.wanted()]
    assert said[-1].startswith(f"compiled {len(kernel.asked)} of {len(kernel.asked)} configurations of buildable (")


def test_what_is_not_compiled_in_time_is_left_out(h200: Hardware) -> None:
    kernel = Buildable()
    search, said = search_of(h200, kernel=kernel), list[str]()
    wanted = search.wanted()
    compile_ahead(search, [kernel], -math.inf, said.append)
    assert not kernel.asked
    assert search.found.dropped == {c.name: LATE for c in wanted}
    (line,) = said
    assert line == f"{len(wanted)} configurations of buildable left out: {LATE}"


def test_what_cannot_be_compiled_is_left_out(h200: Hardware) -> None:
    kernel = Buildable(bm16="it spills registers")
    search = search_of(h200, kernel=kernel)
    compile_ahead(search, [kernel], math.inf, lambda line: None)
    assert set(search.found.dropped.values()) <= {"it spills registers"}
    timer = FakeTimer(lambda name, n: 10.0)
    search.run(timer, math.inf)
    assert not {name for name, _ in timer.asked} & search.found.dropped.keys()


def test_without_a_compiler_the_search_goes_on(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Buildable()
    search, said = search_of(h200, kernel=kernel), list[str]()

    def none(*_: Any) -> dict[str, str]:
        raise KernelError("nvidia-cutlass-dsl is missing")

    monkeypatch.setattr(kernel, "build_some", none)
    compile_ahead(search, [kernel], math.inf, said.append)
    assert said == ["buildable: nvidia-cutlass-dsl is missing"]
    assert not search.found.dropped


def test_a_search_that_was_cut_short_goes_on(h200: Hardware) -> None:
    timer = FakeTimer(lambda name, n: 10.0)
    some = [Timing(1, r, ENGINE, 10.0) for r in ROUTINGS]
    save(CalibrationRecord(key=KEY, complete=False, seconds=3.0, timings=some, dropped={"triton/x": LATE}))
    record = measured(KEY, lambda found: search_of(h200, found), lambda: timer, 1e9, lambda line: None)
    assert record.complete
    assert not record.dropped, "what had no time before is tried again"
    assert (ENGINE, 1) not in timer.asked
    assert record.seconds >= 3.0
    assert load(KEY) == record


def test_what_was_not_compiled_in_time_is_measured_by_the_next_start(
    h200: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if everything else was measured: what is said of it, to compile it ahead, must help."""
    kernel, timer = Buildable(), FakeTimer(lambda name, n: 10.0)

    def search(found: Calibration | None) -> Search:
        model = join([priced(h200, triton_of(kernel=k)) for k in (kernel, TritonMoE())])
        return Search(SHAPE, h200, [kernel, TritonMoE()], model, SIZES, known=found)

    with monkeypatch.context() as patch:
        patch.setattr(calibrated_plan, "COMPILING", -1.0)
        record = measured(KEY, search, lambda: timer, 1e9, lambda line: None, [kernel])
    assert set(record.dropped.values()) == {LATE}
    assert not record.complete
    left, before = set(record.dropped), len(timer.asked)
    record = measured(KEY, search, lambda: timer, 1e9, lambda line: None, [kernel])
    assert record.complete
    assert not record.dropped
    assert {name for name, _ in timer.asked[before:]} == left


def test_what_another_process_found_meanwhile_is_used(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short or not: a server of many ranks starts in the time of one."""
    record = CalibrationRecord(
        key=KEY, complete=False, seconds=20.0, timings=[Timing(1, r, "a", 1.0) for r in ROUTINGS]
    )
    save(record)
    now = iter([0.0, 19.0])
    monkeypatch.setattr(calibrated_plan, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(calibrated_plan, "locked", lambda key, limit: nullcontext(True))
    timer = FakeTimer(lambda name, n: 10.0)
    assert measured(KEY, search_of_(h200), lambda: timer, 20.0, lambda line: None) == record
    assert not timer.asked


def test_another_process_is_not_waited_for_without_end(h200: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with locked(KEY, 0) as held, locked(KEY, 0) as again:
        assert held
        assert not again
    monkeypatch.setattr(calibrated_plan, "locked", lambda key, limit: nullcontext(False))
    record = measured(KEY, search_of_(h200), lambda: FakeTimer(lambda name, n: 10.0), 20.0, said.append)
    assert said[0] == f"another process has measured {SHAPE.slug} for over 20 s; it is not waited for"
    assert record.timings


def search_of_(hardware: Hardware) -> Any:
    return lambda found: search_of(hardware, found)


def timings(**us: tuple[float, ...]) -> Calibration:
    """By kernel, at 1, 16 and 256 tokens."""
    return Calibration(
        [
            Timing(n, r, ENGINE if name == "engine" else f"{name}/a", t)
            for name, times in us.items()
            for n, t in zip(SIZES, times, strict=True)
            for r in ROUTINGS
        ]
    )


READS = {"first": ("gate-first",), "any": ("gate-first", "up-first"), "up": ("up-first",)}


@pytest.mark.parametrize(
    ("us", "layout"),
    [
        ({"engine": (9, 9, 9), "any": (8, 8, 8), "up": (7, 7, 7)}, "up-first"),
        ({"engine": (9, 9, 9), "any": (8, 8, 8), "up": (7.95, 7.95, 7.95)}, "gate-first"),
        ({"engine": (6, 9, 9), "any": (8, 8, 8), "up": (7, 4, 4)}, "gate-first"),
        ({"engine": (9, 9, 9), "first": (8, 8, 8)}, "gate-first"),
        ({"engine": (9, 9, 9), "any": (8, 8, 8)}, "gate-first"),
        ({"up": (7, 7, 7)}, "up-first"),
    ],
)
def test_the_order_of_rows_is_the_engines_unless_another_is_faster_everywhere(
    us: dict[str, tuple[float, ...]], layout: str
) -> None:
    assert best_layout(timings(**us), READS, "gate-first") == layout


@pytest.mark.parametrize(
    ("us", "layout"),
    [
        ({"first": (9, 9, 9), "own": (8, 8, 8)}, "own/format"),
        ({"first": (9, 9, 9), "own": (10, 8, 8)}, "own/format"),
        ({"first": (9, 9, 9), "own": (10, 10, 8.5)}, "gate-first"),
        ({"first": (9, 9), "own": (10, 8, 1)}, "own/format"),
        ({"first": (9,), "own": (10, 8, 1)}, "gate-first"),
        ({}, "gate-first"),
    ],
)
def test_the_fastest_format_is_that_over_the_sizes_at_which_all_were_timed(
    us: dict[str, tuple[float, ...]], layout: str
) -> None:
    found = Calibration(
        [Timing(n, r, f"{k}/a", t) for k, of in us.items() for n, t in zip(SIZES, of, strict=False) for r in ROUTINGS]
    )
    assert fastest_layout(found, {"first": ("gate-first",), "own": ("own/format",)}, "gate-first") == layout


def test_only_what_was_timed_is_in_the_plan(h200: Hardware) -> None:
    search = search_of(h200)
    search.run(FakeTimer(lambda name, n: 10.0 if name != ENGINE else (20.0, 5.0)[n > 16]), math.inf)
    made = calibrated(search, LayerPlan(h200, [TritonMoE()], search.model), [TritonMoE()], "gate-first")
    assert made.plan.model is not None
    assert {c.name for c in made.plan.model.candidates} == search.found.timed
    assert [made.keeps(n) for n in SIZES] == [False, False, True]
    assert made.keeps_any
    rows = plan_rows(made, None, [1, 2, 16], [256], 1)
    assert [r.choice == ENGINE for r in rows] == [False, False, False, True]
    assert [r.engine_us for r in rows] == [20.0, None, 20.0, 5.0]
    assert rows[0].measured_us == pytest.approx(10.0)
    assert left(made, rows, "vLLM") == "vLLM's own path keeps 256 tokens: nothing is 2% faster"


def test_without_times_the_report_has_those_that_are_predicted(h200: Hardware) -> None:
    model = priced(h200, triton_of())
    made = calibrated_plan.predicted(LayerPlan(h200, [TritonMoE()], model))
    assert not made.keeps_any
    rows = plan_rows(made, None, [1], [256], 1)
    assert all(r.choice and r.measured_us is None and r.engine_us is None for r in rows)
    assert all(r.predicted_us is not None and r.predicted_us > 20 for r in rows)
    assert left(made, rows, "vLLM") == ""


def test_a_plan_without_a_kernel(h200: Hardware) -> None:
    other = Buildable()
    model = join([priced(h200, triton_of()), priced(h200, triton_of(kernel=other))])
    plan = LayerPlan(h200, [TritonMoE(), other], model)
    assert calibrated_plan.without(plan, ["strange"]) is plan
    less = calibrated_plan.without(plan, ["buildable"])
    assert [k.name for k in less.kernels] == ["triton"]
    assert less.model is not None
    assert {c.kernel for c in less.model.candidates} == {"triton"}
    assert calibrated_plan.without(LayerPlan(h200, [TritonMoE(), other], None), ["triton"]).kernels == [other]
    with pytest.raises(KernelError, match="no kernel is left without triton, buildable"):
        calibrated_plan.without(plan, ["triton", "buildable"])


def test_a_record_is_renewed_only_where_it_was_kept() -> None:
    record, said = CalibrationRecord(key=KEY, complete=True, seconds=1, timings=[]), list[str]()
    calibrated_plan.renew(record, said.append)
    assert load(KEY) is None
    save(record)
    record.left = "nothing"
    calibrated_plan.renew(record, said.append)
    assert load(KEY) == record
    assert not said


def test_sizes_that_are_treated_alike_share_a_line() -> None:
    rows = [
        PlanRow(1, "a", "single", 1, 5.0, 5.5, 6.0, 0.0),
        PlanRow(2, "a", "single", 1, 5.0, None, None, None),
        PlanRow(3, "a", "nodes", 2, 5.0, 5.25, 6.0, 7.0),
        PlanRow(4, "", "single", 1, None, None, 9.0),
    ]
    lines = [line.split() for line in table(rows, "vLLM")]
    assert lines[1:] == [
        ["1-2", "a", "single", "1", "5.0", "us", "5.5", "us", "6.0", "us", "0.0", "us"],
        ["3", "a", "nodes", "2", "5.0", "us", "5.2", "us", "6.0", "us", "7.0", "us"],
        ["4", "vLLM's", "own", "single", "1", "9.0", "us"],
    ]


def test_the_lock_is_held_while_measuring(h200: Hardware) -> None:
    held: list[bool] = []

    def us(name: str, n: int) -> float:
        with locked(KEY, 0) as mine:
            held.append(mine)
        return 10.0

    measured(KEY, search_of_(h200), lambda: FakeTimer(us), 1e9, lambda line: None)
    assert held
    assert not any(held)
