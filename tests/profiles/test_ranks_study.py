"""The estimate for many ranks: placements are permutations, and knowing more is never predicted to be slower."""

from __future__ import annotations

import numpy as np
import pytest
from ramp_moe import Dispatcher, get_registry
from studies.ranks.tables import evenly, local, rebalanced, slowest


def test_a_rank_has_its_share_of_whole_experts() -> None:
    shape = local(get_registry().shape("deepseek-v3", "fp8"), 64)
    assert (shape.num_experts, shape.top_k, shape.intermediate_size) == (4, 4, 2048)


def test_each_expert_is_placed_once_and_loads_come_closer() -> None:
    loads = np.array([90, 80, 70, 60, 4, 3, 2, 1])
    placed = rebalanced(loads, 4)
    assert sorted(placed.flatten().tolist()) == list(range(8))
    assert loads[placed].sum(1).tolist() == [91, 82, 73, 64]
    assert loads.reshape(4, 2).sum(1).max() == 170, "as numbered"


def test_ids_are_spread_evenly_and_none_is_lost() -> None:
    assert evenly(np.array([[9, 0, 1, 0], [0, 0, 0, 0], [3, 3, 3, 3]])).tolist() == [
        [3, 3, 2, 2],
        [0, 0, 0, 0],
        [3, 3, 3, 3],
    ]


@pytest.mark.slow
def test_the_histogram_is_never_predicted_to_lose() -> None:
    """The slowest rank's own best is at most what any other choice takes there; with even loads both are the same."""
    model = Dispatcher.for_model("olmoe-1b-7b", "h200", ["triton"], "fp8").model
    rng = np.random.default_rng(0)
    skewed = np.stack([rng.multinomial(512, rng.dirichlet(np.full(64, 0.2))) for _ in range(8)])
    by_size, by_histogram = slowest(model, skewed)
    assert by_histogram < by_size
    even = np.full((2, 64), 8)
    assert slowest(model, even)[0] == pytest.approx(slowest(model, even)[1])
