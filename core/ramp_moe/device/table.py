"""A cost model as arrays, for kernels that evaluate it where the histogram is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..cost_model import CostModel, Grids, get_form, parts_of
from ..errors import KernelError
from ..residual import Points
from ..routing import FloatArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TERMS = ("one", "waves", "ceil_waves", "ctas", "log_ctas", "active")
"""Those that forms are made of; a form that has not one of them has zeros for it."""
MAX_BLOCKS, MAX_PARTS, MAX_CANDIDATES, MAX_ROWS = 64, 1024, 512, 512
"""Limits of the kernels, which keep M-tiles, parts and candidates in shared memory."""


@dataclass(frozen=True)
class CostTable:
    """B distinct token blocks, P parts of up to G grids each, C candidates that are sums of parts, Q sets of R points
    that candidates are corrected by. int32 and float32.

    A part costs max(floor, sum of coefficients times TERMS), each term summed over the part's grids by work (see
    `Grids`). A candidate with a set of points is multiplied by exp(sum over r of weights[r] * exp(-|z - points[:, r]|))
    where z = (log(max(1, (routed ids, active experts, M-tiles of the set's block))) - mean) * unit, if it is near the
    fastest by its parts alone (see `cost_model.NEAR`); the others are not chosen.
    """

    blocks: NDArray[np.int32]
    """`[B]`"""
    grid_block: NDArray[np.int32]
    """`[G, P]`: index into blocks"""
    grid_ctas: NDArray[np.float32]
    """`[G, P]`: CTAs an M-tile; 0 where a part has fewer grids"""
    grid_slots: NDArray[np.float32]
    """`[G, P]`: CTAs a wave; infinite for parts without a grid"""
    grid_work: NDArray[np.float32]
    """`[G, P]`"""
    coefficients: NDArray[np.float32]
    """`[len(TERMS), P]`, microseconds a unit"""
    floor: NDArray[np.float32]
    """`[P]`, microseconds"""
    first: NDArray[np.int32]
    """`[C + 1]`: candidate c is the sum of parts[first[c] : first[c + 1]]"""
    parts: NDArray[np.int32]
    points: NDArray[np.float32]
    """`[Q, 3, R]`"""
    mean: NDArray[np.float32]
    """`[Q, 3]`"""
    unit: NDArray[np.float32]
    """`[Q, 3]`"""
    set_block: NDArray[np.int32]
    """`[Q]`: index into blocks"""
    set_of: NDArray[np.int32]
    """`[C]`: a candidate's set of points, -1 without"""
    weights: NDArray[np.float32]
    """`[C, R]`"""

    @property
    def num_candidates(self) -> int:
        return len(self.set_of)

    @classmethod
    def of(cls, model: CostModel, columns: Sequence[int] | None = None) -> CostTable:
        """Of the model's candidates, or those of them. Raises KernelError beyond the limits."""
        columns = range(len(model.candidates)) if columns is None else columns
        candidates = [model.candidates[c] for c in columns]
        keys = [[p.key for p in parts_of(c, model.stages)] for c in candidates]
        index = {key: i for i, key in enumerate(dict.fromkeys(k for ks in keys for k in ks))}
        fits = [model.fits[key] for key in index]
        grids = Grids([f.part for f in fits], model.hardware.num_sms)
        per_part = np.diff([*grids.starts, len(grids.work)])
        shape = int(per_part.max()), len(fits)

        def spread(values: NDArray[Any], empty: float, kind: type) -> NDArray[Any]:
            """`[grids]` -> `[G, P]`."""
            out: NDArray[Any] = np.full(shape, empty, kind)
            for part, (start, count) in enumerate(zip(grids.starts, per_part, strict=True)):
                out[:count, part] = values[start : start + count]
            return out

        terms = get_form(model.form).terms
        coefficients = np.zeros((len(TERMS), len(fits)), np.float32)
        for term, values in zip(terms, zip(*(f.coefficients for f in fits), strict=True), strict=True):
            coefficients[TERMS.index(term)] = values
        blocks = grids.blocks[:, 0].astype(np.int32)
        table = cls(
            blocks,
            spread(grids.block_of, 0, np.int32),
            spread(grids.ctas_per_m_tile, 0, np.float32),
            spread(grids.slots, np.inf, np.float32),
            spread(grids.work, 0, np.float32),
            coefficients,
            np.array([f.floor_us for f in fits], np.float32),
            np.cumsum([0, *map(len, keys)]).astype(np.int32),
            np.array([index[k] for ks in keys for k in ks], np.int32),
            *_corrections(model, [c.name for c in candidates], blocks.tolist()),
        )
        whats = ("token blocks", "parts", "candidates", "fitted batches")
        sizes = (len(blocks), len(fits), len(candidates), table.weights.shape[1])
        for what, size, limit in zip(whats, sizes, (MAX_BLOCKS, MAX_PARTS, MAX_CANDIDATES, MAX_ROWS), strict=True):
            if size > limit:
                raise KernelError(
                    f"choosing on the device takes {limit} {what} at most, not {size}: give fewer kernels"
                )
        return table

    def to(self, device: torch.device | str) -> dict[str, Tensor]:
        """The arrays on a device, by name."""
        import torch

        return {f.name: torch.from_numpy(np.ascontiguousarray(getattr(self, f.name))).to(device) for f in fields(self)}


def _corrections(model: CostModel, names: Sequence[str], blocks: Sequence[int]) -> tuple[NDArray[Any], ...]:
    """points, mean, unit, set_block, set_of, weights."""
    rows = max((len(r.ids) for r in model.residuals), default=0)
    set_of, weights = np.full(len(names), -1, np.int32), np.zeros((len(names), rows), np.float32)
    sets: dict[tuple[int, int], int] = {}
    points: list[FloatArray] = []
    mean: list[FloatArray] = []
    unit: list[FloatArray] = []
    for i, residual in enumerate(model.residuals):
        for c, name in enumerate(names):
            if name not in residual.weights:
                continue
            block, of_candidate = residual.weights[name]
            weights[c, : len(of_candidate)] = of_candidate
            if (i, block) not in sets:
                sets[i, block] = len(points)
                at = Points(residual.ids, residual.active, residual.tiles[block])
                # Rows that another residual alone has are as far away as can be, and weigh nothing.
                padded = np.zeros((3, rows))
                padded[:, : len(at.at)] = at.at.T / residual.length
                points.append(padded)
                mean.append(at.mean)
                unit.append(1 / (residual.length * at.spread))
            set_of[c] = sets[i, block]
    set_block = [blocks.index(block) for _, block in sets]
    return (
        np.array(points, np.float32).reshape(len(sets), 3, rows),
        np.array(mean, np.float32).reshape(len(sets), 3),
        np.array(unit, np.float32).reshape(len(sets), 3),
        np.array(set_block, np.int32),
        set_of,
        weights,
    )
