"""Searching for the fastest candidate with a timer, and what is chosen after it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graph_cases import SHAPE, priced, triton_of
from hypothesis import given, settings
from hypothesis import strategies as st
from ramp_moe import Candidate, CostModel, Hardware, KernelError
from ramp_moe.dispatch.shortlist import choice_by_batch_size
from ramp_moe.measurements.calibration_file import Timing
from ramp_moe.runtime.calibration import ENGINE, MARGIN, ROUTINGS, Calibration, Search, coarse_first, spread
from ramp_moe.spec.routing import IntArray
from ramp_moe_kernels.triton.kernel import TritonMoE

SIZES = (1, 16, 256)


class Clock:
    """A second a call."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


class FakeTimer:
    """Takes what `us` says of a candidate's name and the number of tokens."""

    def __init__(self, us: Callable[[str, int], float]) -> None:
        self.us = us
        self.asked: list[tuple[str, int]] = []

    def time(self, candidate: Candidate | None, topk_ids: IntArray) -> float:
        name = ENGINE if candidate is None else candidate.name
        self.asked.append((name, len(topk_ids)))
        return self.us(name, len(topk_ids))


@pytest.fixture
def model(h200: Hardware) -> CostModel:
    return priced(h200, triton_of())


def searched(
    hardware: Hardware, model: CostModel | None, timer: Any, known: Calibration | None = None, limit: float = 1e9
) -> Search:
    search = Search(SHAPE, hardware, [TritonMoE()], model, SIZES, known=known)
    search.run(timer, limit, Clock())
    return search


def test_a_size_has_a_choice_that_was_timed_there_whatever_fails_and_whenever_time_is_over(h200: Hardware) -> None:
    """Also if what was timed there has failed at another size since."""

    @settings(max_examples=25, deadline=None)
    @given(st.randoms(use_true_random=False), st.integers(2, 60))
    def check(drawn: Any, limit: int) -> None:
        fails_from: dict[str, int] = {}

        def us(name: str, tokens: int) -> float:
            if name != ENGINE and tokens >= fails_from.setdefault(name, drawn.choice([1, 16, 256, 1024])):
                raise KernelError("planted")
            return float(drawn.randint(1, 100))

        search = searched(h200, None, FakeTimer(us), limit=limit)
        assert all(any(search.found.us(c, n) is not None for c in search.found.timed) for n in search.found.tokens)
        if search.found.timed:
            for n, name in search.chosen(search.corrected()).items():
                assert search.found.us(name, n) is not None

    check()


def test_the_search_ends_with_a_choice_that_was_timed(h200: Hardware, model: CostModel) -> None:
    """Whatever the times are, at each size; and no other that was timed is expected to be faster."""

    @settings(max_examples=25, deadline=None)
    @given(st.dictionaries(st.tuples(st.sampled_from([c.name for c in model.candidates]), st.sampled_from(SIZES)),
                           st.floats(1, 1e4)))  # fmt: skip
    def check(times: dict[tuple[str, int], float]) -> None:
        timer = FakeTimer(lambda name, n: times.get((name, n), 50.0))
        search = searched(h200, model, timer)
        assert search.found.complete
        corrected = search.corrected()
        for n, name in search.chosen(corrected).items():
            assert search.found.us(name, n) is not None
            found = choice_by_batch_size(corrected, n, np.inf)
            assert found is not None
            assert found.name == name, "so do layers choose"

    check()


def test_an_engine_without_a_path_of_its_own_is_not_timed(h200: Hardware, model: CostModel) -> None:
    timer = FakeTimer(lambda name, n: 10.0 + len(name))
    search = Search(SHAPE, h200, [TritonMoE()], model, SIZES, engine=False)
    search.run(timer, 1e9, Clock())
    assert ENGINE not in {name for name, _ in timer.asked}
    assert search.found.complete
    assert not search.found.engine_keeps(16, search.chosen(search.corrected()))


def test_nothing_is_timed_twice(h200: Hardware, model: CostModel) -> None:
    timer = FakeTimer(lambda name, n: 10.0 + len(name))
    searched(h200, model, timer)
    assert all(timer.asked.count(asked) == len(ROUTINGS) for asked in timer.asked)


def test_a_search_that_is_cut_short(h200: Hardware, model: CostModel) -> None:
    """It knows the engine's time and ours of sizes far apart, and goes on where it was."""
    timer = FakeTimer(lambda name, n: 10.0)
    half = searched(h200, model, timer, limit=5)
    assert not half.found.complete
    assert half.found.tokens == (SIZES[0], SIZES[-1])
    assert all(half.found.us(ENGINE, n) == 10.0 for n in (SIZES[0], SIZES[-1]))
    again = FakeTimer(lambda name, n: 10.0)
    assert searched(h200, model, again, known=half.found).found.complete
    assert not set(again.asked) & set(timer.asked)


@pytest.mark.parametrize("count", range(1, 20))
def test_sizes_far_apart_come_first(count: int) -> None:
    sizes = list(range(count))
    order = coarse_first(sizes)
    assert sorted(order) == sizes
    assert order[:2] == [0, count - 1][:count]
    for i in range(2, count):
        known = sorted(order[:i])
        widest = max(b - a for a, b in itertools.pairwise(known))
        around = [(a, b) for a, b in itertools.pairwise(known) if a < order[i] < b]
        assert around[0][1] - around[0][0] >= widest - 1


def test_what_fails_is_dropped_and_the_next_best_is_timed(h200: Hardware, model: CostModel) -> None:
    calm = searched(h200, model, FakeTimer(lambda name, n: 10.0))
    first = calm.chosen(calm.corrected())[16]

    def fails(name: str, n: int) -> float:
        if name == first:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return 10.0

    found = searched(h200, model, FakeTimer(fails)).found
    assert found.dropped == {first: "RuntimeError: CUDA error: unspecified launch failure"}
    assert first not in found.timed
    assert found.complete
    assert found.tokens == SIZES


def test_if_everything_fails_there_is_no_model(h200: Hardware, model: CostModel) -> None:
    def fails(name: str, n: int) -> float:
        raise KernelError("wrong output: relative error nan of output, allowed are 0.01")

    search = searched(h200, model, FakeTimer(fails))
    assert ENGINE in search.found.dropped
    with pytest.raises(KernelError, match=r"nothing could be timed .*wrong output: relative error nan"):
        search.corrected()
    assert not search.found.engine_keeps(16, {})


@pytest.mark.parametrize("us", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("whose", ["engine", "ours"])
def test_a_time_that_no_launch_takes_is_a_failure(h200: Hardware, model: CostModel, whose: str, us: float) -> None:
    """Its logarithm would decide for every size."""
    calm = searched(h200, model, FakeTimer(lambda name, n: 10.0))
    wrong = ENGINE if whose == "engine" else calm.chosen(calm.corrected())[16]
    search = searched(h200, model, FakeTimer(lambda name, n: us if name == wrong else 10.0))
    assert search.found.dropped == {wrong: f"the GPU's clock says that it takes {us:g} us"}
    corrected = search.corrected()
    assert wrong not in search.chosen(corrected).values()
    assert not search.found.engine_keeps(16, search.chosen(corrected)) or whose == "ours"


@pytest.mark.parametrize("count", [1, 3])
def test_a_time_of_another_number_of_routings_is_no_endless_search(
    h200: Hardware, model: CostModel, count: int
) -> None:
    """One is measured again; of two alike the later counts."""
    some = [Timing(16, ROUTINGS[i % len(ROUTINGS)], ENGINE, 5.0 + i) for i in range(count)]
    timer = FakeTimer(lambda name, n: 10.0)
    search = searched(h200, model, timer, known=Calibration(some), limit=1000)
    assert search.found.complete
    assert search.found.us(ENGINE, 16) == (10.0 if count == 1 else 6.5)
    assert len(timer.asked) < 50


def test_what_lacked_memory_is_no_finding_for_good(h200: Hardware, model: CostModel) -> None:
    """Another process had it, maybe. What is wrong for sure is not tried again."""
    calm = searched(h200, model, FakeTimer(lambda name, n: 10.0))
    first = calm.chosen(calm.corrected())[16]

    def fails(name: str, n: int) -> float:
        if name == first:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 10.0

    search = searched(h200, model, FakeTimer(fails))
    assert first in search.found.dropped
    assert not search.found.complete
    assert first not in search.chosen(search.corrected()).values()


@pytest.mark.parametrize("engine", [True, False], ids=["the engine's own path", "all of ours"])
def test_where_the_engine_or_all_of_ours_fails_nothing_is_complete(
    h200: Hardware, model: CostModel, engine: bool
) -> None:
    """It says more of the GPU, or of the process, than of the candidates."""

    def fails(name: str, n: int) -> float:
        if (name == ENGINE) == engine:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 10.0

    assert not searched(h200, model, FakeTimer(fails)).found.complete


def test_without_a_profile_the_defaults_are_timed_first(h200: Hardware) -> None:
    kernel = TritonMoE()
    timer = FakeTimer(lambda name, n: 10.0 + len(name))
    searched(h200, None, timer)
    for n in SIZES:
        first = next(name for name, tokens in timer.asked if tokens == n and name != ENGINE)
        assert first == Candidate("triton", kernel.default_config(SHAPE, h200, n)).name
    assert len({name for name, _ in timer.asked}) > 5


def test_without_a_profile_the_fastest_that_was_timed_is_chosen(h200: Hardware) -> None:
    """Also where it was not the default, and between the sizes."""
    timer = FakeTimer(lambda name, n: (5.0 if hash_of(name, n) else 10.0) * n)
    search = searched(h200, None, timer)
    for n in SIZES:
        found = choice_by_batch_size(search.corrected(), n, np.inf)
        assert found is not None
        assert search.found.us(found.name, n) == min(
            us for name in search.found.timed if (us := search.found.us(name, n))
        )
    assert choice_by_batch_size(search.corrected(), 100, np.inf) is not None


def hash_of(name: str, n: int) -> bool:
    return (len(name) + n) % 3 == 0


def test_a_kernel_without_a_profile_takes_part(h200: Hardware, model: CostModel) -> None:
    class Strange(TritonMoE):
        name = "strange"

    search = Search(SHAPE, h200, [TritonMoE(), Strange()], model, SIZES)
    search.run(FakeTimer(lambda name, n: 1.0 if name.startswith("strange") else 10.0), 1e9, Clock())
    found = choice_by_batch_size(search.corrected(), 16, np.inf)
    assert found is not None
    assert found.kernel == "strange"
    search = Search(SHAPE, h200, [TritonMoE(), Strange()], model, SIZES)
    search.run(FakeTimer(lambda name, n: 30.0 if name.startswith("strange") else 10.0), 1e9, Clock())
    found = choice_by_batch_size(search.corrected(), 16, np.inf)
    assert found is not None
    assert found.kernel == "triton"


def test_candidates_of_a_kernel_that_does_not_run_here_are_not_tried(h200: Hardware, model: CostModel) -> None:
    """Its profile is of another machine, or a child process found it at fault."""

    class Strange(TritonMoE):
        name = "strange"

    timer = FakeTimer(lambda name, n: 10.0)
    search = Search(SHAPE, h200, [Strange()], model, SIZES)
    search.run(timer, 1e9, Clock())
    assert {name.split("/")[0] for name, _ in timer.asked} == {ENGINE, "strange"}
    assert {c.kernel for c in search.corrected().candidates} == {"strange"}


def of(*points: tuple[int, float, float]) -> Calibration:
    """(tokens, the engine's microseconds, ours)."""
    timings = [
        Timing(n, routing, name, us)
        for n, engine, ours in points
        for name, us in ((ENGINE, engine), ("a", ours))
        for routing in ROUTINGS
    ]
    return Calibration(timings)


ASKED = (1, 4, 7, 16, 64, 1000)


@pytest.mark.parametrize(
    ("points", "kept"),
    [
        ([(1, 10.0, 10.0)], ASKED),
        ([(1, 10.0, 10.0 / MARGIN * 1.001)], ASKED),
        ([(1, 10.0, 10.0 / MARGIN * 0.999)], ()),
        ([(1, 10.0, 5.0), (64, 10.0, 20.0)], (16, 64, 1000)),
        ([(1, 10.0, 20.0), (64, 10.0, 5.0)], (1, 4, 7)),
        ([], ()),
    ],
)
def test_the_engine_keeps_what_is_not_faster_by_the_margin(
    points: list[tuple[int, float, float]], kept: tuple[int, ...]
) -> None:
    """Between two sizes the ratio is interpolated."""
    assert tuple(n for n in ASKED if of(*points).engine_keeps(n, {p[0]: "a" for p in points})) == kept


def test_without_a_time_of_the_engine_nothing_is_kept() -> None:
    assert not Calibration([Timing(1, r, "a", 5.0) for r in ROUTINGS]).engine_keeps(1, {1: "a"})


def test_sizes_are_spread_up_to_the_largest() -> None:
    assert spread([1, 2, 48], 100) == [1, 2, 4, 8, 16, 32, 48, 64, 100]
    assert spread([], 1) == [1]
    assert spread([512], 8)[-1] == 8
