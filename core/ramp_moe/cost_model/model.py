"""The wave cost model: it turns an expert histogram into the predicted time of every candidate, by a handful of
parameters a part that are fitted from a sweep.

A candidate is one configuration of one kernel. Its time is the sum over its parts: one for each stage, or a single one
if the sweep measured the path as a whole. A part is described by the grids of its GEMMs alone: g CTAs that do work, in
ceil(g / slots) waves. `formula` defines every step from the histogram to the choice. `CostModel` is its numpy evaluator
for steps 4 to 10.

FORMS lists the terms that each form combines. Each part has one coefficient a term, found in `fitting` by least squares
on the relative error. Rows are weighted by 1 / time, so that 3% count the same at 30 us and at 3 ms.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import KernelError, ProfileError, UnknownNameError
from ..measurements.sweep import COLUMN_KINDS, PATH, Sweep, path_key
from ..spec.geometry import GridGeometry
from ..spec.hardware import Hardware
from ..spec.kernel import PREPARATION, STAGE_KINDS, KernelConfig
from ..spec.routing import FloatArray, IntArray
from ..spec.shapes import MoEShape
from .correction import Corrections
from .grids import Grids
from .residual import Correction, Residual
from .roofline import expert_read_us, roofline_ratio

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Form:
    """The terms of T = sum_i c_i * term_i, by name (see `formula`), "one" first. A non-negative fit cannot predict a
    negative time."""

    terms: tuple[str, ...]
    non_negative: bool
    why: str
    resident: bool = False
    """True if the number of CTAs resident on an SM is fitted, too (see `fitting`)."""
    smooth: bool = False
    """True if a residual corrects what the terms leave over (see `residual`)."""


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
        "active experts in place of the logarithm: few tokens are bound by the weights of the experts they wake; and "
        "waves of as many CTAs an SM as explain the times best",
        resident=True,
    ),
    "smooth": Form(
        ("one", "ceil_waves", "ctas", "active"),
        True,
        "the same, with what it leaves over corrected as a smooth function of the batch: batches alike are wrong alike",
        resident=True,
        smooth=True,
    ),
}
DEFAULT_FORM = "smooth"


def get_form(name: str) -> Form:
    """Look up a form. Raises UnknownNameError if there is none of that name."""
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
    """A stage or a whole path, measured and fitted as one. `key` is that of its column in a sweep."""

    key: str
    grids: tuple[GridGeometry, ...]

    def with_residents(self, ctas_per_sm: Sequence[int]) -> Part:
        """Set the number of resident CTAs an SM, by grid."""
        grids = (replace(g, ctas_per_sm=n) for g, n in zip(self.grids, ctas_per_sm, strict=True))
        return Part(self.key, tuple(grids))


IDS = "ids"
"""Kind of a path's part that grows with the routed ids alone. No sweep measures it; a model of other shapes has it."""


def parts_of(candidate: Candidate, stages: Sequence[str]) -> list[Part]:
    """List the parts whose times add up to what columns of these kinds measure."""
    config = candidate.config
    if PATH in stages:
        key = path_key(candidate.kernel, config.name)
        return [Part(key, config.gemms), *([Part(f"{key}/{IDS}", ())] if IDS in stages else [])]
    return [Part(s.key, () if s.geometry is None else (s.geometry,)) for s in config.stages if s.kind in stages]


@dataclass(frozen=True, slots=True)
class PartFit:
    """What a fit knows of one part.

    `part` is the candidate's, except for its CTAs an SM, if the form fits them. `coefficients` follow the form's terms,
    in microseconds a unit. `max_error` and `rms_error` are relative, on the fitted rows. The ranges are those of the
    fitted rows; outside them a prediction is an extrapolation. `floor_us` is half the fastest fitted time, and no
    prediction goes below it.
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


class _Sums:
    """Candidates as sums of their parts' terms. `candidates` lists each candidate's parts by key."""

    def __init__(
        self, candidates: Sequence[Sequence[str]], fits: Mapping[str, PartFit], terms: Sequence[str], num_sms: int
    ) -> None:
        index = {k: i for i, k in enumerate(dict.fromkeys(itertools.chain.from_iterable(candidates)))}
        fitted = [fits[k] for k in index]
        coefficients = np.array([f.coefficients for f in fitted])
        self.grids = Grids([f.part.grids for f in fitted], num_sms)
        # The first term is the constant.
        self._terms, self._constant = terms[1:], coefficients[:, 0].copy()
        self._matrix = self.grids.matrix(self._terms, coefficients[:, 1:])
        self._floor = np.array([f.floor_us for f in fitted])
        self._ctas_range = np.array([f.ctas_range for f in fitted]).T
        self._active_range = np.array([f.active_range for f in fitted]).T
        self._parts_of = [[index[k] for k in keys] for keys in candidates]
        # Candidate c sums parts _flat[_starts[c] : _starts[c + 1]].
        self._flat = np.array([i for parts in self._parts_of for i in parts], np.intp)
        self._starts = np.cumsum([0, *(len(parts) for parts in self._parts_of[:-1])])
        # One measured part a candidate is the commonest case. It needs no summing in the hot path.
        self._one_part_each = np.array_equal(self._flat, np.arange(len(candidates)))
        self._limits = [
            (int(launch), *f.ctas_range, *f.active_range)
            for launch, f in zip(self.grids.launch_of, fitted, strict=True)
        ]

    def us(self, counts: FloatArray, ctas: FloatArray) -> FloatArray:
        """Predict microseconds `[..., candidates]`."""
        us: FloatArray = self.grids.features(self._terms, counts, ctas).dot(self._matrix)
        us += self._constant
        np.maximum(us, self._floor, out=us)
        if self._one_part_each:
            return us
        return np.asarray(np.add.reduceat(us[..., self._flat], self._starts, axis=-1))

    def outside(self, counts: FloatArray, ctas: FloatArray) -> BoolArray:
        """Mask `[..., candidates]` of those that have a part outside its fitted rows."""
        (ctas_low, ctas_high), (active_low, active_high) = self._ctas_range, self._active_range
        summed, active = self.grids.sum(ctas)[..., self.grids.launch_of], counts[..., -1:]
        outside = (summed < ctas_low) | (summed > ctas_high) | (active < active_low) | (active > active_high)
        return np.logical_or.reduceat(outside[..., self._flat], self._starts, axis=-1)

    def is_outside(self, candidate: int, counts: FloatArray, ctas: FloatArray) -> bool:
        """Tell the same for one candidate and one batch, faster."""
        summed, active = self.grids.sum(ctas), counts[-1]
        for i in self._parts_of[candidate]:
            launch, low, high, fewest, most = self._limits[i]
            if not (low <= summed[launch] <= high and fewest <= active <= most):
                return True
        return False


class CostModel:
    """Fitted parts and the candidates that are sums of them.

    Raises KernelError if a candidate needs a part that has no fit.
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
        corrections: Corrections | None = None,
        measured_on: Hardware | None = None,
    ) -> None:
        """Combine fits into candidates.

        stages: kinds of columns that the times are made of ("path" for whole paths). A candidate's other stages are
        left out. measured: says, a line each, where and when the times were recorded. histograms: the batches that were
        fitted to, `[batches, num_experts]`, if they are at hand. residuals: correct the candidates that they know.
        corrections: by batch size; they take part in the model that `at` makes. measured_on: the GPU that was fitted
        to, if it is another (see `scaling`).
        """
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
        self.residuals = tuple(residuals)
        known = {name for r in self.residuals for name in r.weights}
        corrected = {c.kernel for c in candidates if c.name in known}
        self.contenders = np.array(
            [i for i, c in enumerate(candidates) if c.name in known or c.kernel not in corrected], np.intp
        )
        """Indices of the candidates that can be chosen. If a kernel has a residual, only those that it corrects are
        among them."""
        terms = get_form(form).terms
        self._sums = _Sums(keys, self.fits, terms, hardware.num_sms)
        self._contending = _Sums([keys[i] for i in self.contenders], self.fits, terms, hardware.num_sms)
        self._correction = None
        if corrected:
            names = [self.candidates[i].name for i in self.contenders]
            self._correction = Correction(self.residuals, names, self._contending.grids.blocks.tolist())
        whole = {PATH, "gemm"} & {*self.stages}
        self._expert_us = expert_read_us(shape, hardware) if whole else 0.0
        self.measured_on = measured_on
        self.corrections = corrections
        self.num_tokens: int | None = None
        """The batch size that `corrections` are applied for; None if they are not."""
        self.log_factors: FloatArray = np.zeros(len(self.candidates))
        """Natural logarithms `[candidates]` of what the times are multiplied by."""
        self._factors: FloatArray | None = None
        self._by_tokens: dict[int, CostModel] = {}

    @property
    def num_experts(self) -> int:
        return self.shape.num_experts

    @property
    def guessed(self) -> bool:
        """True if times are guessed from other shapes (see `transfer`) or another GPU (see `scaling`)."""
        return IDS in self.stages or self.measured_on is not None

    @property
    def covered(self) -> tuple[str, ...]:
        """Kinds of columns that the times contain."""
        return tuple(s for s in self.stages if s != IDS)

    def corrected(self, corrections: Corrections) -> CostModel:
        """The same model with these corrections."""
        found = copy.copy(self)
        found.corrections, found._by_tokens = corrections, {}
        return found

    def at(self, num_tokens: int) -> CostModel:
        """The model for batches of `num_tokens`, corrected by what was measured; itself without corrections."""
        if self.corrections is None or self.num_tokens is not None:
            return self
        if num_tokens not in self._by_tokens:
            found = self._by_tokens[num_tokens] = copy.copy(self)
            found.num_tokens = num_tokens
            found.log_factors = self.corrections.at([c.name for c in self.candidates], num_tokens)
            found._factors = np.exp(found.log_factors)
        return self._by_tokens[num_tokens]

    def cost(self, histograms: IntArray) -> FloatArray:
        """Predict microseconds `[..., candidates]` for checked histograms int64 `[..., num_experts]`."""
        return self._cost(histograms, self.by_terms(histograms))

    def by_terms(self, histograms: IntArray) -> FloatArray:
        """Predict like `cost`, by the terms alone: no correction, and no floor."""
        counts = self._sums.grids.count(histograms)
        return self._sums.us(counts, self._sums.grids.ctas(counts))

    def choose(self, histogram: IntArray) -> tuple[int, float, bool]:
        """Choose the fastest candidate for one checked histogram int64 `[num_experts]`, the first of equal ones.

        Returns its index, its predicted microseconds, and whether that extrapolates. This is the hot path: it evaluates
        only what decides.
        """
        contending = self._contending
        counts = contending.grids.count(histogram)
        ctas = contending.grids.ctas(counts)
        us = contending.us(counts, ctas)
        if self._correction is not None:
            us *= self._correction.factors(counts if counts[0] else np.ones_like(counts))
        factors = 1.0 if self._factors is None else self._factors[self.contenders]
        best = int((us * factors).argmin())
        lifted = self._lifted(counts, us.min(), us[best]) * np.broadcast_to(factors, us.shape)[best]
        return int(self.contenders[best]), float(lifted[0]), contending.is_outside(best, counts, ctas)

    def predict(self, histograms: IntArray) -> Prediction:
        """Predict like `cost`, and mark the predictions that lie outside the rows that were fitted to."""
        counts = self._sums.grids.count(histograms)
        ctas = self._sums.grids.ctas(counts)
        return Prediction(self._cost(histograms, self._sums.us(counts, ctas)), self._sums.outside(counts, ctas))

    def restrict(self, kernels: Sequence[str]) -> CostModel:
        """Keep the candidates of these kernels only."""
        return self._with([c for c in self.candidates if c.kernel in kernels])

    def without(self, names: Collection[str]) -> CostModel:
        """Drop the candidates of these names. Raises KernelError if none is left."""
        return self._with([c for c in self.candidates if c.name not in names])

    def _with(self, kept: Sequence[Candidate]) -> CostModel:
        if len(kept) == len(self.candidates):
            return self
        found = CostModel(
            self.shape,
            self.hardware,
            self.form,
            kept,
            self.fits,
            self.stages,
            self.measured,
            self.histograms,
            self.residuals,
            self.corrections,
            self.measured_on,
        )
        return found if self.num_tokens is None else found.at(self.num_tokens)

    def _lifted(self, counts: FloatArray, fastest: FloatArray, us: FloatArray) -> FloatArray:
        """Step 10 of `formula` for times `us`, of which the least of each batch, `[..., 1]`, is `fastest`."""
        ids, active = counts[..., :1], counts[..., -1:]
        ratio = np.ones_like(active)
        if self.measured_on is not None:
            ratio = roofline_ratio(self.shape, self.measured_on, self.hardware, ids, active)
        least = active * self._expert_us
        # A residual far from its batches can leave next to nothing, which no factor lifts.
        return np.maximum(us * np.maximum(ratio, least / np.maximum(fastest, 1e-99)), least)

    def _cost(self, histograms: IntArray, us: FloatArray) -> FloatArray:
        """Correct and lift `us`, the times by the terms alone. A candidate that is no contender stays behind the
        fastest contender."""
        counts = self._contending.grids.count(histograms)
        corrected = us
        if self._correction is not None:
            corrected = self._contending.us(counts, self._contending.grids.ctas(counts))
            corrected *= self._correction.factors(np.maximum(counts, 1.0))
        fastest = corrected.min(-1, keepdims=True)
        us, corrected = self._lifted(counts, fastest, us), self._lifted(counts, fastest, corrected)
        if self._factors is not None:
            us, corrected = us * self._factors, corrected * self._factors[self.contenders]
        if self._correction is None:
            return us
        us = np.maximum(us, np.nextafter(corrected.min(-1, keepdims=True), np.inf))
        us[..., self.contenders] = corrected
        return us


def candidates_of(
    sweep: Sweep, configs: Sequence[KernelConfig], notes: list[str] | None = None
) -> tuple[Candidate, ...]:
    """List the configurations of the sweep's kernel that have a column for each of their parts.

    `notes` gains a line if others lack a column, unless the sweep says why it left them out. Raises ProfileError if
    none is left: the plugin's configurations have changed since the sweep was taken.
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
    """Describe in one line which kernel a sweep measured, where and when."""
    record, runs = sweep.record, sweep.record.runs
    days = list(dict.fromkeys(run.measured[:10] for run in runs))
    where = " and ".join(dict.fromkeys(run.device_name for run in runs))
    times = f" ({len(runs)} runs)" if len(runs) > 1 else ""
    return f"{record.kernel} {record.kernel_version} on {where}, {' and '.join(days)}{times}"


def path_times(sweep: Sweep, candidates: Sequence[Candidate], runs: bool = False) -> FloatArray:
    """Measured microseconds `[rows, candidates]`: each candidate's columns summed, NaN if one is missing.

    With `runs`, each run stands by itself, `[runs, rows, candidates]`.
    """
    times = sweep.runs_us if runs else sweep.times_us
    column = sweep.column_of
    picked = [[column[p.key] for p in parts_of(c, sweep.stages)] for c in candidates]
    return np.stack([times[..., p].sum(-1) for p in picked], axis=-1)


def path_bounds(sweep: Sweep, candidates: Sequence[Candidate]) -> BoolArray:
    """Mask `[rows, candidates]` of the `path_times` that are bounds, or contain one."""
    column, bounded = sweep.column_of, sweep.only_bounded
    return np.stack([bounded[:, [column[p.key] for p in parts_of(c, sweep.stages)]].any(1) for c in candidates], 1)


def join(models: Sequence[CostModel]) -> CostModel:
    """Join the candidates of several kernels, for one shape and device, in one model.

    A part that two models share is taken from the first, and the histograms from the first that has some. Raises
    ProfileError if their times cannot be compared.
    """
    first = models[0]
    fits: dict[str, PartFit] = {}
    for model in models:
        alike = ("shape", "hardware", "form", "measured_on", "guessed")
        if any(getattr(model, what) != getattr(first, what) for what in alike):
            raise ProfileError("cost models of different shapes, devices or forms cannot be joined")
        fits = model.fits | fits
    for one, other in itertools.combinations(models, 2):
        if reason := incomparable(one, other):
            raise ProfileError(f"{reason}; choose comparable ones with --kernel")
    candidates = [c for m in models for c in m.candidates]
    stages = [k for k in (*COLUMN_KINDS, IDS) if any(k in m.stages for m in models)]
    measured = [line for m in models for line in m.measured]
    histograms = next((m.histograms for m in models if m.histograms is not None), None)
    residuals = [r for m in models for r in m.residuals]
    of_first = first.shape, first.hardware, first.form
    return CostModel(
        *of_first, candidates, fits, stages, measured, histograms, residuals, measured_on=first.measured_on
    )


class Timed(Protocol):
    """Candidates of one kernel, and the kinds of stages that their times contain."""

    @property
    def candidates(self) -> tuple[Candidate, ...]: ...

    @property
    def stages(self) -> tuple[str, ...]: ...


def left_out(timed: Timed) -> list[str]:
    """Kinds of stages that the candidates run, but their times do not contain."""
    run = {s.kind for c in timed.candidates for s in c.config.stages}
    return [] if PATH in timed.stages else [k for k in STAGE_KINDS if k in run and k not in timed.stages]


def incomparable(a: Timed, b: Timed) -> str | None:
    """Explain why two kernels' times must not be compared; None if they may be.

    Both may leave out preparation (see PREPARATION) and nothing else. Neither may contain what the other leaves out.
    """
    for one, other in ((a, b), (b, a)):
        name = one.candidates[0].kernel
        if missing := [k for k in left_out(one) if k not in PREPARATION]:
            return f"the times of {name} leave out {', '.join(missing)}"
        if uneven := [k for k in left_out(one) if k in other.stages or PATH in other.stages]:
            return f"the times of {name} leave out {', '.join(uneven)}, those of {other.candidates[0].kernel} do not"
    return None
