"""A cost model for a shape that nobody has measured, from the same kernel's sweeps of other shapes.

A path's time is a sum of TERMS, each in units that the shape gives. A wave counts the weights that one CTA multiplies:
its weight rows times its share of the reduction. An active expert counts its bytes. A routed id counts its hidden and
intermediate elements, which are read and written between launches, and their products. Waves,
active experts and routed ids are those of `formula`, by whose terms the fitted coefficients are evaluated.

In these units one set of coefficients is fitted to the batches of all shapes and configurations together. Each
configuration's own coefficients, fitted to its own batches, are drawn towards the common ones. Few shapes leave some
directions open. In these a configuration behaves as its kernel does, so that kernels remain comparable.

It is a first guess, which nothing corrects. For shapes that were left out, choices among all kernels lose 1.6% to 5.8%,
as far as they can be judged. That is 1.3 to 11 times what a profile loses (`profiles/studies/cost_model`; the terms
were chosen by these shapes). Every choice by it says that it extrapolates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import ProfileError
from ..measurements.sweep import MIN_US, PATH, Sweep
from ..spec.hardware import Hardware
from ..spec.kernel import KernelConfig
from ..spec.routing import FloatArray
from ..spec.shapes import MoEShape
from .fitting import RESIDENT, solved
from .grids import Grids
from .model import IDS, Candidate, CostModel, Part, PartFit, candidates_of, parts_of, path_times

FORM = "active"
TERMS = ("launch", "wave", "bytes of an expert", "expert", "hidden", "intermediate", "products")
"""The terms' units are 1, millions of weights, megabytes, 1, thousands of elements, the same, and millions. The last
three are for each routed id."""
PULL = 0.5
"""Weight of the common coefficients in a configuration's own, as a share of its batches. All values from 0.3 to 1 serve
equally well."""
NEAR = 2.0
"""The common coefficients are fitted to times of at most this factor of the batch's fastest."""
FEWEST = 8
"""Fewest batches of a configuration; one with fewer counts as never timed."""

ConfigsOf = Callable[[MoEShape], Sequence[KernelConfig]]


@dataclass(frozen=True)
class _Seen:
    """A sweep's batches to fit on: `terms [rows, candidates, TERMS]`, `times [rows, candidates]` in microseconds, NaN
    if there is none, and the candidates' names."""

    terms: FloatArray
    times: FloatArray
    names: list[str]


class _Fit(NamedTuple):
    """Coefficients `[TERMS]`, the relative errors that they leave, and how many of the candidate's own batches they are
    fitted to."""

    coefficients: FloatArray
    rms_error: float
    max_error: float
    rows: int


def transfer(sweeps: Sequence[Sweep], configs_of: ConfigsOf, shape: MoEShape, hardware: Hardware) -> CostModel:
    """Make a model for `shape`, fitted to sweeps of other shapes.

    It has those of the kernel's configurations for `shape` that one of the sweeps has timed as a whole path. It also
    has those that no other shape has, if the kernel's tiles follow the shape. What other shapes have, and did not time,
    was too slow for them. `configs_of` lists a shape's configurations.

    Raises ProfileError if there is no configuration.
    """
    known = [s.only([PATH]) for s in sweeps if PATH in s.stages and s.batches_of("tune")]
    candidates = [Candidate(sweeps[0].kernel, c) for c in configs_of(shape)] if known else []
    others = [configs_of(s.shape) for s in known]
    names = [c.name for c in candidates]
    new = {*names} - {Candidate(s.kernel, c).name for s, cs in zip(known, others, strict=True) for c in cs}
    best: dict[str, tuple[_Fit, int]] = {}
    for resident in RESIDENT if candidates else ():
        pairs = zip(known, others, strict=True)
        seen = [found for s, configs in pairs if (found := _seen(s, configs, hardware, resident))]
        for name, fit in (_fitted(seen, names, new) if seen else {}).items():
            if name not in best or fit.rms_error < best[name][0].rms_error:
                best[name] = fit, resident
    kept = [c for c in candidates if c.name in best]
    if not kept:
        raise ProfileError(f"no whole path of a configuration for {shape.label} was measured on another shape")
    fits = {fit.part.key: fit for c in kept for fit in _parts(c, shape, *best[c.name])}
    source = f"{sweeps[0].kernel} on other shapes ({', '.join(s.shape.label for s in known)}), not on {shape.label}"
    return CostModel(shape, hardware, FORM, kept, fits, [PATH, IDS], [source])


def _seen(sweep: Sweep, configs: Sequence[KernelConfig], hardware: Hardware, resident: int) -> _Seen | None:
    """Collect the sweep's batches. None if it has no time of a configuration that still exists."""
    tune = sweep.select(sweep.batches_of("tune"))
    try:
        there = candidates_of(tune, configs)
    except ProfileError:
        return None
    times = path_times(tune, there)
    if not np.isfinite(times).any():
        return None
    parts = [_path(c, resident) for c in there]
    grids = Grids([p.grids for p in parts], hardware.num_sms)
    counts = grids.count(tune.histograms)
    waves = grids.by_part("ceil_waves", counts, grids.ctas(counts))
    active, ids = (np.broadcast_to(column, waves.shape) for column in (counts[:, -1:], counts[:, :1]))
    terms = np.stack([np.ones_like(waves), waves, active, active, ids, ids, ids], axis=-1)
    terms *= [_units(part, sweep.shape) for part in parts]
    return _Seen(terms, times, [c.name for c in there])


def _fitted(seen: Sequence[_Seen], names: Sequence[str], new: Collection[str]) -> dict[str, _Fit]:
    """Fit the candidates that were timed, or are new, by name."""
    common = _common(seen)
    place = {name: i for i, name in enumerate(names)}
    terms = np.zeros((sum(len(s.times) for s in seen), len(names), len(TERMS)))
    times = np.full(terms.shape[:2], np.nan)
    first = 0
    for s in seen:
        rows = slice(first, first + len(s.times))
        here = [j for j, name in enumerate(s.names) if name in place]
        to = [place[s.names[j]] for j in here]
        terms[rows, to], times[rows, to] = s.terms[:, here], s.times[:, here]
        first = rows.stop
    timed = np.flatnonzero(np.isfinite(times).sum(0) >= FEWEST)
    a, target = _relative(terms[:, timed], times[:, timed])
    pull = np.sqrt(PULL * (a**2).sum(1))
    drawn = pull[..., None] * np.eye(len(TERMS))
    own = solved(
        np.concatenate([a, drawn], 1), np.concatenate([target, pull * common.coefficients], 1), non_negative=True
    )
    off = abs(np.einsum("srn,sn->sr", a, own) - target)  # 0 if there is no time
    found = {
        names[i]: _Fit(c, float(np.sqrt((e**2).sum() / t.sum())), float(e.max()), int(t.sum()))
        for i, c, e, t in zip(timed.tolist(), own, off, target, strict=True)
    }
    return {name: common for name in names if name in new} | found


def _common(seen: Sequence[_Seen]) -> _Fit:
    """Fit the coefficients of all configurations together. Every sweep has the same weight."""
    rows, weights = [], []
    for s in seen:
        a, timed = _relative(s.terms, s.times)
        times = np.where(np.isfinite(s.times), s.times, np.inf)
        near = timed.T.astype(bool) & (times <= NEAR * times.min(axis=1, keepdims=True))
        rows.append(a.swapaxes(0, 1)[near])
        weights.append(np.full(len(rows[-1]), 1 / np.sqrt(len(rows[-1]))))
    a, weight = np.concatenate(rows), np.concatenate(weights)
    c = solved((a * weight[:, None])[None], weight[None], non_negative=True)[0]
    off = abs(a @ c - 1)
    return _Fit(c, float(np.sqrt(((weight * off) ** 2).sum() / len(seen))), float(off.max()), 0)


def _relative(terms: FloatArray, times: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Scale to `[candidates, rows, TERMS]` and `[candidates, rows]`, so that a row's difference is the time's relative
    error."""
    timed = np.isfinite(times)
    weight = np.where(timed, 1 / np.where(timed, times, 1.0), 0.0)
    return (terms * weight[..., None]).swapaxes(0, 1), timed.T.astype(np.float64)


def _path(candidate: Candidate, resident: int) -> Part:
    """The candidate's path, with `resident` times the CTAs on an SM."""
    part = parts_of(candidate, [PATH])[0]
    return part.with_residents([resident * g.ctas_per_sm for g in part.grids])


def _units(part: Part, shape: MoEShape) -> list[float]:
    """The units of the coefficients of TERMS for this part and shape."""
    first = part.grids[0]
    weights = first.block_n * first.k / first.split_k / 1e6
    hidden, inter = shape.hidden_size / 1e3, shape.intermediate_size / 1e3
    return [1.0, weights, shape.expert_bytes / 1e6, 1.0, hidden, inter, hidden * inter]


def _parts(candidate: Candidate, shape: MoEShape, fit: _Fit, resident: int) -> list[PartFit]:
    """The path's part, and the part that grows with the routed ids: a part without a grid has one CTA an id."""
    path, ids = _path(candidate, resident), parts_of(candidate, [PATH, IDS])[1]
    launch, wave, size, expert, *an_id = (fit.coefficients * _units(path, shape)).tolist()
    return [
        PartFit(
            part,
            of_form,
            rows=fit.rows,
            rms_error=fit.rms_error,
            max_error=fit.max_error,
            # No batch of this shape was fitted to, so all are outside.
            ctas_range=(np.inf, -np.inf),
            active_range=(1, 0),
            floor_us=floor,
        )
        for part, of_form, floor in (
            (path, (launch, wave, 0.0, size + expert), MIN_US),
            (ids, (0.0, 0.0, sum(an_id), 0.0), 0.0),
        )
    ]
