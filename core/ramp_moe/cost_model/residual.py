"""What the wave model leaves over, as a smooth function of the batch.

The wave model's error is not noise: batches alike are wrong alike. So the logarithm of measured over predicted time is
smoothed over three numbers of a batch, those that the wave model sees: routed ids, active experts, and M-tiles of the
candidate's token block. They are points z by their logarithms, in units of their spread over the fitted batches, times
SCALES. Through the fitted batches z_n goes the spline

    log correction(z) = constant + sum_n weight_n |z - z_n|,    sum_n weight_n = 0,

which minimises the bending, as a thin rod does in one dimension, plus the squared misses over `noise`; or, the same,
the expectation of an intrinsic Gaussian process whose increments have variance 2 |z - z'| and whose measurements have
variance `noise`. It has no length to choose, a cusp at each batch (as time has, where a wave fills), and levels off
beyond them. A root a batch and token block is all that it costs to evaluate.
`formula` defines the evaluation as its step 6; `Correction` is its numpy evaluator.

All candidates of a kernel share the noise. It is chosen by leaving out each batch in turn, in closed form: by the mean
square of the errors that decide, which are those of candidates near the batch's best, less what all have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..spec.routing import FloatArray, IntArray

SCALES = (0.25, 0.5, 1.0)
"""Of routed ids, active experts and M-tiles. Chosen by the error of leaving out each batch, over the batches to fit on
of the profiles that ship: M-tiles say most of how a candidate differs from the others."""
NOISES = (0.01, 0.03, 0.1, 0.3)
"""Tried: how far apart two batches are that differ as much as two measurements of one."""
NEAR_BEST = 0.15
"""An error's weight falls by e for each so much that its candidate is behind the batch's best."""
FEWEST_ROWS = 8


@dataclass(frozen=True)
class Residual:
    """The batches that were fitted to: routed `ids`, `active` experts and, by token block, M-tiles, each int `[rows]`;
    and by candidate, its token block, the constant, and the weights float64 `[rows]` of the spline."""

    ids: IntArray
    active: IntArray
    tiles: Mapping[int, IntArray]
    weights: Mapping[str, tuple[int, float, FloatArray]]


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
    fastest = np.where(known, times_us, np.inf).min(1, keepdims=True)
    weight = np.where(known, np.exp(-(np.where(known, times_us, 1.0) / fastest - 1) / NEAR_BEST), 0.0)
    share = weight / np.maximum(weight.sum(1, keepdims=True), 1e-300)
    apart = {b: _distances(ids, active, t) for b, t in tiles.items()}
    columns = {b: np.flatnonzero(np.asarray(blocks) == b) for b in tiles}

    # Adding to all covariances changes no spline whose weights have no sum, and makes the matrix definite.
    rows, everywhere = len(ids), np.ones(len(ids))
    most = rows * max(float(d.max()) for d in apart.values())

    def solved(noise: float) -> tuple[float, FloatArray, FloatArray]:
        weights, constants, error = np.empty_like(rest), np.empty(rest.shape[1]), np.empty_like(rest)
        for b, c in columns.items():
            inverse = np.linalg.inv(most - apart[b] + noise * np.eye(rows))
            mean = inverse @ everywhere / inverse.sum()
            projected = inverse - np.outer(mean, mean) * inverse.sum()
            weights[:, c], constants[c] = projected @ rest[:, c], mean @ rest[:, c]
            error[:, c] = weights[:, c] / np.diag(projected)[:, None]
        error -= (share * error).sum(1, keepdims=True)
        return float((weight * error**2).sum()), -weights, constants

    _, weights, constants = min(map(solved, NOISES), key=lambda found: found[0])
    found = zip(names, blocks, constants.tolist(), weights.T.copy(), strict=True)
    return Residual(ids, active, tiles, {name: (b, constant, w) for name, b, constant, w in found})


class Correction:
    """Residuals of one kernel or several for candidates `names` of a cost model; a candidate that none knows stays as
    it is. `blocks` are those of the model's counts, see `grids`."""

    def __init__(self, residuals: Sequence[Residual], names: Sequence[str], blocks: Sequence[int]) -> None:
        # Distances are those of a residual and a token block; `sharing` one are the candidates of these indices.
        sharing: dict[tuple[int, int], list[int]] = {}
        for i, name in enumerate(names):
            for j, residual in enumerate(residuals):
                if name in residual.weights:
                    sharing.setdefault((j, residual.weights[name][0]), []).append(i)
        # A row of points for each residual's ids, for each one's active experts, then for the M-tiles of each distance.
        rows = [(0, 0, r.ids) for r in residuals] + [(len(blocks) - 1, 1, r.active) for r in residuals]
        rows += [(blocks.index(b), 2, residuals[j].tiles[b]) for j, b in sharing]
        most, widest = max(len(r.ids) for r in residuals), max(map(len, sharing.values()))
        self._residuals = len(residuals)
        self._residual_of = np.array([j for j, _ in sharing])
        # Single precision: an error of a millionth. Zeros where a residual has fewer batches than another, or a
        # distance fewer candidates.
        self._units = np.zeros((len(blocks), len(rows)), np.float32)
        self._points = np.zeros((len(rows), most), np.float32)
        for i, (count, number, counts) in enumerate(rows):
            self._units[count, i], self._points[i, : len(counts)] = in_units(counts, SCALES[number])
        self._weights = np.zeros((len(sharing), most, widest + 1), np.float32)
        self._constant = np.zeros(len(names), np.float32)
        # Where each candidate is among those of all distances; the last place of one is nobody's.
        self._place = np.full(len(names), widest)
        for row, ((j, _), members) in enumerate(sharing.items()):
            for column, i in enumerate(members):
                _, self._constant[i], weights = residuals[j].weights[names[i]]
                self._weights[row, : len(weights), column] = weights
                self._place[i] = row * (widest + 1) + column

    def factors(self, counts: FloatArray) -> NDArray[np.float32]:
        """What to multiply the wave model's times by, `[..., names]`, for `counts [..., blocks]`, none 0."""
        z = np.log(counts.astype(np.float32)).dot(self._units)
        square = self._points - z[..., None]
        square *= square
        n = self._residuals
        common, square = square[..., :n, :] + square[..., n : 2 * n, :], square[..., 2 * n :, :]
        square += common if n == 1 else common.take(self._residual_of, axis=-2)
        distance = np.sqrt(square, out=square)
        splines = distance[..., None, :] @ self._weights
        logarithm = splines.reshape(*counts.shape[:-1], -1).take(self._place, axis=-1)
        logarithm += self._constant
        return np.asarray(np.exp(logarithm, out=logarithm))


def in_units(counts: IntArray, scale: float) -> tuple[float, FloatArray]:
    """The unit by which logarithms become a coordinate of points, and the points' coordinates."""
    logs = np.log(counts)
    unit = scale / max(float(logs.std()), 1e-9)
    return unit, logs * unit


def _distances(ids: IntArray, active: IntArray, tiles: IntArray) -> FloatArray:
    z = np.stack([in_units(n, scale)[1] for n, scale in zip((ids, active, tiles), SCALES, strict=True)], axis=1)
    return np.asarray(np.sqrt(((z[:, None] - z) ** 2).sum(-1)))
