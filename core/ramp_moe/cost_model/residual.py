"""The residual of the wave model, as a smooth function of the batch.

The wave model's error is not noise: similar batches have similar errors. So the logarithm of measured over predicted
time is smoothed over three numbers of a batch. They are those of the wave model: routed ids, active experts, and
M-tiles of the candidate's token block. A batch is a point z: the logarithms of the three, divided by their spread over
the fitted batches, times SCALES. Through the fitted batches z_n goes the spline

    log correction(z) = constant + sum_n weight_n |z - z_n|,    sum_n weight_n = 0.

It minimises the bending, as a thin rod does in one dimension, plus the squared misses over `noise`. Equivalently, it is
the expectation of an intrinsic Gaussian process. The increments of that process have variance 2 |z - z'|, and its
measurements have variance `noise`. The spline has no length to choose. It has a cusp at each batch, as time has when a
wave fills, and levels off beyond the batches. Evaluating it costs one square root a batch and token block.
`formula` defines the evaluation as its step 6; `Correction` is its numpy evaluator.

All candidates of a kernel share the noise. It is chosen by leaving out each batch in turn, in closed form. What counts
is the mean square of the errors that decide: those of candidates near the batch's best, less what all have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..spec.routing import FloatArray, IntArray

SCALES = (0.25, 0.5, 1.0)
"""Scales of routed ids, active experts and M-tiles. They minimise the error of leaving out each batch, over the batches
to fit on of the shipped profiles. M-tiles say most of how a candidate differs from the others."""
NOISES = (0.01, 0.03, 0.1, 0.3)
"""Candidate noise variances of the spline, of which cross-validation picks one. Each equals the distance
between two batches that differ as much as two measurements of one."""
NEAR_BEST = 0.15
"""Share of the batch's best time that a candidate must be behind for its error's weight to fall by a factor of e."""
FEWEST_ROWS = 8


@dataclass(frozen=True)
class Residual:
    """The fitted batches, and each candidate's spline over them.

    The batches have routed `ids`, `active` experts and, by token block, M-tiles, each int `[rows]`. A candidate has its
    token block, the spline's constant, and its weights float64 `[rows]`.
    """

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
    """Fit the residual to measured times `[rows, candidates]`, NaN if there is none, and the wave model's predictions.

    `tiles` has the token block of every candidate. None if there are too few rows.
    """
    if len(ids) < FEWEST_ROWS:
        return None
    known = np.isfinite(times_us)
    rest = np.where(known, np.log(np.where(known, times_us, 1.0) / predicted_us), 0.0)
    fastest = np.where(known, times_us, np.inf).min(1, keepdims=True)
    weight = np.where(known, np.exp(-(np.where(known, times_us, 1.0) / fastest - 1) / NEAR_BEST), 0.0)
    share = weight / np.maximum(weight.sum(1, keepdims=True), 1e-300)
    apart = {b: _distances(ids, active, t) for b, t in tiles.items()}
    columns = {b: np.flatnonzero(np.asarray(blocks) == b) for b in tiles}

    # Adding a constant to all covariances changes no spline whose weights sum to zero, and makes the matrix definite.
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
    """Residuals of one kernel or several, for candidates `names` of a cost model.

    A candidate that no residual knows is not corrected. `blocks` are the token blocks of the model's counts (see
    `grids`).
    """

    def __init__(self, residuals: Sequence[Residual], names: Sequence[str], blocks: Sequence[int]) -> None:
        # Each residual and token block has distances of its own. `sharing` lists the indices of the candidates that use
        # them.
        sharing: dict[tuple[int, int], list[int]] = {}
        for i, name in enumerate(names):
            for j, residual in enumerate(residuals):
                if name in residual.weights:
                    sharing.setdefault((j, residual.weights[name][0]), []).append(i)
        # Rows of points: each residual's ids, then each one's active experts, then the M-tiles of each distance.
        rows = [(0, 0, r.ids) for r in residuals] + [(len(blocks) - 1, 1, r.active) for r in residuals]
        rows += [(blocks.index(b), 2, residuals[j].tiles[b]) for j, b in sharing]
        most, widest = max(len(r.ids) for r in residuals), max(map(len, sharing.values()))
        self._residuals = len(residuals)
        self._residual_of = np.array([j for j, _ in sharing])
        # Single precision causes an error of a millionth. Zeros pad a residual with fewer batches than another, and a
        # distance with fewer candidates.
        self._units = np.zeros((len(blocks), len(rows)), np.float32)
        self._points = np.zeros((len(rows), most), np.float32)
        for i, (count, number, counts) in enumerate(rows):
            self._units[count, i], self._points[i, : len(counts)] = in_units(counts, SCALES[number])
        self._weights = np.zeros((len(sharing), most, widest + 1), np.float32)
        self._constant = np.zeros(len(names), np.float32)
        # Position of each candidate among those of all distances. The last place of one belongs to no candidate.
        self._place = np.full(len(names), widest)
        for row, ((j, _), members) in enumerate(sharing.items()):
            for column, i in enumerate(members):
                _, self._constant[i], weights = residuals[j].weights[names[i]]
                self._weights[row, : len(weights), column] = weights
                self._place[i] = row * (widest + 1) + column

    def factors(self, counts: FloatArray) -> NDArray[np.float32]:
        """Compute the factors `[..., names]` of the wave model's times, for `counts [..., blocks]`, none of them 0."""
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
    """The unit that turns logarithms into a coordinate of points, and the points' coordinates."""
    logs = np.log(counts)
    unit = scale / max(float(logs.std()), 1e-9)
    return unit, logs * unit


def _distances(ids: IntArray, active: IntArray, tiles: IntArray) -> FloatArray:
    z = np.stack([in_units(n, scale)[1] for n, scale in zip((ids, active, tiles), SCALES, strict=True)], axis=1)
    return np.asarray(np.sqrt(((z[:, None] - z) ** 2).sum(-1)))
