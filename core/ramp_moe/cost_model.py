"""The wave cost model: a handful of parameters a part, fitted from a sweep, that turn an expert histogram into the
predicted time of every candidate.

A candidate is one configuration of one kernel; its time is the sum over its parts: one for each stage, or a single one
where the sweep measured the path as a whole. A part is seen through the grids of its GEMMs alone: g CTAs that do work,
in ceil(g / slots) waves. A path of two GEMMs adds up both grids, each CTA and wave counted by the work of a CTA
relative to the first grid's (weight rows times its share of the reduction). Parts without a grid (quantise, schedule,
...) are seen as one work item a routed id, with no waves. FORMS lists which terms a form combines; each part has one
coefficient a term, found (in `fitting`) by least squares on the relative error (rows weighted by 1 / time: 3% count the
same at 30 us and at 3 ms).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import KernelError, ProfileError, UnknownNameError
from .geometry import GridGeometry
from .hardware import Hardware
from .kernel import PREPARATION, STAGE_KINDS, KernelConfig
from .residual import Correction, Residual
from .routing import FloatArray, IntArray
from .shapes import MoEShape
from .sweep import COLUMN_KINDS, PATH, Sweep, path_key

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Form:
    """Terms of T = sum_i c_i * term_i, by name (see `Grids._term`), "one" first. A non-negative fit cannot predict a
    negative time."""

    terms: tuple[str, ...]
    non_negative: bool
    why: str
    smooth: bool = False
    """Whether what the terms leave over is corrected (see `residual`)."""


FORMS: Mapping[str, Form] = {
    "paper": Form(
        ("one", "waves", "ctas", "log_ctas"),
        False,
        "RaMP's wave cost model (arXiv 2604.26039): start-up, waves = g / SMs, traffic a CTA, sub-wave bend",
    ),
    "ceil": Form(
        ("one", "ceil_waves", "ctas", "log_ctas"),
        False,
        "the same with waves rounded up: an almost empty wave costs a full one, and b and c are no longer collinear",
    ),
    "active": Form(
        ("one", "ceil_waves", "ctas", "active"),
        True,
        "active experts in place of the logarithm: few tokens are bound by the weights of the experts they wake",
    ),
    "smooth": Form(
        ("one", "ceil_waves", "ctas", "active"),
        True,
        "the same, with what it leaves over corrected as a smooth function of the batch: batches alike are wrong alike",
        smooth=True,
    ),
}
DEFAULT_FORM = "active"
NEAR = 1.2
"""Candidates whose time by the terms alone is within this factor of the fastest are corrected; the others stay behind
them, as slow as the slowest at least: what the correction learnt there decides nothing."""


def get_form(name: str) -> Form:
    """The form of that name, or UnknownNameError."""
    if name not in FORMS:
        raise UnknownNameError("cost model form", name, FORMS)
    return FORMS[name]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration of one kernel that can be dispatched to."""

    kernel: str
    config: KernelConfig

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.config.name}"


@dataclass(frozen=True, slots=True)
class Part:
    """What is measured and fitted as one: a stage, or a whole path. `key` is that of its column in a sweep."""

    key: str
    grids: tuple[GridGeometry, ...]


def parts_of(candidate: Candidate, stages: Sequence[str]) -> list[Part]:
    """The parts that times of these kinds of columns are the sum of."""
    config = candidate.config
    if PATH in stages:
        return [Part(path_key(candidate.kernel, config.name), config.gemms)]
    return [Part(s.key, () if s.geometry is None else (s.geometry,)) for s in config.stages if s.kind in stages]


@dataclass(frozen=True, slots=True)
class PartFit:
    """What a fit knows of one part.

    `coefficients` follow the form's terms, in microseconds a unit. `max_error` and `rms_error` are relative, on the
    fitted rows. The ranges are those of the fitted rows; outside them a prediction is an extrapolation. `floor_us` is
    half the fastest fitted time: no prediction goes below it.
    """

    part: Part
    coefficients: tuple[float, ...]
    rows: int
    rms_error: float
    max_error: float
    ctas_range: tuple[float, float]
    active_range: tuple[int, int]
    floor_us: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted microseconds float64 `[..., candidates]`, and which of them extrapolate beyond the fitted rows."""

    us: FloatArray
    extrapolated: BoolArray


class Grids:
    """Many parts' grids as arrays, so that all are evaluated at once for one histogram or a batch of them.

    CTA counts are float64 here: `GridGeometry` counts in integers, but the division of doubles is several times
    faster, and exact for every count below 2**52 / block.
    """

    def __init__(self, parts: Sequence[Part], num_sms: int) -> None:
        # A part without a grid counts routed ids: blocks of one token, one tile along the weights, endless slots.
        grids = [g for p in parts for g in p.grids or (None,)]
        blocks = np.array([1 if g is None else g.block_tokens for g in grids], np.float64)
        distinct, self.block_of = np.unique(blocks, return_inverse=True)
        self.blocks = distinct[:, None]
        self.ctas_per_m_tile = np.array([1.0 if g is None else g.ctas_per_m_tile for g in grids])
        self.slots = np.array([np.inf if g is None else g.slots(num_sms) for g in grids])
        # Part p adds up the grids starts[p] : starts[p + 1], each by the work of one of its CTAs.
        self.starts = np.cumsum([0, *(max(len(p.grids), 1) for p in parts[:-1])])
        self.work = np.array([w for p in parts for w in _relative_work(p.grids)])
        self.one_grid_each = len(grids) == len(parts)

    def tiles(self, histograms: IntArray) -> FloatArray:
        """M-tiles of each distinct token block, `[..., blocks]`."""
        # To floats before the broadcast, which would convert every element once a block.
        shares = histograms.astype(np.float64)[..., None, :] / self.blocks
        return np.asarray(np.add.reduce(np.ceil(shares, out=shares), axis=-1))

    def ctas(self, tiles: FloatArray) -> FloatArray:
        """CTAs that do work, `[..., grids]`."""
        return np.asarray(tiles.take(self.block_of, axis=-1) * self.ctas_per_m_tile)

    def sum(self, per_grid: FloatArray) -> FloatArray:
        """`[..., grids]` -> `[..., parts]`, weighted by work."""
        if self.one_grid_each:
            return per_grid
        return np.asarray(np.add.reduceat(per_grid * self.work, self.starts, axis=-1))

    def terms(self, names: Sequence[str], ctas: FloatArray, active: FloatArray) -> list[FloatArray | float]:
        """Each named term, `[..., parts]` or broadcasting to it, of `ctas [..., grids]` and `active [..., 1]`."""
        return [self._term(name, ctas, active) for name in names]

    def _term(self, name: str, ctas: FloatArray, active: FloatArray) -> FloatArray | float:
        match name:
            case "one":
                return 1.0
            case "waves":
                return self.sum(np.asarray(ctas / self.slots))
            case "ceil_waves":
                return self.sum(np.asarray(np.ceil(ctas / self.slots)))
            case "ctas":
                return self.sum(ctas)
            case "log_ctas":
                return np.asarray(np.log1p(self.sum(ctas)))
            case "active":
                return active
        raise KernelError(f"cost model form names an unknown term {name!r}")


def _relative_work(grids: Sequence[GridGeometry]) -> list[float]:
    """Work of one CTA of each grid, in those of the first: its weight rows times its share of the reduction."""
    work = [g.block_weights * g.reduction / g.split_k for g in grids] or [1.0]
    return [w / work[0] for w in work]


def active_of(histograms: IntArray) -> FloatArray:
    """Active experts `[..., 1]`, as floats for the terms."""
    return np.asarray(np.add.reduce(histograms > 0, axis=-1, keepdims=True, dtype=np.float64))


class CostModel:
    """Fitted parts and the candidates that are sums of them.

    Raises KernelError where a candidate needs a part that has no fit.
    """

    def __init__(
        self,
        shape: MoEShape,
        hardware: Hardware,
        form: str,
        candidates: Sequence[Candidate],
        fits: Mapping[str, PartFit],
        stages: Sequence[str],
        measured: Sequence[str],
        histograms: IntArray | None = None,
        residuals: Sequence[Residual] = (),
    ) -> None:
        """`stages` are the kinds of columns that the times are made of ("path" for whole paths); a candidate's other
        stages are left out. `measured` says, a line each, where and when the times were recorded. `histograms` are
        those of the batches that were fitted to, `[batches, num_experts]`, where they are at hand; `residuals` correct
        the candidates that they know."""
        if not candidates:
            raise KernelError(f"no candidate to predict for {shape.label} on {hardware.name}")
        self.shape, self.hardware, self.form = shape, hardware, form
        self.candidates = tuple(candidates)
        self.stages, self.measured, self.histograms = tuple(stages), tuple(measured), histograms
        keys = [[p.key for p in parts_of(c, self.stages)] for c in candidates]
        missing = [(c.name, k) for c, ks in zip(candidates, keys, strict=True) for k in ks if k not in fits]
        if missing:
            raise KernelError(f"candidate {missing[0][0]} needs {missing[0][1]!r}, which is not fitted")
        self.fits = {k: fits[k] for k in dict.fromkeys(itertools.chain.from_iterable(keys))}
        index = {k: i for i, k in enumerate(self.fits)}
        fitted = list(self.fits.values())
        self._terms = get_form(form).terms
        self._grids = Grids([f.part for f in fitted], hardware.num_sms)
        self._coefficients = np.array([f.coefficients for f in fitted]).T.copy()
        self._floor = np.array([f.floor_us for f in fitted])
        self._ctas_range = np.array([f.ctas_range for f in fitted]).T
        self._active_range = np.array([f.active_range for f in fitted]).T
        # Candidate c sums parts _flat[_starts[c] : _starts[c + 1]].
        self._flat = np.array([index[k] for ks in keys for k in ks], np.intp)
        self._starts = np.cumsum([0, *(len(ks) for ks in keys[:-1])])
        self._parts_of = [[index[k] for k in ks] for ks in keys]
        self._ranges = [(*f.ctas_range, *f.active_range) for f in fitted]
        self.residuals = tuple(residuals)
        block_index = {int(b): i for i, b in enumerate(self._grids.blocks[:, 0])}
        self._corrections = []
        for residual in self.residuals:
            columns = [i for i, c in enumerate(self.candidates) if c.name in residual.weights]
            if columns:
                names = [self.candidates[i].name for i in columns]
                self._corrections.append(Correction(residual, columns, names, block_index))
        # The commonest case, one measured part a candidate, needs no summing in the hot path.
        self._one_part_each = np.array_equal(self._flat, np.arange(len(candidates)))

    @property
    def num_experts(self) -> int:
        return self.shape.num_experts

    def cost(self, histograms: IntArray) -> FloatArray:
        """Microseconds `[..., candidates]` for checked histograms int64 `[..., num_experts]`: the hot path."""
        return self._cost(histograms, self._grids.tiles(histograms), active_of(histograms))

    def choose(self, histogram: IntArray) -> tuple[int, float, bool]:
        """Index of the fastest candidate for one checked histogram (the first of equal ones), its predicted
        microseconds, and whether that extrapolates."""
        tiles, active = self._grids.tiles(histogram), active_of(histogram)
        us = self._cost(histogram, tiles, active)
        best = int(us.argmin())
        extrapolated = False
        summed, a = self._grids.sum(self._grids.ctas(tiles)), active[0]
        for i in self._parts_of[best]:
            f = self._ranges[i]
            extrapolated |= not (f[0] <= summed[i] <= f[1] and f[2] <= a <= f[3])
        return best, float(us[best]), extrapolated

    def predict(self, histograms: IntArray) -> Prediction:
        """As `cost`, and which predictions lie outside the rows that the fit saw."""
        tiles, active = self._grids.tiles(histograms), active_of(histograms)
        (ctas_low, ctas_high), (active_low, active_high) = self._ctas_range, self._active_range
        summed = self._grids.sum(self._grids.ctas(tiles))
        outside = (summed < ctas_low) | (summed > ctas_high) | (active < active_low) | (active > active_high)
        extrapolated = np.logical_or.reduceat(outside[..., self._flat], self._starts, axis=-1)
        return Prediction(self._cost(histograms, tiles, active), extrapolated)

    def restrict(self, kernels: Sequence[str]) -> CostModel:
        """The same model with the candidates of these kernels only."""
        return self._with([c for c in self.candidates if c.kernel in kernels])

    def without(self, names: Collection[str]) -> CostModel:
        """The same model less the candidates of these names. Raises KernelError where none is left."""
        return self._with([c for c in self.candidates if c.name not in names]) if names else self

    def _with(self, kept: Sequence[Candidate]) -> CostModel:
        return CostModel(
            self.shape,
            self.hardware,
            self.form,
            kept,
            self.fits,
            self.stages,
            self.measured,
            self.histograms,
            self.residuals,
        )

    def _cost(self, histograms: IntArray, tiles: FloatArray, active: FloatArray) -> FloatArray:
        us = self._by_terms(tiles, active)
        if self._corrections:
            near = us <= NEAR * us.min(-1, keepdims=True)
            ids = np.add.reduce(histograms, axis=-1, dtype=np.float64)
            for correction in self._corrections:
                correction.apply(us, near, ids, active[..., 0], tiles)
            np.maximum(us, np.where(near, us, 0.0).max(-1, keepdims=True), out=us, where=~near)
        return us

    def _by_terms(self, tiles: FloatArray, active: FloatArray) -> FloatArray:
        terms = self._grids.terms(self._terms, self._grids.ctas(tiles), active)
        # The first term is the constant; any other gives the sum its full shape.
        us = np.asarray(self._coefficients[1] * terms[1])
        us += self._coefficients[0]
        for coefficient, term in zip(self._coefficients[2:], terms[2:], strict=True):
            us += coefficient * term
        np.maximum(us, self._floor, out=us)
        if self._one_part_each:
            return us
        return np.asarray(np.add.reduceat(us[..., self._flat], self._starts, axis=-1))


def candidates_of(
    sweep: Sweep, configs: Sequence[KernelConfig], notes: list[str] | None = None
) -> tuple[Candidate, ...]:
    """The configurations of the sweep's kernel that have a column for each of their parts. `notes` gains a line where
    some have not that the sweep does not say to have been left out.

    Raises ProfileError where there is none: the plugin's configurations have changed since the sweep was taken.
    """
    measured = sweep.column_of
    candidates = tuple(
        c
        for c in (Candidate(sweep.kernel, config) for config in configs)
        if (parts := parts_of(c, sweep.stages)) and all(p.key in measured for p in parts)
    )
    if not candidates:
        raise ProfileError(
            f"the sweep of {sweep.kernel} for {sweep.shape.label} on {sweep.device} has no column that fits a "
            "configuration of the kernel registered under that name; measure again"
        )
    explained = {name for x in sweep.record.left_out for name in x.configs}
    missing = {c.name for c in configs} - {c.config.name for c in candidates} - explained
    if notes is not None and missing:
        notes.append(
            f"{sweep.kernel}: {len(missing)} of {len(configs)} configurations left out, "
            f"the sweep has no times for them ({', '.join(sweep.stages)})"
        )
    return candidates


def provenance(sweep: Sweep) -> str:
    """Which kernel a sweep measured, where and when, in one line."""
    record, runs = sweep.record, sweep.record.runs
    days = list(dict.fromkeys(run.measured[:10] for run in runs))
    where = " and ".join(dict.fromkeys(run.device_name for run in runs))
    times = f" ({len(runs)} runs)" if len(runs) > 1 else ""
    return f"{record.kernel} {record.kernel_version} on {where}, {' and '.join(days)}{times}"


def path_times(sweep: Sweep, candidates: Sequence[Candidate], runs: bool = False) -> FloatArray:
    """Measured microseconds `[rows, candidates]`: each candidate's columns summed, NaN where one is missing. With
    `runs`, of each run by itself, `[runs, rows, candidates]`."""
    times = sweep.runs_us if runs else sweep.times_us
    column = sweep.column_of
    picked = [[column[p.key] for p in parts_of(c, sweep.stages)] for c in candidates]
    return np.stack([times[..., p].sum(-1) for p in picked], axis=-1)


def path_bounds(sweep: Sweep, candidates: Sequence[Candidate]) -> BoolArray:
    """Which of `path_times` are bounds, or contain one: `[rows, candidates]`."""
    column, bounded = sweep.column_of, sweep.only_bounded
    return np.stack([bounded[:, [column[p.key] for p in parts_of(c, sweep.stages)]].any(1) for c in candidates], 1)


def join(models: Sequence[CostModel]) -> CostModel:
    """One model over the candidates of several kernels for one shape and device.

    A part that two of them share is taken from the first, the histograms from the first that has some. Raises
    ProfileError where their times cannot be compared.
    """
    first = models[0]
    fits: dict[str, PartFit] = {}
    for model in models:
        if (model.shape, model.hardware, model.form) != (first.shape, first.hardware, first.form):
            raise ProfileError("cost models of different shapes, devices or forms cannot be joined")
        fits = model.fits | fits
    for one, other in itertools.combinations(models, 2):
        if reason := incomparable(one, other):
            raise ProfileError(f"{reason}; choose comparable ones with --kernel")
    candidates = [c for m in models for c in m.candidates]
    stages = [k for k in COLUMN_KINDS if any(k in m.stages for m in models)]
    measured = [line for m in models for line in m.measured]
    histograms = next((m.histograms for m in models if m.histograms is not None), None)
    residuals = [r for m in models for r in m.residuals]
    return CostModel(first.shape, first.hardware, first.form, candidates, fits, stages, measured, histograms, residuals)


class Timed(Protocol):
    """Candidates of one kernel, and the kinds of stages that their times contain."""

    @property
    def candidates(self) -> tuple[Candidate, ...]: ...

    @property
    def stages(self) -> tuple[str, ...]: ...


def left_out(timed: Timed) -> list[str]:
    """Kinds of stages that the candidates run and their times do not contain."""
    run = {s.kind for c in timed.candidates for s in c.config.stages}
    return [] if PATH in timed.stages else [k for k in STAGE_KINDS if k in run and k not in timed.stages]


def incomparable(a: Timed, b: Timed) -> str | None:
    """Why two kernels' times must not be compared; None where they may be.

    Both may leave out preparation (see PREPARATION), nothing else, and neither may contain what the other leaves out.
    """
    for one, other in ((a, b), (b, a)):
        name = one.candidates[0].kernel
        if missing := [k for k in left_out(one) if k not in PREPARATION]:
            return f"the times of {name} leave out {', '.join(missing)}"
        if uneven := [k for k in left_out(one) if k in other.stages or PATH in other.stages]:
            return f"the times of {name} leave out {', '.join(uneven)}, those of {other.candidates[0].kernel} do not"
    return None
