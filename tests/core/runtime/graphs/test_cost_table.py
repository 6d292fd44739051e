"""A cost model as arrays says what the model says."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import RECORDED
from ramp_moe import Hardware, ProfileStore, Registry, expert_histogram, generate
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.errors import KernelError
from ramp_moe.evaluation.replay import load_replay
from ramp_moe.runtime.graphs.cost_table import CostTable
from ramp_moe.spec.routing import FloatArray
from select_cases import by_hand
from tiers import slow_except


def check(table_us: FloatArray, us: FloatArray, tolerance: float) -> None:
    """A table has the model's times, but for the one factor of a batch that lies below the roofline."""
    lift = us[0] / table_us[0]
    assert lift > 1 - tolerance
    assert table_us * lift == pytest.approx(us, rel=tolerance)


@pytest.mark.parametrize("form", ["paper", "ceil", "active", "smooth"])
@pytest.mark.parametrize("kernels", [("cute",), ("triton",), ("alpha_moe", "deep_gemm", "triton")], ids=" + ".join)
@pytest.mark.parametrize("model", slow_except(RECORDED[:1], RECORDED))
def test_it_costs_what_the_model_does(
    registry: Registry, shipped: ProfileStore, h200: Hardware, model: str, kernels: tuple[str, ...], form: str
) -> None:
    replay = load_replay(registry, shipped, registry.shape(model, "fp8"), h200, kernels)
    fitted = replay.fit(form=form)
    table = CostTable.of(fitted, fitted.contenders.tolist())
    assert table.num_candidates == len(fitted.contenders)
    rng = np.random.default_rng(0)
    random = rng.poisson(rng.uniform(0, 40, (20, 1)), (20, fitted.num_experts))
    for histogram in (*replay.histograms[::9], *random, np.zeros(fitted.num_experts, np.int64)):
        us = by_hand(table, histogram)
        check(us, fitted.cost(histogram)[fitted.contenders], 1e-3)
        assert us[fitted.contenders == fitted.choose(histogram)[0]] == pytest.approx(us.min(), rel=1e-3)


def test_some_of_the_candidates(registry: Registry, shipped: ProfileStore, h200: Hardware) -> None:
    replay = load_replay(registry, shipped, registry.shape("olmoe-1b-7b", "fp8"), h200, ("alpha_moe", "triton"))
    fitted = replay.fit(form="active")
    columns = [70, 3, 11]
    histogram = replay.histograms[5]
    us = by_hand(CostTable.of(fitted, columns), histogram)
    check(us, fitted.cost(histogram)[columns], 1e-4)
    with pytest.raises(KernelError, match="512 candidates at most, not 520: give fewer"):
        CostTable.of(fitted, [0] * 520)
    smooth = replay.fit()
    (outsider, *_) = sorted({*range(len(smooth.candidates))} - {*smooth.contenders.tolist()})
    with pytest.raises(KernelError, match=re.escape(f"{smooth.candidates[outsider].name} is no contender")):
        CostTable.of(smooth, [outsider])


@pytest.mark.slow
def test_a_shape_without_a_profile(registry: Registry, shipped: ProfileStore, h200: Hardware) -> None:
    """A path is the sum of a part with grids and one without."""
    model, _ = load_model(registry, shipped, registry.shape("qwen3-235b-a22b", "fp8"), h200)
    columns = model.contenders[:: len(model.contenders) // 8].tolist()
    table = CostTable.of(model, columns)
    for kind in ("uniform", "zipf1.2", "one-hot"):
        histogram = expert_histogram(generate(kind, 300, 128, 8), 128)
        check(by_hand(table, histogram), model.cost(histogram)[columns], 1e-4)
