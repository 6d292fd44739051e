"""Many parts' grids as arrays, so that all are evaluated at once for one histogram or a batch of them.

This is the numpy evaluator of steps 1 to 3 of `formula`, which defines the counts and the terms.

`counts [..., blocks]` of a histogram are the M-tiles of every distinct token block, in ascending order. The first is
for blocks of one token, and counts the routed ids. The last is for blocks that hold any expert's tokens, and counts the
active experts.

Parts with equal grids have equal counts, and are counted once: a *launch* is what they have in common. CTA counts are
float64 here. `GridGeometry` counts in integers, but dividing doubles is several times faster, and exact for every count
below 2**52 / block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import KernelError
from ..spec.geometry import GridGeometry
from ..spec.routing import MAX_COUNT, FloatArray, IntArray


class Grids:
    """The grids of parts, each given as its GEMMs' grids.

    A part of several grids adds them up. Each CTA and wave counts by the work of a CTA relative to the first grid's. A
    part without a grid counts routed ids: blocks of one token, one tile along the weights, endless slots.
    """

    def __init__(self, parts: Sequence[tuple[GridGeometry, ...]], num_sms: int) -> None:
        seen = [_launch(grids, num_sms) for grids in parts]
        self.launches = launches = list(dict.fromkeys(seen))
        """For each grid of each launch: token block, CTAs an M-tile, M-tiles a cluster, slots, relative work of a CTA.
       """
        self.launch_of = np.array([launches.index(launch) for launch in seen], np.intp)
        grids = [grid for launch in launches for grid in launch]
        blocks, ctas_per_m_tile, cluster_m, slots, work = zip(*grids, strict=True)
        self.blocks = np.unique(np.array([1, *blocks, MAX_COUNT]))
        self._blocks = self.blocks[:, None].astype(np.float64)
        # CTAs are M-tiles times the CTAs of one. A product with a matrix of that number and zeros is exact.
        self._ctas = np.zeros((len(self.blocks), len(grids)))
        self._ctas[np.searchsorted(self.blocks, blocks), np.arange(len(grids))] = ctas_per_m_tile
        self._clustered = np.flatnonzero(np.array(cluster_m) > 1)
        self._cluster = (np.array(ctas_per_m_tile, np.float64) * cluster_m)[self._clustered]
        self._slots = np.array(slots)
        # Launch i adds up the grids starts[i] : starts[i + 1].
        self._starts = np.cumsum([0, *(len(launch) for launch in launches[:-1])])
        self._work = np.array(work)
        self._one_grid_each = len(grids) == len(launches)

    def count(self, histograms: IntArray) -> FloatArray:
        """Count the M-tiles `counts [..., blocks]` of histograms `[..., num_experts]`."""
        # Converts to floats before the broadcast, which would convert every element once a block.
        shares = histograms.astype(np.float64)[..., None, :] / self._blocks
        return np.asarray(np.add.reduce(np.ceil(shares, out=shares), axis=-1))

    def ctas(self, counts: FloatArray) -> FloatArray:
        """Count the CTAs `[..., grids]` that do work, or wait in a cluster for others that do."""
        ctas = np.asarray(counts.dot(self._ctas))
        if len(self._clustered):
            ctas[..., self._clustered] = np.ceil(ctas[..., self._clustered] / self._cluster) * self._cluster
        return ctas

    def sum(self, per_grid: FloatArray) -> FloatArray:
        """Sum `[..., grids]` to `[..., launches]`, weighted by work."""
        if self._one_grid_each:
            return per_grid
        return np.asarray(np.add.reduceat(per_grid * self._work, self._starts, axis=-1))

    def features(self, terms: Sequence[str], counts: FloatArray, ctas: FloatArray) -> FloatArray:
        """List each named term's values side by side, `[..., features]`: one for each launch, or one for all."""
        return np.concatenate([self._term(name, counts, ctas) for name in terms], axis=-1)

    def matrix(self, terms: Sequence[str], coefficients: FloatArray) -> FloatArray:
        """Arrange `coefficients [parts, terms]` as the matrix `[features, parts]` that turns `features` into the parts'
        sums."""
        parts = np.arange(len(self.launch_of))
        rows = [np.zeros((self._width(name), len(parts))) for name in terms]
        for name, row, c in zip(terms, rows, coefficients.T, strict=True):
            row[self._feature_of(name), parts] = c
        return np.concatenate(rows)

    def by_part(self, term: str, counts: FloatArray, ctas: FloatArray) -> FloatArray:
        """Compute one term, `[..., parts]`."""
        return np.asarray(self._term(term, counts, ctas)[..., self._feature_of(term)])

    def _term(self, name: str, counts: FloatArray, ctas: FloatArray) -> FloatArray:
        match name:
            case "one":
                return np.ones_like(counts[..., :1])
            case "waves":
                return self.sum(np.asarray(ctas / self._slots))
            case "ceil_waves":
                return self.sum(np.asarray(np.ceil(ctas / self._slots)))
            case "ctas":
                return self.sum(ctas)
            case "log_ctas":
                return np.asarray(np.log1p(self.sum(ctas)))
            case "active":
                return counts[..., -1:]
        raise KernelError(f"cost model form names an unknown term {name!r}")

    def _width(self, term: str) -> int:
        return 1 if term in ("one", "active") else len(self._starts)

    def _feature_of(self, term: str) -> IntArray:
        """Index, for each part, the one of the term's features that it uses."""
        return self.launch_of * 0 if self._width(term) == 1 else self.launch_of


def _launch(grids: Sequence[GridGeometry], num_sms: int) -> tuple[tuple[int, int, int, float, float], ...]:
    """Summarise each grid: token block, CTAs an M-tile, M-tiles a cluster, slots, and a CTA's work.

    Work is weight rows times the share of the reduction, relative to the first grid's.
    """
    work = [g.block_n * g.k / g.split_k for g in grids]
    return tuple(
        (g.block_m, g.ctas_per_m_tile, g.cluster_m, float(g.cta_slots(num_sms)), w / work[0])
        for g, w in zip(grids, work, strict=True)
    ) or ((1, 1, 1, np.inf, 1.0),)
