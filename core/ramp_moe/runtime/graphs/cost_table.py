"""A cost model as arrays, for kernels that evaluate `ramp_moe.cost_model.formula` where the histogram is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...cost_model.formula import TERMS
from ...cost_model.grids import Grids
from ...cost_model.model import CostModel, get_form, parts_of
from ...cost_model.residual import SCALES, in_units
from ...errors import KernelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_BLOCKS, MAX_LAUNCHES, MAX_PARTS, MAX_CANDIDATES, MAX_DISTANCES = 64, 256, 1024, 512, 6144
"""Limits of the kernels, which keep all of these in shared memory."""
LARGEST_BLOCK = 2**30
"""Of any expert's tokens, with room to round up in 32 bits."""


@dataclass(frozen=True)
class CostTable:
    """B distinct token blocks, L launches of up to G grids (see `grids`), P parts, C candidates that are sums of parts,
    Q sets of R points from which distances are taken (see `residual`). int32 and float32.

    `ramp_moe.cost_model.formula` defines how they become a cost. In its step 6, candidate c has the set of points
    q = set_of[c]: weight[r] is weights[r, c], z[r] is points[q, :, r], and its block is blocks[set_block[q]]. Only
    candidates that the model would ever choose are in it.
    """

    blocks: NDArray[np.int32]
    """`[B]`, ascending: the first counts routed ids, the last active experts"""
    grid_block: NDArray[np.int32]
    """`[G, L]`: index into blocks"""
    grid_ctas: NDArray[np.float32]
    """`[G, L]`: CTAs an M-tile; 0 where a launch has fewer grids"""
    grid_cluster: NDArray[np.int32]
    """`[G, L]`: M-tiles a cluster, a power of two: theirs are rounded up to whole clusters"""
    grid_slots: NDArray[np.float32]
    """`[G, L]`: CTAs a wave; infinite for launches without a grid"""
    grid_work: NDArray[np.float32]
    """`[G, L]`"""
    launch_of: NDArray[np.int32]
    """`[P]`"""
    coefficients: NDArray[np.float32]
    """`[len(TERMS), P]`, microseconds a unit"""
    floor: NDArray[np.float32]
    """`[P]`, microseconds"""
    first: NDArray[np.int32]
    """`[C + 1]`: candidate c is the sum of parts[first[c] : first[c + 1]]"""
    parts: NDArray[np.int32]
    unit: NDArray[np.float32]
    """`[Q, 3]`"""
    points: NDArray[np.float32]
    """`[Q, 3, R]`"""
    set_block: NDArray[np.int32]
    """`[Q]`: index into blocks"""
    set_of: NDArray[np.int32]
    """`[C]`: index of a set of points, any where the weights are 0"""
    constant: NDArray[np.float32]
    """`[C]`"""
    weights: NDArray[np.float32]
    """`[R, C]`"""
    label: NDArray[np.int32]
    """`[C]`: what is recorded for a candidate that is chosen, its index in the model"""

    @property
    def num_candidates(self) -> int:
        return len(self.set_of)

    @classmethod
    def of(cls, model: CostModel, columns: Sequence[int]) -> CostTable:
        """Of these of the model's candidates, each a contender. Raises KernelError beyond the limits."""
        if outsiders := set(columns) - set(model.contenders.tolist()):
            raise KernelError(f"{model.candidates[min(outsiders)].name} is no contender: the model never chooses it")
        candidates = [model.candidates[c] for c in columns]
        keys = [[p.key for p in parts_of(c, model.stages)] for c in candidates]
        index = {key: i for i, key in enumerate(dict.fromkeys(k for ks in keys for k in ks))}
        fits = [model.fits[key] for key in index]
        grids = Grids([f.part.grids for f in fits], model.hardware.num_sms)
        most = max(map(len, grids.launches))
        blocks = grids.blocks.tolist()
        # A grid that is none: no CTAs, in endless slots.
        padded = [(*launch, *[(1, 0, 1, np.inf, 0.0)] * (most - len(launch))) for launch in grids.launches]
        block, ctas, cluster, slots, work = (
            np.array([[g[i] for g in launch] for launch in padded]).T for i in range(5)
        )
        terms = get_form(model.form).terms
        coefficients = np.zeros((len(TERMS), len(fits)), np.float32)
        for term, values in zip(terms, zip(*(f.coefficients for f in fits), strict=True), strict=True):
            coefficients[TERMS.index(term)] = values
        table = cls(
            np.minimum(grids.blocks, LARGEST_BLOCK).astype(np.int32),
            np.searchsorted(grids.blocks, block).astype(np.int32),
            ctas.astype(np.float32),
            cluster.astype(np.int32),
            slots.astype(np.float32),
            work.astype(np.float32),
            grids.launch_of.astype(np.int32),
            coefficients,
            np.array([f.floor_us for f in fits], np.float32),
            np.cumsum([0, *map(len, keys)]).astype(np.int32),
            np.array([index[k] for ks in keys for k in ks], np.int32),
            **_corrections(model, columns, blocks),
            label=np.array(columns, np.int32),
        )
        whats = ("token blocks", "grids", "parts", "candidates", "distances")
        distances = table.points.shape[0] * table.points.shape[2]
        sizes = (len(blocks), len(grids.launches), len(fits), len(candidates), distances)
        limits = (MAX_BLOCKS, MAX_LAUNCHES, MAX_PARTS, MAX_CANDIDATES, MAX_DISTANCES)
        for what, size, limit in zip(whats, sizes, limits, strict=True):
            if size > limit:
                raise KernelError(f"choosing on the device takes {limit} {what} at most, not {size}: give fewer")
        return table

    def to(self, device: torch.device | str) -> dict[str, Tensor]:
        """The arrays on a device, by name."""
        import torch

        return {f.name: torch.from_numpy(np.ascontiguousarray(getattr(self, f.name))).to(device) for f in fields(self)}


def _corrections(model: CostModel, columns: Sequence[int], blocks: Sequence[int]) -> dict[str, NDArray[Any]]:
    """The table's arrays that correct."""
    names = [model.candidates[c].name for c in columns]
    rows = max((len(r.ids) for r in model.residuals), default=0)
    set_of, constant = np.zeros(len(names), np.int32), np.zeros(len(names), np.float32)
    # A residual of fewer batches than another weighs the points that it lacks with 0.
    weights = np.zeros((rows, len(names)), np.float32)
    sets: dict[tuple[int, int], int] = {}
    for c, name in enumerate(names):
        for i, residual in enumerate(model.residuals):
            if name in residual.weights:
                block, constant[c], of_candidate = residual.weights[name]
                weights[: len(of_candidate), c] = of_candidate
                set_of[c] = sets.setdefault((i, block), len(sets))
    constant += model.log_factors[list(columns)]
    if not sets and constant.any():  # a point that weighs nothing: evaluators skip the constants of a table without any
        rows, weights, sets[-1, blocks[0]] = 1, np.zeros((1, len(names)), np.float32), 0
    unit, points = np.zeros((len(sets), 3), np.float32), np.zeros((len(sets), 3, rows), np.float32)
    for (i, block), q in sets.items():
        if i < 0:
            continue
        residual = model.residuals[i]
        for axis, (counts, scale) in enumerate(
            zip((residual.ids, residual.active, residual.tiles[block]), SCALES, strict=True)
        ):
            unit[q, axis], points[q, axis, : len(counts)] = in_units(counts, scale)
    set_block = np.array([blocks.index(block) for _, block in sets], np.int32)
    return {
        "unit": unit,
        "points": points,
        "set_block": set_block,
        "set_of": set_of,
        "constant": constant,
        "weights": weights,
    }
