"""What the wave model leaves over, as a smooth function of the batch.

The wave model's error is not noise: batches alike are wrong alike. So the logarithm of measured over predicted time is
taken for a Gaussian process over three numbers of a batch, those that the wave model sees: routed ids, active experts,
and M-tiles of the candidate's token block, all as logarithms in units of their spread over the fitted batches. The
covariance of two batches at distance d is exp(-d / length), which bends at measured batches and is 0 far from them:
there the wave model stands alone.

All candidates of a kernel share the length and the noise. They are chosen by leaving out each batch in turn, in closed
form: by the mean square of the errors that decide, which are those of candidates near the batch's best, less what all
have in common.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .routing import FloatArray, IntArray

LENGTHS, NOISES = (1.0, 2.0, 4.0, 8.0, 16.0), (0.003, 0.01, 0.03, 0.1)
"""Tried: in units of spread, and as a share of the residuals' variance."""
NEAR_BEST = 0.15
"""An error's weight falls by e for each so much that its candidate is behind the batch's best."""
FEWEST_ROWS = 8


@dataclass(frozen=True)
class Residual:
    """The batches that were fitted to: routed `ids`, `active` experts and, by token block, M-tiles, each int `[rows]`;
    the covariance's `length`; and by candidate, its token block and weights float64 `[rows]`, so that the logarithm of
    the correction is the sum over rows of covariance times weight."""

    ids: IntArray
    active: IntArray
    tiles: Mapping[int, IntArray]
    length: float
    weights: Mapping[str, tuple[int, FloatArray]]


def fit_residual(
    ids: IntArray,
    active: IntArray,
    tiles: Mapping[int, IntArray],
    names: Sequence[str],
    blocks: Sequence[int],
    times_us: FloatArray,
    predicted_us: FloatArray,
) -> Residual | None:
    """Fit to times `[rows, candidates]`, NaN where there is none, and what the wave model says of them. `tiles` has the
    token block of every candidate. None where there are too few rows."""
    if len(ids) < FEWEST_ROWS:
        return None
    known = np.isfinite(times_us)
    rest = np.where(known, np.log(np.where(known, times_us, 1.0) / predicted_us), 0.0)
    behind = np.where(known, times_us, np.inf) / np.where(known, times_us, np.inf).min(1, keepdims=True) - 1
    weight = np.exp(-behind / NEAR_BEST)
    share = weight / np.maximum(weight.sum(1, keepdims=True), 1e-300)
    apart = {b: _distances(Points(ids, active, t)) for b, t in tiles.items()}
    columns = {b: np.flatnonzero(np.asarray(blocks) == b) for b in tiles}

    def solved(length: float, noise: float) -> tuple[float, FloatArray]:
        solution, error = np.empty_like(rest), np.empty_like(rest)
        for b, c in columns.items():
            inverse = np.linalg.inv(np.exp(-apart[b] / length) + noise * np.eye(len(ids)))
            solution[:, c] = inverse @ rest[:, c]
            error[:, c] = solution[:, c] / np.diag(inverse)[:, None]
        error -= (share * error).sum(1, keepdims=True)
        return float((weight * error**2).sum()), solution

    tried = ((*solved(length, noise), length) for length, noise in itertools.product(LENGTHS, NOISES))
    _, solution, length = min(tried, key=lambda found: found[0])
    weights = {n: (b, solution[:, i].copy()) for i, (n, b) in enumerate(zip(names, blocks, strict=True))}
    return Residual(ids, active, tiles, length, weights)


class Correction:
    """A residual for the candidates of a cost model, evaluated for all token blocks at once: `columns` are their
    indices there, `names` theirs in the residual, `block_index` where each token block lies in the tiles that `apply`
    is given."""

    def __init__(
        self, residual: Residual, columns: Sequence[int], names: Sequence[str], block_index: Mapping[int, int]
    ) -> None:
        of = [residual.weights[name] for name in names]
        blocks = list(dict.fromkeys(b for b, _ in of))
        members = {b: [i for i, (other, _) in enumerate(of) if other == b] for b in blocks}
        widest = max(map(len, members.values()))
        points = [Points(residual.ids, residual.active, residual.tiles[b]) for b in blocks]
        self._columns = np.asarray(columns)
        self._tiles = np.array([block_index[b] for b in blocks])
        self._mean = np.stack([p.mean for p in points])
        self._unit = 1 / (residual.length * np.stack([p.spread for p in points]))
        at = np.stack([p.at for p in points]) / residual.length
        self._square, self._twice = (at**2).sum(-1), 2 * at.transpose(0, 2, 1)
        # A block's weights side by side, zeros behind where it has fewer candidates than another.
        self._weights = np.zeros((len(blocks), len(residual.ids), widest))
        self._place = np.empty(len(of), np.intp)
        for row, block in enumerate(blocks):
            for place, i in enumerate(members[block]):
                self._weights[row, :, place] = of[i][1]
                self._place[i] = row * widest + place

    def apply(self, us: FloatArray, near: FloatArray, ids: FloatArray, active: FloatArray, tiles: FloatArray) -> None:
        """Correct `us [..., candidates]` where `near`; ids, active `[...]`, tiles `[..., blocks]`. A batch without
        tokens counts as one of a token."""
        logs = np.empty((*tiles.shape[:-1], len(self._tiles), 3))
        logs[..., 0], logs[..., 1], logs[..., 2] = ids[..., None], active[..., None], tiles[..., self._tiles]
        np.log(np.maximum(logs, 1, out=logs), out=logs)
        z = (logs - self._mean) * self._unit
        distance = np.matmul(z[..., None, :], self._twice)[..., 0, :]
        np.subtract(self._square, distance, out=distance)
        distance += np.square(z).sum(-1)[..., None]
        np.sqrt(np.maximum(distance, 0, out=distance), out=distance)
        covariance = np.exp(np.negative(distance, out=distance), out=distance)
        logarithm = np.matmul(covariance[..., None, :], self._weights)[..., 0, :]
        factor = np.exp(logarithm.reshape(*us.shape[:-1], -1)[..., self._place])
        us[..., self._columns] *= np.where(near[..., self._columns], factor, 1.0)


class Points:
    """Batches as points, in units of their spread."""

    def __init__(self, ids: IntArray, active: IntArray, tiles: IntArray) -> None:
        logs = np.log(np.stack([ids, active, tiles], axis=1))
        self.mean = logs.mean(0)
        self.spread = np.maximum(logs.std(0), 1e-9)
        self.at = (logs - self.mean) / self.spread


def _distances(points: Points) -> FloatArray:
    apart = points.at[:, None] - points.at
    return np.asarray(np.sqrt((apart**2).sum(-1)))
