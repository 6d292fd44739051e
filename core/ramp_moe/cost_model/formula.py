"""The cost model's formula: a candidate's predicted time, in microseconds, for one expert histogram.

This page defines it. Four evaluators compute it, and refer to the steps below by number:

    evaluator  where                                        numbers                      tolerance
    numpy      `grids`, `residual`, `model`                 float64; step 6 in float32   1e-5
    table      `runtime.graphs.cost_table`, any evaluator   float32 arrays               1e-5
    Triton     `runtime.graphs.selector_triton`             float32                      1e-3
    CUDA       `runtime/graphs/select.cu`                   float32, fast exp and log    1e-3

The tolerance is relative, per candidate. `tests/core/cost_model/test_formula.py` holds all four to the same golden
numbers, and to the same choice. Whoever changes a step changes it here, in the four, and in that test.

Symbols:

    h[e]       tokens of expert e, whole numbers of at least 0; one entry per expert
    part       what is measured and fitted as one: a stage, or a whole path (`model.Part`)
    candidate  a configuration of a kernel: the sum of its parts

Of each grid of a part (`spec.geometry.GridGeometry`; the names in parentheses are CostTable's arrays):

    block      tokens of an M-tile (grid_block, an index into blocks)
    per_tile   CTAs per M-tile: ceil(weight rows / tile's weight rows) * split_k (grid_ctas)
    cluster    M-tiles of a cluster (grid_cluster)
    slots      CTAs of a wave: SMs * CTAs per SM, and at most persistent_ctas (grid_slots)
    work       tile's weight rows * reduction / split_k, relative to the part's first grid (grid_work)

CTAs per SM are those of the fitted part, which can differ from the kernel's description (`Form.resident`). A part
without a grid counts routed ids: it has one grid of block 1, per_tile 1, cluster 1, endless slots and work 1.

Steps:

1.  Counts. count(block) = sum over e of ceil(h[e] / block). So count(1) is the routed ids. The largest block holds all
    tokens of any expert: its count is the active experts. Both are always among the counts, which are in ascending
    order of their blocks (`Grids.blocks`, CostTable.blocks).
2.  Grids. ctas = ceil(count(block) / cluster) * cluster * per_tile, and filled = ctas / slots.
3.  Terms of a part, each a sum over its grids:

        one         1
        waves       sum of work * filled
        ceil_waves  sum of work * ceil(filled)
        ctas        sum of work * ctas
        log_ctas    log(1 + ctas), of the sum above
        active      active experts

    A form (`model.FORMS`) uses some of them; the others have the coefficient 0.
4.  Parts. part_us = max(floor, sum over terms of coefficient * term). Coefficients are microseconds per unit.
5.  Candidates. us = sum of part_us over the candidate's parts.
6.  Correction. A candidate that a residual knows is multiplied by

        exp(constant + sum over fitted batches r of weight[r] * |z - z[r]|)

    z has three coordinates: log of the routed ids, of the active experts, and of count(the residual's block for this
    candidate), each times its unit. A count of 0 is taken for 1. unit = SCALES of that coordinate / the standard
    deviation of its logs over the fitted batches (population, at least 1e-9). |.| is the Euclidean norm; log is the
    natural one. A model for one batch size (`CostModel.at`) multiplies every candidate, known or not, by a factor that
    was measured (`correction`); a table adds its logarithm to the constant.
7.  Choice. The contenders are all candidates, but of a kernel with a residual only those that it knows. The least us
    is chosen; of equal ones the first in the model's order. CostTable holds contenders only, in the order given.
8.  Others. Who is no contender is predicted at least the next float above the fastest contender (numpy only).
9.  Extrapolation. A prediction extrapolates if any of its parts lies outside its fitted rows: `ctas` of step 3 outside
    ctas_range, or the active experts outside active_range, ends included (numpy only).
10. Roofline. If another GPU was measured, all candidates are multiplied by one factor (`roofline`). No layer takes
    less time than reading its active experts' weights: if the least us is still below, the factor is larger. It comes
    before any factor that was measured. So it changes times, and never a choice (numpy only).

Rounding: counts and CTAs are whole numbers, and exact in every evaluator. `filled` is divided with correct rounding
before it is rounded up, so that a full wave never becomes two. The order of sums is free within the tolerance, but is
the same for all candidates of one evaluator: equal candidates have equal times, and ties stay ties.
"""

from __future__ import annotations

TERMS = ("one", "waves", "ceil_waves", "ctas", "log_ctas", "active")
"""The terms of step 3, in the order of CostTable's coefficients."""
