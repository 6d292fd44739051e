"""The regrets that the cost model's study tells do not get worse."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import RECORDED
from studies.cost_model import tables

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pages")]


def test_choices_for_unseen_shapes_among_several_kernels() -> None:
    unseen = [
        tables.transferred(model, dtype, kernels, tables.split(model, dtype, kernels)[1])[0].mean()
        for dtype, kernels in tables.UNSEEN
        for model in tables.MODELS
        if len(kernels) > 1
    ]
    assert np.mean(unseen) < 0.035


@pytest.mark.parametrize(
    ("model", "mean", "p95"),
    list(zip(RECORDED, (0.0125, 0.017, 0.023, 0.011), (0.067, 0.079, 0.126, 0.046), strict=True)),
)
def test_cross_validated_regret_on_the_first_sweeps(model: str, mean: float, p95: float) -> None:
    lost = tables.cross_validated(model, "smooth")
    assert lost.mean() < mean
    assert np.quantile(lost, 0.95) < p95


def test_held_out_regret_of_what_ships() -> None:
    found = {
        (model, dtype, kernels): tables.held_out(model, dtype, kernels, "smooth")
        for model, dtype, kernels, _, _ in tables.cases()
    }
    assert np.mean([lost.mean() for lost, _ in found.values()]) < 0.007
    for (model, dtype, kernels), (lost, against) in found.items():
        if (model, dtype, kernels) == ("mixtral-8x7b-tp4", "fp8", ("triton",)):  # its batches of 3 tokens
            assert against < 0.02
            continue
        if np.isnan(against):  # measured once: the best of the same run is luckier than any choice
            assert lost.mean() < 0.0125
            continue
        assert against < 0.009
        assert lost.max() < 0.08


def test_fewer_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "COUNTS", (24,))
    curve = tables.curve.__wrapped__()
    assert curve["as measured"][24] < 0.012
    assert curve["uniform first"][24] < 0.012
