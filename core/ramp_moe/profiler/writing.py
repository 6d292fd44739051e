"""What a run's measurements become: one sweep file a kernel, at DEVICE/KERNEL/SHAPE.json in the folder of profiles.

If a sweep of the kernel's present version is there, with times of whole paths, the run becomes another run of it:

- Its candidates are those of the file's "path" columns. Nothing is pruned, and what fails is null in this run.
- Its batches are those of the file, in the file's order, then the plan's others. A row without a seed, or whose seed
  draws another histogram today, cannot be measured again.
- The file then has the union of rows and columns, with null for what a run did not measure.

A sweep of another version of the kernel, or without times of whole paths, makes way for a new one. It is kept as
superseded/DEVICE/KERNEL/SHAPE.DATE.json, where no look-up finds it.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from ..dispatch.profile_store import relative_path
from ..errors import ProfileError, RampMoEError
from ..measurements.json_file import write_atomically
from ..measurements.sweep import (
    FORMAT,
    PATH,
    VERSION,
    Column,
    LeftOut,
    MeasuredBatch,
    Run,
    Sweep,
    SweepRecord,
    load_sweep,
    make_sweep,
    path_key,
)
from ..spec.hardware import Hardware
from ..spec.kernel import KernelConfig
from ..spec.routing import IntArray
from ..spec.shapes import MoEShape
from .journal import Header, Taken
from .plan import PlannedBatch

SUPERSEDED = "superseded"

BOUND = 3.0
"""A candidate that was not timed, since it is too far behind (see `pruning`), is recorded with a bound: this factor of
its kernel's best."""


@dataclass(frozen=True)
class Place:
    """The place of a kernel's profile, and what is there.

    `base` is the same sweep if the run extends it, else None. `written` says that the run is in it already.
    """

    path: Path
    there: Sweep | None
    base: Sweep | None
    written: bool


@dataclass(frozen=True)
class Profile:
    """A kernel's profile as a run made it.

    `path` is None if no configuration was left to write. `run` counts from 1. `failed` and `pruned` name
    configurations, the former by reason.
    """

    kernel: str
    path: Path | None
    run: int
    batches: int
    configs: int
    failed: dict[str, list[str]] = field(default_factory=dict)
    pruned: list[str] = field(default_factory=list)
    superseded: Path | None = None


def find_place(
    folder: Path,
    kernel: str,
    version: str,
    configs: Sequence[KernelConfig],
    shape: MoEShape,
    hardware: Hardware,
    run: Run | None,
) -> Place:
    """Find what exists at the profile's place.

    Raises ProfileError for a file that is corrupt, from a newer version, or of something else than its place says.
    """
    path = folder / relative_path(kernel, shape, hardware)
    if not path.exists():
        return Place(path, None, None, False)
    there = load_sweep(path)
    if (there.kernel, there.shape, there.device) != (kernel, shape, hardware.name):
        raise ProfileError(
            f"{path} is for {there.kernel}, {there.shape.slug}, {there.device}, not what its place says; move it"
        )
    keys = {path_key(kernel, c.name) for c in configs}
    same = there.record.kernel_version == version and any(c.key in keys for c in there.record.columns)
    written = (
        same and run is not None and any((r.measured, r.gpu) == (run.measured, run.gpu) for r in there.record.runs)
    )
    return Place(path, there, there if same else None, written)


def measured_configs(base: Sweep, configs: Sequence[KernelConfig]) -> list[str]:
    """Names of the configurations that have a "path" column."""
    return [c.name for c in configs if path_key(base.kernel, c.name) in base.column_of]


def all_batches(bases: Sequence[Sweep], planned: Sequence[PlannedBatch]) -> list[PlannedBatch]:
    """List the batches of recorded sweeps that can be drawn again, in their order, then the plan's others."""
    given = {(b.num_tokens, b.routing, b.seed): b for b in planned}
    found: dict[tuple[int, str, int], PlannedBatch] = {}
    for base in bases:
        for row in base.record.batches:
            if row.seed is None:
                continue
            key = row.num_tokens, row.routing, row.seed
            batch = given.get(key) or PlannedBatch(*key, row.split)
            if key not in found and _drawn(batch, base.shape) == row.histogram:
                found[key] = batch
    return list((found | {key: b for key, b in given.items() if key not in found}).values())


def _drawn(batch: PlannedBatch, shape: MoEShape) -> list[int] | None:
    """Draw the batch's histogram; None for a routing that this library does not know."""
    try:
        return [int(count) for count in batch.histogram(shape)]
    except RampMoEError:
        return None


def write_profile(
    folder: Path,
    place: Place,
    header: Header,
    kernel: str,
    configs: Mapping[str, KernelConfig],
    taken: Taken,
    batches: Mapping[int, tuple[PlannedBatch, IntArray]],
) -> Profile:
    """Write one kernel's sweep, atomically.

    `configs` are its candidates by name, `batches` the complete rows with their histograms. Raises ProfileError if it
    cannot be written.
    """
    pruned, failed, reasons = [], dict[str, list[str]](), dict[str, list[str]]()
    for name in configs:
        if drop := taken.dropped.get(f"{kernel}/{name}"):
            reasons.setdefault(drop.reason, []).append(name)
            if drop.pruned:
                pruned.append(name)
            else:
                failed.setdefault(drop.reason, []).append(name)
    kept = {n: c for n, c in configs.items() if f"{kernel}/{n}" not in taken.dropped}
    runs = place.base.record.runs if place.base else []
    number = len(runs) if place.written else len(runs) + 1
    if not kept:
        return Profile(kernel, None, number, 0, 0, failed, pruned)
    superseded = None
    if not place.written:
        notes = [f"no times of {', '.join(names)}: {why}" for why, names in failed.items()] if place.base else []
        run = msgspec.structs.replace(header.run, seconds=round(taken.spent), notes=[*taken.notes, *notes])
        columns, times = _times(kernel, kept, taken, batches)
        rows = [
            MeasuredBatch(b.num_tokens, b.routing, h.tolist(), [times[i]], b.seed, b.split)
            for i, (b, h) in batches.items()
        ]
        if place.base is not None:
            record = _merged(place.base.record, run, columns, rows)
        else:
            record = SweepRecord(
                FORMAT,
                VERSION,
                header.device,
                kernel,
                header.kernels[kernel].version,
                header.shape,
                [run],
                columns,
                [LeftOut(why, names) for why, names in reasons.items()],
                rows,
            )
        sweep = make_sweep(record, str(place.path))
        if place.there is not None and place.base is None:
            superseded = _supersede(folder, place.path)
        sweep.save(place.path)
    return Profile(kernel, place.path, number, len(batches), len(kept), failed, pruned, superseded)


BatchKey = tuple[int, str, int | None, tuple[int, ...]]


def _key(row: MeasuredBatch) -> BatchKey:
    return row.num_tokens, row.routing, row.seed, tuple(row.histogram)


Times = list[float | None]


def _times(
    kernel: str, kept: Mapping[str, KernelConfig], taken: Taken, rows: Mapping[int, object]
) -> tuple[list[Column], dict[int, Times]]:
    """Collect the columns of these configurations, and their times by row: medians over all launches.

    What was not timed, since it is far behind, has a bound.
    """
    columns = [Column(PATH, path_key(kernel, n), dict(c.params)) for n, c in kept.items()]
    timed = {key for row in rows for key in taken.stages.get(row, {})}
    stages = {s.key: Column(s.kind, s.key) for c in kept.values() for s in c.stages if s.key in timed}

    def of_row(row: int) -> Times:
        visits, of_stages = taken.visits.get(row, {}), taken.stages.get(row, {})
        paths = [[us for visit in visits.get(f"{kernel}/{name}", []) for us in visit] for name in kept]
        medians = [_median(us) for us in (*paths, *(of_stages.get(key, []) for key in stages))]
        best = min((t for t in medians[: len(kept)] if t), default=None)
        for i, name in enumerate(kept):
            if best and f"{kernel}/{name}" in taken.bounded.get(row, ()):
                medians[i] = -round(BOUND * best, 3)
        return medians

    return [*columns, *stages.values()], {row: of_row(row) for row in rows}


def _median(us: Sequence[float]) -> float | None:
    return round(float(np.median(us)), 3) if us else None


def _merged(base: SweepRecord, run: Run, columns: Sequence[Column], measured: Sequence[MeasuredBatch]) -> SweepRecord:
    """Extend `base` by another run, which has these columns and rows."""
    union = {c.key: c for c in (*base.columns, *columns)}
    index = {c.key: i for i, c in enumerate(columns)}
    added: Times = [None] * (len(union) - len(base.columns))
    new: dict[BatchKey, Times | None] = {
        _key(row): us and [us[index[key]] if key in index else None for key in union]
        for row in measured
        for us in row.runs_us
    }
    rows = [
        msgspec.structs.replace(r, runs_us=[*(us and [*us, *added] for us in r.runs_us), new.get(_key(r))])
        for r in base.batches
    ]
    known = {_key(r) for r in base.batches}
    absent: list[Times | None] = [None] * len(base.runs)
    rows += [msgspec.structs.replace(r, runs_us=[*absent, new[_key(r)]]) for r in measured if _key(r) not in known]
    return msgspec.structs.replace(base, runs=[*base.runs, run], columns=list(union.values()), batches=rows)


def _supersede(folder: Path, path: Path) -> Path:
    """Keep a copy of the file out of the way of look-ups. The original stays until it is replaced."""
    data = _read(path)
    parent = (folder / SUPERSEDED / path.relative_to(folder)).parent
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    for i in itertools.count(1):
        copy = parent / f"{path.stem}.{date}{f'.{i}' if i > 1 else ''}.json"
        if not copy.exists():
            write_atomically(copy, data)
            return copy
        if _read(copy) == data:  # kept by a run that could not write the new one
            return copy
    raise AssertionError


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ProfileError(f"cannot read {path}: {e.strerror or e}") from None
