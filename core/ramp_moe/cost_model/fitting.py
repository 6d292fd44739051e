"""Fitting the cost model: every part's coefficients by least squares on the relative error, then the residual that they
leave."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import KernelError, ProfileError
from ..measurements.sweep import Sweep
from ..spec.geometry import m_tiles
from ..spec.hardware import Hardware
from ..spec.routing import FloatArray, IntArray
from .grids import Grids
from .model import (
    DEFAULT_FORM,
    BoolArray,
    Candidate,
    CostModel,
    Form,
    Part,
    PartFit,
    get_form,
    parts_of,
    path_bounds,
    path_times,
    provenance,
)
from .residual import Residual, fit_residual

RESIDENT = (1, 2, 3, 4)
"""Numbers of resident CTAs an SM that are tried, as multiples of what the kernel's geometry says. How many fit depends
on registers and shared memory, which a geometry does not know. It moves the steps of the waves."""

CONTEND = 1.15
"""Candidates that the terms never put within this factor of the fastest, on any fitted batch, are neither corrected nor
chosen: the terms know them well enough. Leaving them out makes the fit smaller and faster to evaluate."""


def fit_sweep(sweep: Sweep, candidates: Sequence[Candidate], hardware: Hardware, form: str = DEFAULT_FORM) -> CostModel:
    """Fit every part that the candidates need on the sweep's rows.

    A candidate is dropped if one of its parts has fewer rows, measured or bounded, than the form has terms. Raises
    ProfileError if none is left.
    """
    spec = get_form(form)
    by_key = {p.key: p for c in candidates for p in parts_of(c, sweep.stages)}
    parts = list(by_key.values())
    column = sweep.column_of
    if absent := by_key.keys() - column.keys():
        raise KernelError(f"the sweep of {sweep.kernel} has no column {min(absent)!r}")
    picked = [column[k] for k in by_key]
    times, bounded = sweep.times_us[:, picked], sweep.only_bounded[:, picked]
    tried = [
        _fit_terms(
            [p.with_residents([resident * g.ctas_per_sm for g in p.grids]) for p in parts],
            sweep.histograms,
            times,
            bounded,
            spec,
            hardware,
        )
        for resident in (RESIDENT if spec.resident else (1,))
    ]
    fits = {fit.part.key: fit for fit in _best_fits(tried, sweep.histograms, times)}
    kept = [c for c in candidates if all(p.key in fits for p in parts_of(c, sweep.stages))]
    if not kept:
        raise ProfileError(
            f"{len(sweep.labels)} batches of {sweep.kernel} for {sweep.shape.label} on {sweep.device} are too few to "
            f"fit {len(spec.terms)} terms; measure more routings"
        )
    measured = [provenance(sweep)]
    model = CostModel(sweep.shape, hardware, form, kept, fits, sweep.stages, measured, sweep.histograms)
    residual = _residual(model, sweep) if spec.smooth else None
    if residual is None:
        return model
    return CostModel(sweep.shape, hardware, form, kept, fits, sweep.stages, measured, sweep.histograms, [residual])


@dataclass(frozen=True, slots=True)
class _Fitted:
    """Fits of all parts with one number of resident CTAs an SM."""

    parts: Sequence[Part]
    coefficients: FloatArray
    """`[parts, terms]`"""
    relative: FloatArray
    """Relative errors `[rows, parts]`, NaN for what was not fitted"""
    ctas: FloatArray
    """`[rows, parts]`"""
    loss: FloatArray
    """`[parts]`: the error over all rows, infinite if fewer rows were fitted than there are terms"""


def _fit_terms(
    parts: Sequence[Part],
    histograms: IntArray,
    times: FloatArray,
    bounded: BoolArray,
    spec: Form,
    hardware: Hardware,
) -> _Fitted:
    """Fit every part to `times [rows, parts]`, microseconds.

    The loss sums the squared distance from each time, or the distance below each bound.
    """
    grids = Grids([p.grids for p in parts], hardware.num_sms)
    counts = grids.count(histograms)
    ctas = grids.ctas(counts)
    features = np.stack([grids.by_part(name, counts, ctas) for name in spec.terms], axis=-1)
    coefficients, relative = least_squares(features, np.where(bounded, np.nan, times), spec.non_negative)
    if bounded.any():
        # A bound enters the fit only if the fit lies below it there, or has too few batches without it.
        below = (bounded & (np.einsum("rsn,sn->rs", features, coefficients) < times)).any(0)
        below |= (np.isfinite(times) & ~bounded).sum(0) < len(spec.terms)
        with_bounds = least_squares(features[:, below], times[:, below], spec.non_negative)
        coefficients[below], relative[:, below] = with_bounds
    off = np.einsum("rsn,sn->rs", features, coefficients) / times - 1
    loss = np.nansum(np.where(bounded, np.minimum(off, 0), off) ** 2, axis=0)
    loss[np.isfinite(relative).sum(0) < len(spec.terms)] = np.inf
    return _Fitted(parts, coefficients, relative, grids.by_part("ctas", counts, ctas), loss)


def _best_fits(tried: Sequence[_Fitted], histograms: IntArray, times: FloatArray) -> Iterator[PartFit]:
    """Yield each part's fit of the least loss. A part with too few rows has none."""
    losses = np.stack([fitted.loss for fitted in tried])
    best, columns = losses.argmin(0), np.arange(losses.shape[1])
    relative = np.stack([fitted.relative for fitted in tried])[best, :, columns].T
    ctas = np.stack([fitted.ctas for fitted in tried])[best, :, columns].T
    seen = np.isfinite(relative)
    error = np.where(seen, relative, 0.0)
    active = (histograms > 0).sum(-1)[:, None]

    def low(values: FloatArray | IntArray) -> FloatArray:
        return np.asarray(np.where(seen, values, np.inf).min(0))

    def high(values: FloatArray | IntArray) -> FloatArray:
        return np.asarray(np.where(seen, values, -np.inf).max(0))

    rows, worst, fastest = seen.sum(0), np.abs(error).max(0), low(times)
    rms = np.sqrt((error**2).sum(0) / np.maximum(rows, 1))
    fewest, most, fewest_active, most_active = low(ctas), high(ctas), low(active), high(active)
    for i, fitted in enumerate(tried[b] for b in best):
        if np.isfinite(fitted.loss[i]):
            yield PartFit(
                part=fitted.parts[i],
                coefficients=tuple(fitted.coefficients[i].tolist()),
                rows=int(rows[i]),
                rms_error=float(rms[i]),
                max_error=float(worst[i]),
                ctas_range=(float(fewest[i]), float(most[i])),
                active_range=(int(fewest_active[i]), int(most_active[i])),
                floor_us=float(fastest[i]) / 2,
            )


def _residual(model: CostModel, sweep: Sweep) -> Residual | None:
    """Fit the residual of the contending candidates: those that the terms put near the fastest on any of the sweep's
    rows."""
    histograms = sweep.histograms
    rows = np.flatnonzero(histograms.any(-1))
    predicted = model.by_terms(histograms[rows])
    contend = np.flatnonzero((predicted <= CONTEND * predicted.min(1, keepdims=True)).any(0))
    candidates = [model.candidates[i] for i in contend]
    times = np.where(path_bounds(sweep, candidates), np.nan, path_times(sweep, candidates))[rows]
    blocks = [_token_block(parts_of(c, sweep.stages)) for c in candidates]
    seen = histograms[rows]
    tiles = {b: m_tiles(seen, b) for b in dict.fromkeys(blocks)}
    names = [c.name for c in candidates]
    active = (seen > 0).sum(-1)
    return fit_residual(seen.sum(-1), active, tiles, names, blocks, times, predicted[:, contend])


def _token_block(parts: Sequence[Part]) -> int:
    """Token block of the first grid; 1 if there is none, as in `Grids`."""
    return next((g.block_m for p in parts for g in p.grids), 1)


def least_squares(terms: FloatArray, times: FloatArray, non_negative: bool) -> tuple[FloatArray, FloatArray]:
    """Minimise sum_r ((terms[r, s] @ c[s] - times[r, s]) / times[r, s])**2 for every part s.

    terms: `[rows, stages, n]`. times: `[rows, stages]`; NaN rows do not count. Returns c `[stages, n]` and the relative
    residuals `[rows, stages]`. Collinear terms (the literal paper form) get the minimum-norm solution.
    """
    seen = np.isfinite(times)
    weight = np.where(seen, 1 / np.where(seen, times, 1.0), 0.0)
    a = np.moveaxis(terms * weight[..., None], 0, 1)
    target = seen.T.astype(np.float64)
    c = solved(a, target, non_negative)
    return c, np.where(seen, np.einsum("srn,sn->rs", a, c) - target.T, np.nan)


def solved(a: FloatArray, target: FloatArray, non_negative: bool) -> FloatArray:
    """Solve for c `[problems, n]` that minimises |a[s] @ c[s] - target[s]| for every problem s.

    a: `[problems, rows, n]`. target: `[problems, rows]`.
    """
    # Terms span five orders of magnitude. Unit columns keep the pseudo-inverse's cut-off meaningful.
    scale = np.abs(a).max(axis=1)
    scale = np.where(scale > 0, scale, 1.0)
    # A rotation changes no distance, and leaves one row more than there are terms.
    rotated = np.asarray(np.linalg.qr(np.concatenate([a / scale[:, None], target[..., None]], axis=-1), mode="r"))
    solve = _non_negative if non_negative else _unconstrained
    return solve(rotated[..., :-1], rotated[..., -1]) / scale


def _unconstrained(a: FloatArray, target: FloatArray) -> FloatArray:
    return np.asarray(np.einsum("snr,sr->sn", np.linalg.pinv(a), target))


def _non_negative(a: FloatArray, target: FloatArray) -> FloatArray:
    """Solve non-negative least squares exactly, by trying every support.

    The optimum is the unconstrained one on the support where it is positive. Four terms have only fifteen supports,
    seven have 127.
    """
    stages, _, n = a.shape
    best, best_loss = np.zeros((stages, n)), (target**2).sum(1)
    for support in itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(1, n + 1)):
        c = np.zeros((stages, n))
        c[:, support] = _unconstrained(a[:, :, support], target)
        loss = ((np.einsum("srn,sn->sr", a, c) - target) ** 2).sum(1)
        better = (c >= 0).all(1) & (loss < best_loss)
        best[better], best_loss[better] = c[better], loss[better]
    return best
