"""Which layouts the weights are held in: by predicted times, or by preference; what that takes, and what it leaves."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pytest
from ramp_moe import Hardware, Kernel, KernelConfig, KernelError, MoEShape, ProfileStore, Registry, WeightLayout
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.dispatch.weight_layouts import (
    UNIFORM_TOKENS,
    LayoutChoice,
    choose_layouts,
    kernel_times,
    weighed_batches,
    why_not_served,
)
from ramp_moe.evaluation.replay import Replay
from ramp_moe.spec.kernel import LAYOUTS, layouts_of

GATE_FIRST, INTERLEAVED, UP_FIRST = LAYOUTS
SHAPE = MoEShape(8, 2, 256, 128, "bf16")
GATE_UP, DOWN = 8 * 2 * 256 * 128 * 2, 8 * 256 * 128 * 2


class Reads(Kernel):
    def __init__(self, name: str, *layouts: str, size: int = GATE_UP + DOWN) -> None:
        self.name, self.layouts, self.size = name, layouts, size

    def configs(self, shape: MoEShape, hardware: Hardware) -> Iterable[KernelConfig]:
        return ()

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout(self.layouts[0], self.size)

    def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
        return self.layouts


ANY, GATE, MIXED, UP, TILED = (
    Reads("any", *LAYOUTS),
    Reads("gate", GATE_FIRST),
    Reads("mixed", INTERLEAVED),
    Reads("up", UP_FIRST),
    Reads("tiled", "tiled", size=1000),
)


def choose(*kernels: Kernel, us: list[list[float]] | None = None, copies: int = 1, **options: str) -> LayoutChoice:
    return choose_layouts(SHAPE, kernels, copies, None if us is None else np.array(us), **options)


def test_by_default_a_kernel_reads_what_it_wants() -> None:
    class Plain(Reads):
        readable_layouts = Kernel.readable_layouts

    assert Plain("plain", UP_FIRST).readable_layouts(SHAPE) == (UP_FIRST,)


def test_the_kernels_of_the_library(registry: Registry, olmoe: MoEShape) -> None:
    read = {name: layouts_of(registry.kernel(name), olmoe) for name in ("alpha_moe", "triton", "vllm_triton")}
    assert read == {"alpha_moe": (INTERLEAVED,), "triton": LAYOUTS, "vllm_triton": (GATE_FIRST,)}
    for name, layouts in read.items():
        assert layouts[0] == registry.kernel(name).weight_layout(olmoe).key


def test_one_layout_that_all_read() -> None:
    for kernels in ((MIXED, ANY), (ANY, MIXED)):
        for us in (None, [[1.0, 2.0], [2.0, 1.0]]):
            for copies in (1, 2, 3):
                found = choose(*kernels, us=us, copies=copies)
                assert (found.layouts, found.kernels) == ((INTERLEAVED,), tuple(k.name for k in kernels))
                assert (found.loss, found.bytes) == (0.0, GATE_UP + DOWN)


def test_the_layout_given_is_kept_where_it_costs_nothing() -> None:
    for given in LAYOUTS:
        assert choose(ANY, given=given).layouts == (given,)
        assert choose(ANY, us=[[1.0]], copies=2, given=given).layouts == (given,)
    assert choose(MIXED, given=UP_FIRST).layouts == (INTERLEAVED,)


def test_by_preference_without_times() -> None:
    assert choose(GATE, MIXED).kernels == ("gate",)
    assert choose(MIXED, GATE).kernels == ("mixed",)
    # The first, then the second if it can be: gate-first would serve two as well.
    assert choose(ANY, MIXED, GATE).kernels == ("any", "mixed")
    found = choose(GATE, MIXED, UP, copies=2)
    assert (found.kernels, found.bytes) == (("gate", "mixed"), 2 * GATE_UP + DOWN)
    assert choose(GATE, MIXED, UP, copies=9).kernels == ("gate", "mixed", "up")


def test_the_least_loss_with_times() -> None:
    us = [[10.0, 20.0, 30.0], [40.0, 20.0, 30.0]]  # gate, mixed, up
    one = choose(GATE, MIXED, UP, us=us)
    # gate loses 0 and 1, mixed 1 and 0, up 2 and a half: the first of equal ones.
    assert (one.layouts, one.kernels, one.loss) == ((GATE_FIRST,), ("gate",), 0.5)
    assert choose(MIXED, GATE, UP, us=[[b, a, c] for a, b, c in us], given=UP_FIRST).kernels == ("mixed",)
    two = choose(GATE, MIXED, UP, us=us, copies=2)
    assert (set(two.kernels), two.loss) == ({"gate", "mixed"}, 0)
    assert choose(GATE, MIXED, UP, us=us, copies=3) == two, "a third copy gains nothing"
    slow = [[10.0, 11.0, 30.0], [40.0, 30.0, 60.0]]
    assert choose(GATE, MIXED, UP, us=slow).kernels == ("mixed",)
    assert choose(GATE, MIXED, UP, us=slow).loss == pytest.approx(0.05)


def test_a_kernel_without_times_does_not_count() -> None:
    assert choose(GATE, MIXED, us=[[np.inf, 5.0]]).kernels == ("mixed",)
    assert choose(GATE, MIXED, ANY, us=[[np.inf, 5.0, 5.0]], copies=2).layouts == (GATE_FIRST,), "any is as good"


def test_a_format_of_its_own_is_a_copy_of_its_own_size() -> None:
    assert choose(TILED).bytes == 1000
    assert choose(TILED, GATE, copies=2).bytes == 1000 + GATE_UP + DOWN
    assert choose(TILED, GATE).kernels == ("tiled",)


def test_what_cannot_be_chosen_for() -> None:
    with pytest.raises(KernelError, match="no kernel to choose"):
        choose()
    with pytest.raises(KernelError, match="at least one copy, not 0"):
        choose(GATE, copies=0)
    with pytest.raises(KernelError, match="kernel none must name weight layouts"):
        choose_layouts(SHAPE, [Reads("none")])

    class Broken(Reads):
        def readable_layouts(self, shape: MoEShape) -> tuple[str, ...]:
            raise ZeroDivisionError("oops")

    with pytest.raises(KernelError, match="kernel bad fails to name its weight layouts: ZeroDivisionError: oops"):
        choose(Broken("bad", GATE_FIRST))


def test_why_a_kernel_is_not_served() -> None:
    def why(kernel: Kernel, *kernels: Kernel, copies: int = 1, us: list[list[float]] | None = None) -> str:
        return why_not_served(SHAPE, kernels, kernel, copies, None if us is None else np.array(us), GATE_FIRST)

    start = f"reads weights in {INTERLEAVED}, which are held in {GATE_FIRST} alone; "
    assert why(MIXED, GATE, MIXED) == start + "copies=2 would keep it"
    assert why(UP, GATE, MIXED, UP).endswith(f"held in {GATE_FIRST} alone; copies=3 would keep it")
    assert why(UP, GATE, MIXED, UP, copies=2).endswith("copies=3 would keep it")
    assert why(MIXED, GATE, MIXED, us=[[3.0, 2.0], [1.0, 3.0]]) == start + "copies=2 would keep it"
    assert why(MIXED, GATE, MIXED, us=[[1.0, 2.0]]) == start + "a copy for it would gain nothing by the cost model"


def test_batches_are_those_of_the_profile(registry: Registry, replay: Replay, store: ProfileStore) -> None:
    model = replay.fit()
    assert model.histograms is not None
    assert np.array_equal(weighed_batches(model), replay.histograms)
    assert weighed_batches(model.restrict(["alpha_moe"])) is model.histograms
    loaded, _ = load_model(registry, store, replay.shape, replay.hardware, ["alpha_moe"])
    assert np.array_equal(weighed_batches(loaded), replay.histograms)
    model.histograms = None
    drawn = weighed_batches(model)
    assert drawn.sum(1).tolist() == [8 * t for t in UNIFORM_TOKENS]
    assert UNIFORM_TOKENS[-1] == 4096
    assert np.array_equal(weighed_batches(model), drawn)


def test_times_of_a_kernel_are_those_of_its_best_candidate(replay: Replay) -> None:
    model = replay.fit()
    histograms = replay.histograms[:5]
    us = kernel_times(model, ["alpha_moe", "nobody"], histograms)
    assert np.array_equal(us[:, 0], model.cost(histograms).min(1))
    assert np.isinf(us[:, 1]).all()


def test_a_reason_names_every_layout_that_is_read() -> None:
    both = Reads("both", UP_FIRST, INTERLEAVED)
    found = why_not_served(SHAPE, [GATE, both], both, 1, None, GATE_FIRST)
    assert re.match(rf"reads weights in {UP_FIRST} or {INTERLEAVED}, which", found)
