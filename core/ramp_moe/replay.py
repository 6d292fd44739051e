"""Recorded sweeps of one shape on one device, brought together so that several kernels can be judged on one set of
batches, and the cost model fitted on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .cost_model import (
    DEFAULT_FORM,
    Candidate,
    CostModel,
    candidates_of,
    incomparable,
    join,
    left_out,
    path_bounds,
    path_times,
)
from .errors import KernelError, ProfileError, RampMoEError
from .evaluation import IndexArray
from .fit_file import FitRecord, digest, model_from_fit
from .fitting import fit_sweep
from .hardware import Hardware
from .kernel import Kernel, KernelConfig, usable_configs, why_unsupported
from .plugins import Registry
from .routing import FloatArray, IntArray
from .shapes import MoEShape
from .store import ProfileStore
from .sweep import COLUMN_KINDS, PATH, SPOILT, Split, Sweep
from .transfer import transfer


@dataclass(frozen=True)
class Recording:
    """One kernel's sweep, where it lies, and its candidates in the kernel's own order."""

    path: Path
    sweep: Sweep
    candidates: tuple[Candidate, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        return self.sweep.stages


@dataclass(frozen=True)
class Replay:
    """Measured times of every candidate on the batches that all recordings share.

    `times_us` is float64 `[batches, candidates]` without gaps; `bounded` marks those of them that are bounds; `runs_us`
    `[runs, batches, candidates]` has them run by run, NaN where a batch has fewer runs. `notes` says what was left out
    and why.
    """

    shape: MoEShape
    hardware: Hardware
    recordings: tuple[Recording, ...]
    histograms: IntArray
    labels: list[tuple[int, str]]
    times_us: FloatArray
    runs_us: FloatArray
    bounded: NDArray[np.bool_]
    notes: list[str] = field(default_factory=list)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return tuple(c for r in self.recordings for c in r.candidates)

    @property
    def kernels(self) -> list[str]:
        return [r.sweep.kernel for r in self.recordings]

    @property
    def stages(self) -> tuple[str, ...]:
        """Kinds of stages that the times contain."""
        return tuple(k for k in COLUMN_KINDS if any(k in r.stages for r in self.recordings))

    @property
    def stages_left_out(self) -> dict[str, list[str]]:
        """By kernel, the kinds of stages that its paths run and its times do not contain."""
        return {r.sweep.kernel: left_out(r) for r in self.recordings}

    def of(self, split: Split) -> Replay | None:
        """The batches to fit on ("tune") or those kept for judging ("test"); None where there is none."""
        rows = self.recordings[0].sweep.rows_of(split)
        if not rows:
            return None
        return replace(
            self,
            recordings=tuple(replace(r, sweep=r.sweep.select(rows)) for r in self.recordings),
            histograms=self.histograms[rows],
            labels=[self.labels[i] for i in rows],
            times_us=self.times_us[rows],
            runs_us=_measured_first(self.runs_us[:, rows]),
            bounded=self.bounded[rows],
        )

    def repeated(self) -> tuple[IndexArray, FloatArray]:
        """The batches that were measured twice, and their times in the first two runs, `[2, rows, candidates]`:
        infinite for a candidate that either did not time, or that one of them spoilt (see `Sweep.times_us`)."""
        rows = np.flatnonzero(np.isfinite(self.runs_us[:2]).any(axis=2).sum(0) == 2)
        pair = self.runs_us[:2, rows]
        both = np.isfinite(pair).all(0) & (pair.max(0) <= SPOILT * pair.min(0))
        seen = both.any(1)
        return rows[seen], np.where(both, pair, np.inf)[:, seen]

    def fit(self, rows: IndexArray | None = None, form: str = DEFAULT_FORM) -> CostModel:
        """A cost model over all candidates, in their order, fitted on these rows (all where None)."""
        return join(
            [
                fit_sweep(r.sweep if rows is None else r.sweep.select(rows.tolist()), r.candidates, self.hardware, form)
                for r in self.recordings
            ]
        )


def load_replay(
    registry: Registry,
    store: ProfileStore,
    shape: MoEShape,
    hardware: Hardware,
    kernels: Sequence[str] = (),
    stages: Sequence[str] = (),
) -> Replay:
    """Bring together the recorded sweeps of `kernels`, whole paths where they were measured, or the times of these
    kinds of stages alone. Where no kernel is named: those of the library's own kernels that have one, so that no plugin
    changes what they show, or else those of the plugins' kernels.

    Kernels that were asked for must have a sweep and share batches; of the others, those that cannot be compared with
    the kernel of the most batches, or have no sweep, are left out with a note. Raises UnknownNameError, KernelError or
    ProfileError.
    """
    notes: list[str] = []
    names = list(dict.fromkeys(kernels) or registry.kernels)
    chosen = {name: registry.kernel(name) for name in names}
    store.check(names, shape, hardware)
    found: list[Recording] = []
    for name in names if kernels else _own_first(registry, names):
        if not kernels and found and name in registry.third_party:
            continue
        with _left_out(name, bool(kernels), notes):
            recorded = store.find(name, shape, hardware)
            if recorded is None and kernels:
                raise nothing_recorded(registry, store, [name], shape, hardware)
            if recorded is not None:
                path, sweep = recorded
                configs = usable_configs(chosen[name], shape, hardware)
                found.append(_recording(path, view(sweep, stages), configs, notes))
    if not found:
        raise ProfileError("; ".join(notes)) if notes else nothing_recorded(registry, store, names, shape, hardware)
    if not kernels:
        notes += without_profile(registry, store, shape, hardware).values()
    found.sort(key=lambda r: -len(r.sweep.labels))
    return _align(shape, hardware, found, bool(kernels), notes)


def nothing_recorded(
    registry: Registry, store: ProfileStore, kernels: Sequence[str], shape: MoEShape, hardware: Hardware
) -> RampMoEError:
    """The error for kernels of which there is no sweep, two lines: KernelError if none of them computes the shape,
    NoProfileError for those that do."""
    by_reason: dict[str, list[str]] = {}
    able = []
    for name in kernels:
        try:
            reason = why_unsupported(registry.kernel(name), shape, hardware)
        except RampMoEError as e:
            reason = str(e)
        if reason is None:
            able.append(name)
        else:
            by_reason.setdefault(reason, []).append(name)
    reasons = "; ".join(f"{reason} ({', '.join(names)})" for reason, names in by_reason.items())
    if able or not kernels:
        aside = f"; other kernels do not compute it: {reasons}" if reasons else ""
        return store.missing(able, shape, hardware, aside)
    subject = f"kernel {kernels[0]} does not compute" if len(kernels) == 1 else "no kernel computes"
    return KernelError(
        f"{subject} {shape.label} ({shape.slug}) on {hardware.name}: {reasons}",
        remedy="name another --model, --dtype or --device; `ramp-moe kernels` lists them, and plugins add others",
    )


def _own_first(registry: Registry, names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: name in registry.third_party)


def of_plugins(registry: Registry, store: ProfileStore, shape: MoEShape, hardware: Hardware) -> list[str]:
    """Names of the plugins' kernels that have a sweep for this shape and device."""
    return [n for n in sorted(registry.third_party) if store.find(n, shape, hardware) is not None]


def without_profile(registry: Registry, store: ProfileStore, shape: MoEShape, hardware: Hardware) -> dict[str, str]:
    """A line for each registered kernel that no command can judge: it has no sweep for this shape and device."""
    notes = {}
    for name, kernel in registry.kernels.items():
        if store.find(name, shape, hardware) is None:
            try:
                reason = why_unsupported(kernel, shape, hardware)
            except RampMoEError as e:
                reason = str(e)
            notes[name] = f"{name} left out: {reason or _no_profile(kernel, shape, hardware)}"
    return notes


def _no_profile(kernel: Kernel, shape: MoEShape, hardware: Hardware) -> str:
    from .device import LaunchableKernel  # which needs this module

    if isinstance(kernel, LaunchableKernel):
        flags = f"--model {shape.label} --dtype {shape.dtype} --kernel {kernel.name}"
        remedy = f"measure one with `ramp-moe profile {flags}`"
    else:
        remedy = "name a sweep with --profile, since there is nothing to launch"
    return f"no profile for {shape.title} on {hardware.name}; {remedy}"


def view(sweep: Sweep, stages: Sequence[str] = ()) -> Sweep:
    """The columns of these kinds, with the batches on which they were timed; where none is named, the whole paths, or
    all stages of a sweep that has no paths. Raises ProfileError where a named kind was not measured."""
    found = sweep.only(stages or [PATH]) if stages or PATH in sweep.stages else sweep
    timed = np.isfinite(found.runs_us).any(axis=(0, 2))
    if not timed.any():
        what = ", ".join(found.stages)
        raise ProfileError(f"the sweep of {sweep.kernel} for {sweep.shape.title} has no time of {what}; measure again")
    return found if timed.all() else found.select(np.flatnonzero(timed).tolist())


@contextmanager
def _left_out(name: str, asked_for: bool, notes: list[str]) -> Iterator[None]:
    """A kernel that was not asked for and cannot take part is left out with a note."""
    try:
        yield
    except RampMoEError as e:
        if asked_for:
            raise
        notes.append(f"{name} left out: {e}")


def _recording(path: Path, sweep: Sweep, configs: Sequence[KernelConfig], notes: list[str]) -> Recording:
    candidates = candidates_of(sweep, configs, notes)
    complete = np.atleast_1d(np.isfinite(path_times(sweep, candidates)).all(axis=0))
    if not complete.all():
        notes.append(f"{sweep.kernel}: {int((~complete).sum())} configurations left out, not measured on every batch")
    if not complete.any():
        raise ProfileError(f"{path}: no configuration was measured on every batch")
    return Recording(path, sweep, tuple(c for c, ok in zip(candidates, complete, strict=True) if ok))


def _align(shape: MoEShape, hardware: Hardware, found: Sequence[Recording], strict: bool, notes: list[str]) -> Replay:
    """Keep the batches that all recordings share, in the order of the first."""
    kept = [found[0]]
    rows = _rows(found[0].sweep)
    for recording in found[1:]:
        sweep = recording.sweep
        shared = rows.keys() & _rows(sweep).keys()
        problem = next((reason for k in kept if (reason := incomparable(k, recording))), None)
        if problem is None and len(shared) < 2:
            problem = f"it was measured on other batches than {found[0].sweep.kernel}"
        if problem is None:
            kept.append(recording)
            rows = {key: i for key, i in rows.items() if key in shared}
        elif strict:
            raise ProfileError(f"{sweep.kernel} cannot be compared: {problem}; choose others with --kernel")
        else:
            notes.append(f"{sweep.kernel} left out: {problem}")
    if len(rows) < len(found[0].sweep.labels):
        notes.append(f"{len(rows)} of {len(found[0].sweep.labels)} batches were measured for every kernel")
    aligned = []
    for recording in kept:
        index = _rows(recording.sweep)
        aligned.append(
            Recording(recording.path, recording.sweep.select([index[k] for k in rows]), recording.candidates)
        )
    first = aligned[0].sweep
    times = np.concatenate([path_times(r.sweep, r.candidates) for r in aligned], axis=1)
    runs = [_measured_first(path_times(r.sweep, r.candidates, runs=True)) for r in aligned]
    common = min(len(r) for r in runs)
    runs_us = np.concatenate([r[:common] for r in runs], axis=2)
    bounded = np.concatenate([path_bounds(r.sweep, r.candidates) for r in aligned], axis=1)
    return Replay(shape, hardware, tuple(aligned), first.histograms, first.labels, times, runs_us, bounded, notes)


def _measured_first(runs_us: FloatArray) -> FloatArray:
    """`[runs, rows, candidates]` with each row's runs moved up, so that those that did not measure it come last:
    kernels may have been profiled in different runs. Runs that are then empty are left out."""
    measured = np.isfinite(runs_us).any(axis=2)
    order = np.argsort(~measured, axis=0, kind="stable")
    return np.take_along_axis(runs_us, order[..., None], axis=0)[: measured.sum(0).max()]


def _rows(sweep: Sweep) -> dict[tuple[int, bytes, int], int]:
    """Row index by batch: its tokens, its histogram, and how often the two stood in the sweep before."""
    seen: Counter[tuple[int, bytes]] = Counter()
    rows = {}
    for i, (row, histogram) in enumerate(zip(sweep.record.rows, sweep.histograms, strict=True)):
        key = row.num_tokens, histogram.tobytes()
        rows[*key, seen[key]] = i
        seen[key] += 1
    return rows


def load_model(
    registry: Registry,
    store: ProfileStore,
    shape: MoEShape,
    hardware: Hardware,
    kernels: Sequence[str] = (),
    form: str = DEFAULT_FORM,
) -> tuple[CostModel, list[str]]:
    """The cost model to dispatch with, and notes on what was left out: each kernel's stored fit where there is one of
    this form that is not older than its sweep, else a fit of its sweep. Kernels as in `load_replay`, but that plugins'
    kernels take part where they can be compared with the others.

    Where none of them, or of the library's own, has a profile of this shape, profiles of other shapes are made to do,
    see `transfer`."""
    notes: list[str] = []
    unknown: list[str] = []
    names = list(dict.fromkeys(kernels) or _own_first(registry, registry.kernels))
    chosen = {name: registry.kernel(name) for name in names}
    store.check(names, shape, hardware)
    models: list[CostModel] = []
    for name, kernel in chosen.items():
        with _left_out(name, bool(kernels), notes):
            recorded, fitted = store.find(name, shape, hardware), store.find_fit(name, shape, hardware)
            if recorded is None and fitted is None:
                unknown.append(name)
                continue
            configs = usable_configs(kernel, shape, hardware)
            sweep = None if recorded is None else recorded[1]
            models.append(_dispatchable(sweep, fitted, configs, shape, hardware, form, notes))
    needed = names if kernels else [n for n in names if n not in registry.third_party] or names
    if set(needed) <= set(unknown):
        models = _transferred(registry, store, shape, hardware, unknown, notes) + models
    elif kernels and unknown:
        raise nothing_recorded(registry, store, unknown, shape, hardware)
    if not models:
        raise ProfileError("; ".join(notes)) if notes else nothing_recorded(registry, store, names, shape, hardware)
    if not kernels:
        models = _comparable(registry, models, notes)
        known = {c.kernel for m in models for c in m.candidates}
        missing = without_profile(registry, store, shape, hardware)
        notes += [missing[name] for name in unknown if name not in known]
    return join(models), notes


def _dispatchable(
    sweep: Sweep | None,
    fitted: FitRecord | None,
    configs: Sequence[KernelConfig],
    shape: MoEShape,
    hardware: Hardware,
    form: str,
    notes: list[str],
) -> CostModel:
    """One kernel's model, by its stored fit where that is of any use, else by its sweep."""
    if fitted is not None and fitted.form == form and (sweep is None or fitted.sweep == digest(sweep)):
        histograms = None if sweep is None else fitted_on(sweep).histograms
        try:
            return model_from_fit(fitted, shape, hardware, configs, histograms)
        except ProfileError as e:
            if sweep is None:
                raise
            notes.append(f"{e}; its sweep is fitted anew")
    if sweep is None:
        raise ProfileError(f"its fit is of another form than {form}, and its sweep is not here")
    return fit_recorded(sweep, configs, hardware, form, notes)


def _transferred(
    registry: Registry,
    store: ProfileStore,
    shape: MoEShape,
    hardware: Hardware,
    kernels: Sequence[str],
    notes: list[str],
) -> list[CostModel]:
    """Of each kernel that runs here and has whole paths of other shapes."""
    models = []
    for name in kernels:
        kernel = registry.kernel(name)
        sweeps = store.of_other_shapes(name, shape, hardware)
        if sweeps:
            with suppress(ProfileError, KernelError):
                models.append(transfer(sweeps, partial(usable_configs, kernel, hardware=hardware), shape, hardware))
    if models:
        notes.append(
            f"{shape.title} has no profile on {hardware.name}: what is chosen is guessed from other shapes; measure it "
            f"with `ramp-moe profile --model {shape.label} --dtype {shape.dtype}`"
        )
    return models


def fit_recorded(
    sweep: Sweep,
    configs: Sequence[KernelConfig],
    hardware: Hardware,
    form: str = DEFAULT_FORM,
    notes: list[str] | None = None,
) -> CostModel:
    """A fit of what there is to dispatch by."""
    seen = fitted_on(sweep)
    return fit_sweep(seen, candidates_of(seen, configs, notes), hardware, form)


def fitted_on(sweep: Sweep) -> Sweep:
    """What `fit_recorded` fits to: the sweep's `view`, its batches to fit on."""
    seen = view(sweep)
    tune = seen.rows_of("tune")
    if not tune:
        raise ProfileError(f"the sweep of {sweep.kernel} has no batches to fit on, only ones kept for judging")
    return seen.select(tune)


def _comparable(registry: Registry, models: Sequence[CostModel], notes: list[str]) -> list[CostModel]:
    """Unasked, the models that can be compared with the library's own of the most candidates, and with each other."""
    kept: list[CostModel] = []

    def order(model: CostModel) -> tuple[bool, int]:
        return model.candidates[0].kernel in registry.third_party, -len(model.candidates)

    for model in sorted(models, key=order):
        name = model.candidates[0].kernel
        if kept and model.form != kept[0].form:
            notes.append(f"{name} left out: the others are guessed from other shapes; name it with --kernel")
        elif reason := next((r for k in kept if (r := incomparable(k, model))), None):
            notes.append(f"{name} left out: {reason}")
        else:
            kept.append(model)
    return kept
