"""Cost tables, routings, and costs computed on the host, shared by the tests of choosing on the device."""

from __future__ import annotations

import numpy as np
import torch
from ramp_moe.cost_model.formula import TERMS
from ramp_moe.runtime.graphs.cost_table import (
    LARGEST_BLOCK,
    MAX_BLOCKS,
    MAX_CANDIDATES,
    MAX_DISTANCES,
    MAX_LAUNCHES,
    MAX_PARTS,
    CostTable,
)
from ramp_moe.spec.routing import FloatArray, IntArray, generate

ROUTINGS = ("uniform", "zipf1.2", "active0.1", "one-hot", "padded", "empty", "garbage")


def by_hand(table: CostTable, histogram: IntArray) -> FloatArray:
    """Microseconds of the table's candidates, by the table evaluator of `ramp_moe.cost_model.formula`."""
    counts = np.ceil(histogram / table.blocks[:, None].astype(np.float64)).sum(-1)
    ctas = np.ceil(counts[table.grid_block] / table.grid_cluster) * table.grid_cluster * table.grid_ctas
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


def routed(kind: str, tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """Top-k ids int32 `[tokens, top_k]` of one of ROUTINGS."""
    ids = generate(kind if kind in ROUTINGS[:4] else "uniform", tokens, num_experts, top_k, seed)
    rng = np.random.default_rng(seed)
    if kind == "padded":
        ids[rng.random(ids.shape) < 0.3] = -1
        ids[rng.random(ids.shape) < 0.2] = num_experts
    elif kind == "empty":
        ids[:] = -1
    elif kind == "garbage":
        wild = rng.choice([2**31 - 1, -(2**31), 10**6, -2, num_experts + 1], ids.shape)
        ids = np.where(rng.random(ids.shape) < 0.5, wild, ids)
    return torch.from_numpy(ids).int()


def counted(topk_ids: torch.Tensor, num_experts: int, num_valid: int | None = None) -> IntArray:
    """The histogram that a kernel should compute."""
    ids = topk_ids.cpu().numpy()[: None if num_valid is None else max(num_valid, 0)]
    return np.bincount(ids[(ids >= 0) & (ids < num_experts)], minlength=num_experts)


def largest_table(seed: int = 0) -> CostTable:
    """A table at the limits of every size, with candidates of one to three parts of one to three grids."""
    rng = np.random.default_rng(seed)
    grids, sets = 3, 48
    rows = MAX_DISTANCES // sets
    has = np.arange(grids)[:, None] < rng.integers(1, grids + 1, MAX_LAUNCHES)
    each = rng.integers(1, 4, MAX_CANDIDATES)
    first = np.cumsum([0, *each])
    coefficients = rng.uniform(0.8, 1, (len(TERMS), MAX_PARTS)) * np.array([60, 0.1, 0.1, 1e-4, 1, 1e-2])[:, None]
    slots = np.where(has, rng.integers(100, 300, has.shape), np.inf)
    slots[:, ::7] = np.inf
    blocks = np.sort(rng.choice(np.arange(2, 257), MAX_BLOCKS - 2, replace=False))
    return CostTable(
        np.array([1, *blocks, LARGEST_BLOCK], np.int32),
        rng.integers(0, MAX_BLOCKS - 1, has.shape).astype(np.int32),
        (rng.integers(1, 64, has.shape) * has).astype(np.float32),
        2 ** rng.integers(0, 3, has.shape).astype(np.int32),
        slots.astype(np.float32),
        (rng.uniform(0.2, 2, has.shape) * has).astype(np.float32),
        rng.integers(0, MAX_LAUNCHES, MAX_PARTS).astype(np.int32),
        coefficients.astype(np.float32),
        rng.uniform(40, 70, MAX_PARTS).astype(np.float32),
        first.astype(np.int32),
        rng.integers(0, MAX_PARTS, first[-1]).astype(np.int32),
        rng.uniform(0.3, 1, (sets, 3)).astype(np.float32),
        rng.normal(4, 2, (sets, 3, rows)).astype(np.float32),
        rng.integers(0, MAX_BLOCKS, sets).astype(np.int32),
        rng.integers(0, sets, MAX_CANDIDATES).astype(np.int32),
        rng.normal(0, 0.05, MAX_CANDIDATES).astype(np.float32),
        rng.normal(0, 2e-3, (rows, MAX_CANDIDATES)).astype(np.float32),
        np.arange(MAX_CANDIDATES, dtype=np.int32),
    )
