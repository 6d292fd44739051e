"""The bodies of a layer in all its graphs are few, and stand where they save most."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("torch")

from ramp_moe import Hardware, get_registry
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.dispatch.profile_store import ProfileStore
from ramp_moe.dispatch.shortlist import Shortlist, representative, shortlist
from ramp_moe.runtime.graphs.bodies import MOST_BODIES, where_it_pays
from ramp_moe.runtime.graphs.capture import OVERHEAD_US


class Graphs:
    """In place of a GraphDispatch: shortlists by number of tokens."""

    def __init__(self, shorts: dict[int, Shortlist]) -> None:
        self.shorts = shorts

    def outlook(self, tokens: int) -> Any:
        return "nodes", None, self.shorts[tokens]


def short(bodies: int, saved: float) -> Shortlist:
    return Shortlist(tuple(range(bodies)), 0.0, 0.0, saved * 100 + 9.0, 9.0, 100.0)


def further(graphs: Graphs, sizes: Any) -> int:
    return sum(len(graphs.shorts[n].columns) - 1 for n in sizes)


def test_sizes_that_save_most_come_first() -> None:
    graphs: Any = Graphs(
        {8: short(1, 0.0), 16: short(3, 0.02), 32: short(4, 0.05), 64: short(3, 0.03), 128: short(2, 0.01)}
    )
    assert where_it_pays(graphs, graphs.shorts, 5) == {32, 64}
    assert where_it_pays(graphs, graphs.shorts, 4) == {32, 128}, "what does not fit leaves its room to others"
    assert where_it_pays(graphs, graphs.shorts) == {16, 32, 64, 128}
    assert where_it_pays(graphs, [8, 16]) == {16}
    assert where_it_pays(graphs, []) == frozenset()


def test_there_are_never_more_than_that() -> None:
    draw = random.Random(0)
    for _ in range(200):
        shorts = {n: short(draw.randint(1, 8), draw.random()) for n in range(1, draw.randint(2, 90))}
        graphs: Any = Graphs(shorts)
        most = draw.randint(0, 40)
        found = where_it_pays(graphs, shorts, most)
        assert further(graphs, found) <= most
        assert all(len(shorts[n].columns) > 1 for n in found)
        left = [n for n, s in shorts.items() if len(s.columns) > 1 and n not in found]
        assert all(further(graphs, found) + len(shorts[n].columns) - 1 > most for n in left), (
            "there is room for no other"
        )


def test_a_large_models_graphs(h200: Hardware) -> None:
    """At SGLang's default sizes of Qwen3, whose layers had 100 further bodies and more."""
    registry = get_registry()
    model, _ = load_model(
        registry, ProfileStore([], registry.profile_dirs), registry.shape("qwen3-30b-a3b", "fp8"), h200
    )
    sizes = (*range(576, 1025, 64), *range(1280, 4097, 256))
    costs, (experts, top_k) = OVERHEAD_US["nodes"], (model.shape.num_experts, model.shape.top_k)
    graphs: Any = Graphs(
        {n: shortlist(model, n, costs, max(costs), histograms=representative(n, experts, top_k, 1)) for n in sizes}
    )
    found = where_it_pays(graphs, sizes)
    assert further(graphs, sizes) > 2 * MOST_BODIES
    assert MOST_BODIES - 4 <= further(graphs, found) <= MOST_BODIES
