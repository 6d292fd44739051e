"""Recorded sweeps of one shape on one device, aligned so that several kernels are judged on one set of batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..cost_model.fitting import fit_sweep
from ..cost_model.model import (
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
from ..dispatch.load_model import _left_out, _own_first, nothing_recorded, view, without_profile
from ..dispatch.profile_store import ProfileStore
from ..errors import ProfileError
from ..measurements.sweep import COLUMN_KINDS, SPOILT, Split, Sweep
from ..registry.registry import Registry
from ..spec.hardware import Hardware
from ..spec.kernel import KernelConfig, usable_configs
from ..spec.routing import FloatArray, IntArray
from ..spec.shapes import MoEShape
from .regret import IndexArray


@dataclass(frozen=True)
class KernelReplay:
    """One kernel's sweep, its path, and its candidates in the kernel's own order."""

    path: Path
    sweep: Sweep
    candidates: tuple[Candidate, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        return self.sweep.stages


@dataclass(frozen=True)
class Replay:
    """Measured times of every candidate on the batches that all recordings share.

    `times_us` is float64 `[batches, candidates]` without gaps. `bounded` marks those of them that are bounds. `runs_us
    [runs, batches, candidates]` holds single runs, NaN if a batch has fewer runs. `notes` says what was left out and
    why.
    """

    shape: MoEShape
    hardware: Hardware
    recordings: tuple[KernelReplay, ...]
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
        """Kinds of stages that a kernel's paths run and its times do not contain, by kernel."""
        return {r.sweep.kernel: left_out(r) for r in self.recordings}

    def of(self, split: Split) -> Replay | None:
        """Select the batches to fit on ("tune") or those kept for judging ("test"). None if there is none."""
        rows = self.recordings[0].sweep.batches_of(split)
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
        """Select the batches that were measured twice, with their times in the first two runs, `[2, rows, candidates]`.

        A time is infinite if either run did not measure the candidate, or if one of them spoilt it (see
        `Sweep.times_us`).
        """
        rows = np.flatnonzero(np.isfinite(self.runs_us[:2]).any(axis=2).sum(0) == 2)
        pair = self.runs_us[:2, rows]
        both = np.isfinite(pair).all(0) & (pair.max(0) <= SPOILT * pair.min(0))
        seen = both.any(1)
        return rows[seen], np.where(both, pair, np.inf)[:, seen]

    def fit(self, rows: IndexArray | None = None, form: str = DEFAULT_FORM) -> CostModel:
        """Fit a cost model over all candidates, in their order, on these rows (all if None)."""
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
    """Bring together the recorded sweeps of `kernels`.

    Their whole paths count if they were measured, or the times of the kinds in `stages` alone. If no kernel is named,
    the library's own kernels that have a sweep are taken, so that no plugin changes what they show. If they have none,
    the plugins' kernels are taken.

    Named kernels must have a sweep and share batches. Others are left out with a note if they have no sweep, or cannot
    be compared with the kernel of the most batches. Raises UnknownNameError, KernelError or ProfileError.
    """
    notes: list[str] = []
    names = list(dict.fromkeys(kernels) or registry.kernels)
    chosen = {name: registry.kernel(name) for name in names}
    store.check(names, shape, hardware)
    found: list[KernelReplay] = []
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


def of_plugins(registry: Registry, store: ProfileStore, shape: MoEShape, hardware: Hardware) -> list[str]:
    """Names of the plugins' kernels that have a sweep for this shape and device."""
    return [n for n in sorted(registry.third_party) if store.find(n, shape, hardware) is not None]


def _recording(path: Path, sweep: Sweep, configs: Sequence[KernelConfig], notes: list[str]) -> KernelReplay:
    candidates = candidates_of(sweep, configs, notes)
    complete = np.atleast_1d(np.isfinite(path_times(sweep, candidates)).all(axis=0))
    if not complete.all():
        notes.append(f"{sweep.kernel}: {int((~complete).sum())} configurations left out, not measured on every batch")
    if not complete.any():
        raise ProfileError(f"{path}: no configuration was measured on every batch")
    return KernelReplay(path, sweep, tuple(c for c, ok in zip(candidates, complete, strict=True) if ok))


def _align(
    shape: MoEShape, hardware: Hardware, found: Sequence[KernelReplay], strict: bool, notes: list[str]
) -> Replay:
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
            KernelReplay(recording.path, recording.sweep.select([index[k] for k in rows]), recording.candidates)
        )
    first = aligned[0].sweep
    times = np.concatenate([path_times(r.sweep, r.candidates) for r in aligned], axis=1)
    runs = [_measured_first(path_times(r.sweep, r.candidates, runs=True)) for r in aligned]
    common = min(len(r) for r in runs)
    runs_us = np.concatenate([r[:common] for r in runs], axis=2)
    bounded = np.concatenate([path_bounds(r.sweep, r.candidates) for r in aligned], axis=1)
    return Replay(shape, hardware, tuple(aligned), first.histograms, first.labels, times, runs_us, bounded, notes)


def _measured_first(runs_us: FloatArray) -> FloatArray:
    """Move up the runs of each row in `[runs, rows, candidates]`, so that those that did not measure it come last.

    Kernels may have been profiled in different runs. Runs that are then empty are left out.
    """
    measured = np.isfinite(runs_us).any(axis=2)
    order = np.argsort(~measured, axis=0, kind="stable")
    return np.take_along_axis(runs_us, order[..., None], axis=0)[: measured.sum(0).max()]


def _rows(sweep: Sweep) -> dict[tuple[int, bytes, int], int]:
    """Index the rows by batch: its tokens, its histogram, and how often the two occurred in the sweep before."""
    seen: Counter[tuple[int, bytes]] = Counter()
    rows = {}
    for i, (row, histogram) in enumerate(zip(sweep.record.batches, sweep.histograms, strict=True)):
        key = row.num_tokens, histogram.tobytes()
        rows[*key, seen[key]] = i
        seen[key] += 1
    return rows
