"""`ramp-moe check`: a few cells of the recorded profiles are measured again here, to tell whether the profiles still
hold.

All times may change by one factor (another clock), which changes no choice. They may change by different factors
(another driver, a rebuilt kernel), which does. The profile's own runs say how far a cell may be off without a cause:
the 95th percentile of their differences is the tolerance of every figure here.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ..cost_model.model import Candidate
from ..dispatch.profile_store import ProfileStore, relative_path, user_data_dir
from ..errors import KernelError, ProfileError
from ..evaluation.repeatability import Spread, spread
from ..evaluation.replay import Replay, load_replay
from ..measurements.sweep import PATH
from ..registry.registry import Registry
from ..spec.hardware import Hardware
from ..spec.kernel import known_version
from ..spec.shapes import MoEShape
from .journal import Stopped
from .plan import TEST_SIZES, TUNE_SIZES, PlannedBatch
from .pool import Measurer
from .settings import Environment, MakeBench, Progress, Settings
from .worker import Died, Failed
from .writing import all_batches

BATCHES = 6
"""Batches to measure again, evenly spread over the recorded ones by their fastest time."""

CELLS = 3
"""Fewest configurations on each batch, if it has enough: dispatch's choice and close rivals."""

MAX_TOKENS = max(*TUNE_SIZES, *TEST_SIZES)
"""Most tokens of a batch to measure again."""

UNREPEATED = 0.045
"""Tolerance for a profile of one run, which cannot tell how well it repeats. It is the 95th percentile of the shipped
H200 profile that repeats least."""

Verdict = Literal["holds", "shifted", "does not hold"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration on one batch, in microseconds.

    chosen: dispatch would launch it. measured_us: None if it failed; `failed` then says how.
    """

    tokens: int
    routing: str
    kernel: str
    config: str
    chosen: bool
    recorded_us: float
    measured_us: float | None
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """Something that influences the times, and differs here from every run of the profile."""

    what: str
    recorded: str
    now: str


@dataclass(frozen=True, slots=True)
class Drift:
    """What `check_profiles` found. All figures but times and counts are fractions.

    verdict: "holds"; "shifted" if all times changed by one factor, so that the choices still hold; "does not hold" for
    the `reasons`, with the commands that mend it as `remedy`.

    offset: median of measured / recorded - 1. spread: mean deviation besides the offset. loss: mean of what dispatch's
    choices lose against their rivals here, less what they lost when recorded. tolerance: how large any of the three may
    be by the noise of measuring alone. still_best of `batches`: on how many the fastest recorded cell is still the
    fastest.
    """

    model: str
    dtype: str
    device: str
    kernels: tuple[str, ...]
    verdict: Verdict
    reasons: tuple[str, ...]
    remedy: tuple[str, ...]
    offset: float
    spread: float
    loss: float
    tolerance: float
    still_best: int
    batches: int
    cells: tuple[Cell, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_profiles(
    registry: Registry,
    store: ProfileStore,
    shape: MoEShape,
    hardware: Hardware,
    kernels: Sequence[str],
    environment: Environment,
    make_bench: MakeBench,
    progress: Progress,
) -> Drift:
    """Measure about a dozen cells of these kernels' profiles again, as the profiles did, and compare.

    This takes seconds, most of which start the process that measures; `make_bench` makes its bench there. Nothing is
    kept.

    Raises ProfileError if a kernel has no profile of whole paths, none of its batches can be drawn again, or the GPU
    cannot be measured on. Raises KernelError if every cell fails.
    """
    began = time.monotonic()
    recorded = load_replay(registry, store, shape, hardware, kernels)
    if recorded.stages != (PATH,):
        raise ProfileError(
            f"the recorded times of {', '.join(recorded.kernels)} are of {', '.join(recorded.stages)}, not of whole "
            "paths; run `ramp-moe profile` first"
        )
    rows = _rows(recorded)
    chosen = _choices(recorded, list(rows))
    measurer = Measurer(make_bench, Settings.call_s)
    cells: list[list[Cell]] = []
    progress.phase("measure", len(rows))
    try:
        for (row, batch), choice in zip(rows.items(), chosen, strict=True):
            progress.at(len(cells), f"{batch.num_tokens} tokens, {batch.routing}", time.monotonic() - began)
            measurer.open(batch.topk_ids(shape))
            columns = _columns(recorded, row, choice)
            times = _measure(measurer, [recorded.candidates[i] for i in columns])
            cells.append([_cell(recorded, row, i, i == choice, t) for i, t in zip(columns, times, strict=True)])
    except Stopped as e:  # whose remedy is about a journal, of which there is none
        raise ProfileError(f"{e.what}; nothing is kept of a check") from None
    finally:
        measurer.close()
    return _judge(registry, recorded, cells, environment, time.monotonic() - began)


def _rows(recorded: Replay) -> dict[int, PlannedBatch]:
    """Choose the batches to measure again, by row, the shortest first."""
    recording = recorded.recordings[0]
    rows = recording.sweep.record.batches
    by_time = np.argsort(recorded.times_us.min(1), kind="stable").tolist()
    seeded = [i for i in by_time if rows[i].seed is not None and rows[i].num_tokens <= MAX_TOKENS]
    spread_out = np.unique(np.linspace(0, len(seeded) - 1, BATCHES).round().astype(int)) if seeded else ()
    picked = [seeded[i] for i in spread_out]
    found = {row: batch for row in picked for batch in all_batches([recording.sweep.select([row])], [])}
    if not found:
        raise ProfileError(f"{recording.path}: none of its batches can be drawn again; run `ramp-moe profile`")
    return found


def _choices(recorded: Replay, rows: list[int]) -> list[int]:
    """List what dispatch by the profile launches on these rows."""
    tune = recorded.of("tune")
    if tune is None:
        raise ProfileError(
            f"the profile of {', '.join(recorded.kernels)} has no batches to fit on; run `ramp-moe profile`"
        )
    cost = np.where(recorded.bounded[rows], np.inf, tune.fit().cost(recorded.histograms[rows]))
    return [int(i) for i in cost.argmin(1)]


def _columns(recorded: Replay, row: int, choice: int) -> list[int]:
    """Choose a row's candidates to measure: dispatch's choice, the fastest of each kernel, then the next fastest."""
    us = np.where(recorded.bounded[row], np.inf, recorded.times_us[row])
    order = [i for i in np.argsort(us, kind="stable").tolist() if math.isfinite(us[i])]
    fastest: dict[str, int] = {}
    for i in order:
        fastest.setdefault(recorded.candidates[i].kernel, i)
    return list(dict.fromkeys([choice, *fastest.values(), *order]))[: max(CELLS, 1 + len(fastest))]


def _measure(measurer: Measurer, candidates: Sequence[Candidate]) -> list[float | str]:
    """Measure each candidate on the open batch: its median microseconds, or why it failed.

    All are compiled first. Rounds are interleaved, as in a profile's run.
    """
    times: dict[str, list[float]] = {c.name: [] for c in candidates}
    failed: dict[str, str] = {}
    for turn in range(1 + Settings.rounds):
        for candidate in candidates:
            if candidate.name in failed:
                continue
            try:
                if turn == 0:
                    measurer.call("warm", candidate, timeout=Settings.first_call_s)
                else:
                    given = Settings.launches, math.inf
                    times[candidate.name] += measurer.call("time", candidate, *given, timeout=Settings.call_s)
            except (Failed, Died) as e:
                failed[candidate.name] = str(e)
    return [failed.get(name) or float(np.median(us)) for name, us in times.items()]


def _cell(recorded: Replay, row: int, column: int, chosen: bool, measured: float | str) -> Cell:
    candidate, us = recorded.candidates[column], float(recorded.times_us[row, column])
    what = *recorded.labels[row], candidate.kernel, candidate.config.name, chosen, us
    return Cell(*what, None, measured) if isinstance(measured, str) else Cell(*what, measured)


def _judge(
    registry: Registry, recorded: Replay, cells: Sequence[Sequence[Cell]], environment: Environment, seconds: float
) -> Drift:
    everything = [c for batch in cells for c in batch]
    timed = [[(c, c.measured_us) for c in batch if c.measured_us is not None] for batch in cells]
    ratios = np.array([now / c.recorded_us for batch in timed for c, now in batch])
    if not len(ratios):
        raise KernelError(
            f"none of {len(everything)} cells can be measured here (first: {everything[0].failed}); look at "
            f"`ramp-moe check-kernel {everything[0].kernel}`"
        )
    factor = float(np.median(ratios))
    off = float(np.abs(ratios / factor - 1).mean())
    losses, still_best = [], 0
    for batch in filter(None, timed):
        best_recorded, best_now = min(c.recorded_us for c, _ in batch), min(now for _, now in batch)
        still_best += any((c.recorded_us, now) == (best_recorded, best_now) for c, now in batch)
        losses += [max(0.0, now / best_now - c.recorded_us / best_recorded) for c, now in batch if c.chosen]
    loss = float(np.mean(losses)) if losses else 0.0
    repeats = {r.sweep.kernel: spread(r.sweep, Settings.close) for r in recorded.recordings}
    tolerance = float(np.mean([_tolerance(repeats[c.kernel], c.recorded_us) for batch in timed for c, _ in batch]))
    failing = {f"{c.kernel}/{c.config}": c.failed for c in everything if c.failed is not None and c.chosen}
    reasons = [f"dispatch would launch {name}, which fails here: {why}" for name, why in failing.items()]
    if loss > tolerance:
        reasons.append(f"dispatch's choices lose {loss:.1%} more against their rivals than they did")
    if off > tolerance:
        reasons.append(f"times changed by different factors: {off:.1%} on average beside the common one")
    shifted: Verdict = "shifted" if abs(factor - 1) > tolerance else "holds"
    notes = [
        f"the profile of {kernel} is of one run: how well it repeats was assumed, not measured"
        for kernel, found in repeats.items()
        if not found
    ]
    return Drift(
        model=recorded.shape.label,
        dtype=recorded.shape.dtype,
        device=recorded.hardware.name,
        kernels=tuple(recorded.kernels),
        verdict="does not hold" if reasons else shifted,
        reasons=tuple(reasons),
        remedy=_remedy(registry, recorded) if reasons else (),
        offset=factor - 1,
        spread=off,
        loss=loss,
        tolerance=tolerance,
        still_best=still_best,
        batches=len(cells),
        cells=tuple(everything),
        changes=_changes(registry, recorded, environment),
        notes=(*environment.notes, *recorded.notes, *notes),
        seconds=round(seconds, 1),
    )


def _tolerance(repeats: Sequence[Spread], us: float) -> float:
    """The tolerance of a cell that takes `us` microseconds: the 95th percentile of what two runs of its profile differ
    by.

    It counts cells of that latency which were near the best, and so measured in every round, as the ones here.
    """
    return next((s.p95 for s in repeats if s.low <= us < s.high), UNREPEATED)


def _changes(registry: Registry, recorded: Replay, environment: Environment) -> tuple[Change, ...]:
    found: dict[Change, None] = {}
    for recording in recorded.recordings:
        record = recording.sweep.record
        runs = [{"GPU": r.device_name, "its UUID": r.gpu, "driver": r.driver, **r.software} for r in record.runs]
        e = environment
        here = {"GPU": e.device_name, "its UUID": e.gpu, "driver": e.driver, **e.software}
        of_kernel = f"kernel {record.kernel}"
        now = {of_kernel: known_version(registry.kernel(record.kernel))} | here
        for what, value in now.items():
            before = [record.kernel_version] if what == of_kernel else [r.get(what, "none") for r in runs]
            if value not in before:
                found[Change(what, " and ".join(dict.fromkeys(before)), value)] = None
    return tuple(found)


def _remedy(registry: Registry, recorded: Replay) -> tuple[str, ...]:
    """List commands that measure the profiles again. A file that a run would extend, and so mix with what does not
    hold, is first moved out of its way."""
    shape = recorded.shape
    moves = []
    for recording in recorded.recordings:
        kernel, path = recording.sweep.kernel, recording.path
        extended = known_version(registry.kernel(kernel)) == recording.sweep.record.kernel_version
        if extended and path == user_data_dir() / relative_path(kernel, shape, recorded.hardware):
            moves.append(shlex.join(["mv", str(path), f"{path}.old"]))
    wanted = [word for kernel in recorded.kernels for word in ("--kernel", kernel)]
    return *moves, shlex.join(["ramp-moe", "profile", "--model", shape.label, "--dtype", shape.dtype, *wanted])
