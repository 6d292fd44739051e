"""Computes the tables of the README beside this: what a choice by histogram is predicted to gain in expert parallelism.

`python profiles/pages.py --write ranks` fills the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from pages import over, table
from ramp_moe import CostModel, MoEShape, expert_histogram, generate
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.spec.routing import IntArray
from studies.shipped import h200, registry, store

MODELS = ("deepseek-v3", "qwen3-30b-a3b")
RANKS = (8, 16, 32, 64)
TOKENS = (64, 512)
ROUTINGS = ("uniform", "zipf0.6", "zipf1.2", "dirichlet0.3")
SEEDS = 4
FEWEST_EXPERTS = 4
PLACEMENTS = ("as numbered", "rebalanced")


@dataclass(frozen=True, slots=True)
class Step:
    """Predicted microseconds of the slowest rank in one step of a layer, by policy; and how uneven the ranks are.

    uneven: ids of the fullest rank over the mean. by_size: each rank chooses by how many ids it got, as if they were
    spread evenly over its experts. by_histogram: each rank chooses by its histogram.
    """

    model: str
    ranks: int
    tokens: int
    routing: str
    placement: str
    uneven: float
    by_size: float
    by_histogram: float


def local(shape: MoEShape, ranks: int) -> MoEShape:
    """The shape that one of `ranks` ranks computes: its share of the experts, each whole."""
    experts = shape.num_experts // ranks
    return replace(shape, num_experts=experts, top_k=min(shape.top_k, experts))


def rebalanced(before: IntArray, ranks: int) -> IntArray:
    """Place experts on ranks by the loads `[num_experts]` of a window before. Returns the experts by rank
    `[ranks, experts of a rank]`.

    The heaviest expert goes first, to the rank with the least load that has a free place. Each rank has equally many
    experts, and no expert is on two ranks.
    """
    places = len(before) // ranks
    load, held = np.zeros(ranks), [list[int]() for _ in range(ranks)]
    for expert in np.argsort(-before, kind="stable").tolist():
        rank = min((r for r in range(ranks) if len(held[r]) < places), key=lambda r: (load[r], r))
        load[rank] += before[expert]
        held[rank].append(expert)
    return np.array(held)


def evenly(histograms: IntArray) -> IntArray:
    """The same number of ids in each row `[ranks, experts]`, spread evenly over the row's experts."""
    experts = histograms.shape[1]
    each, rest = np.divmod(histograms.sum(1, keepdims=True), experts)
    spread: IntArray = each + (np.arange(experts) < rest)
    return spread


def slowest(model: CostModel, histograms: IntArray) -> tuple[float, float]:
    """Predicted microseconds of the slowest of the ranks, whose histograms are the rows: by size, and by histogram."""
    us = model.cost(histograms)[:, model.contenders]
    static = model.cost(evenly(histograms))[:, model.contenders].argmin(1)
    return float(us[np.arange(len(us)), static].max()), float(us.min(1).max())


def steps_of(name: str, ranks: int) -> Iterator[Step]:
    shape = registry.shape(name, "fp8")
    model, _ = load_model(registry, store, local(shape, ranks), h200, [])
    for tokens in TOKENS:
        for routing in ROUTINGS:
            for seed in range(SEEDS):
                ids = generate(routing, 2 * tokens * ranks, shape.num_experts, shape.top_k, seed)
                before, now = (expert_histogram(half, shape.num_experts) for half in np.split(ids, 2))
                numbered = np.arange(shape.num_experts).reshape(ranks, -1)
                for placement, experts in zip(PLACEMENTS, (numbered, rebalanced(before, ranks)), strict=True):
                    met = now[experts]
                    uneven = met.sum(1).max() / met.sum(1).mean()
                    yield Step(name, ranks, tokens, routing, placement, uneven, *slowest(model, met))


@cache
def steps() -> list[Step]:
    """All steps of all models and numbers of ranks that leave a rank enough experts."""
    cases = [(m, r) for m in MODELS for r in RANKS if registry.shape(m, "fp8").num_experts // r >= FEWEST_EXPERTS]
    return [step for case in cases for step in steps_of(*case)]


def _gains(found: Iterable[Step]) -> str:
    ratios = [s.by_size / s.by_histogram for s in found]
    return f"{np.exp(np.mean(np.log(ratios))):.2f}x ({max(ratios):.2f})"


def by_ranks(found: list[Step]) -> str:
    """A row for each model, number of ranks and of tokens."""
    rows = []
    for case in dict.fromkeys((s.model, s.ranks, s.tokens) for s in found):
        of = [s for s in found if (s.model, s.ranks, s.tokens) == case]
        cells = []
        for placement in PLACEMENTS:
            at = [s for s in of if s.placement == placement and s.routing != "uniform"]
            cells += [f"{np.mean([s.uneven for s in at]):.1f}", _gains(at)]
        rows.append([*case, _gains(s for s in of if s.routing == "uniform"), *cells])
    head = ["model", "ranks", "tokens a rank", "uniform", "skewed: fullest over mean", "gain"]
    return table([*head, "rebalanced: fullest over mean", "gain"], rows)


def by_routing(found: list[Step]) -> str:
    """A row for each kind of routing and placement, over all models, ranks and tokens."""
    rows = []
    for routing in ROUTINGS:
        for placement in PLACEMENTS:
            of = [s for s in found if (s.routing, s.placement) == (routing, placement)]
            us = f"{np.exp(np.mean(np.log([s.by_histogram for s in of]))):.0f}"
            rows.append([routing, placement, len(of), f"{np.mean([s.uneven for s in of]):.1f}", us, _gains(of)])
    return table(["routing", "placement", "steps", "fullest over mean", "slowest rank, us", "gain"], rows)


TABLES = over(steps, {"by_ranks": by_ranks, "by_routing": by_routing})
HEAVY = tuple(TABLES)
