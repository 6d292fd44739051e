"""A cost model as arrays says what the model says."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import RECORDED
from ramp_moe import Hardware, ProfileStore, Registry
from ramp_moe.device.table import TERMS, CostTable
from ramp_moe.errors import KernelError
from ramp_moe.replay import load_replay
from ramp_moe.routing import FloatArray, IntArray


def by_hand(table: CostTable, histogram: IntArray) -> FloatArray:
    """Microseconds of the table's candidates, as its docstring says."""
    counts = np.ceil(histogram / table.blocks[:, None].astype(np.float64)).sum(-1)
    ctas = counts[table.grid_block] * table.grid_ctas
    waves = ctas / table.grid_slots

    def summed(per_grid: FloatArray) -> FloatArray:
        return np.asarray((per_grid * table.grid_work).sum(0)[table.launch_of])

    one = np.ones(len(table.floor))
    terms = {"one": one, "waves": summed(waves), "ceil_waves": summed(np.ceil(waves)), "ctas": summed(ctas),
             "log_ctas": np.log1p(summed(ctas)), "active": one * counts[-1]}  # fmt: skip
    part_us = np.maximum(table.floor, sum(c * terms[t] for c, t in zip(table.coefficients, TERMS, strict=True)))
    us = np.array([part_us[table.parts[a:b]].sum() for a, b in zip(table.first, table.first[1:], strict=False)])
    logs = np.log(np.maximum(counts, 1))
    for c, q in enumerate(table.set_of if len(table.unit) else ()):
        z = np.array([logs[0], logs[-1], logs[table.set_block[q]]]) * table.unit[q]
        away = np.sqrt(((z[:, None] - table.points[q]) ** 2).sum(0))
        us[c] *= np.exp(table.constant[c] + (table.weights[:, c] * away).sum())
    return us


@pytest.mark.parametrize("form", ["paper", "ceil", "active", "smooth"])
@pytest.mark.parametrize("kernels", [("alpha_moe",), ("triton",), ("alpha_moe", "deep_gemm", "triton")], ids=" + ".join)
@pytest.mark.parametrize("model", RECORDED)
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
        assert us == pytest.approx(fitted.cost(histogram)[fitted.contenders], rel=1e-3)
        assert us[fitted.contenders == fitted.choose(histogram)[0]] == pytest.approx(us.min(), rel=1e-3)


def test_some_of_the_candidates(registry: Registry, shipped: ProfileStore, h200: Hardware) -> None:
    replay = load_replay(registry, shipped, registry.shape("olmoe-1b-7b", "fp8"), h200, ("alpha_moe", "triton"))
    fitted = replay.fit(form="active")
    columns = [70, 3, 11]
    histogram = replay.histograms[5]
    us = by_hand(CostTable.of(fitted, columns), histogram)
    assert us == pytest.approx(fitted.cost(histogram)[columns], rel=1e-4)
    with pytest.raises(KernelError, match="512 candidates at most, not 520: give fewer"):
        CostTable.of(fitted, [0] * 520)
    smooth = replay.fit()
    (outsider, *_) = sorted({*range(len(smooth.candidates))} - {*smooth.contenders.tolist()})
    with pytest.raises(KernelError, match=re.escape(f"{smooth.candidates[outsider].name} is no contender")):
        CostTable.of(smooth, [outsider])
