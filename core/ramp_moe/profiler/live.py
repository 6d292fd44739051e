"""`ramp-moe compare --live`: static, retrofitted and hindsight dispatch, measured on batches that no profile saw."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..comparison import DECODE_SIZES, PREFILL_SIZES, Comparison, compare_recorded
from ..cost_model import DEFAULT_FORM
from ..errors import ProfileError, RoutingError
from ..hardware import Hardware
from ..plugins import Registry
from ..replay import load_replay, view
from ..routing import IntArray
from ..shapes import MoEShape
from ..store import ProfileStore, relative_path
from ..sweep import PATH, Sweep, load_sweep
from ..trace import Trace
from .plan import PlannedBatch, held_out
from .session import profile
from .settings import Environment, MakeBench, Progress, Settings

RUNS = 2
"""The batches are measured so many times, so that the noise of measuring can be told from regret."""

FIRST_SEED = 1000
"""Of the held-out batches: no profile draws from these seeds."""

STEPS = 3
"""Batches of each kind and size that a trace gives, evenly spread over it."""


@dataclass(frozen=True, slots=True)
class TraceBatch(PlannedBatch):
    """A batch cut from a recorded trace; `seed` counts the steps."""

    ids: IntArray = field(compare=False)

    def topk_ids(self, shape: MoEShape) -> IntArray:
        return self.ids


def trace_batches(trace: Trace, shape: MoEShape) -> list[PlannedBatch]:
    """STEPS batches of each kind and size that the trace is long enough for. Raises RoutingError for a trace of another
    shape."""
    trace.require(shape)
    found: list[PlannedBatch] = []
    for kind, cut, sizes in (("decode", trace.decode, DECODE_SIZES), ("prefill", trace.prefill, PREFILL_SIZES)):
        for size in sizes:
            try:
                steps = list(cut(size))
            except RoutingError:  # longer than the trace
                continue
            for i in np.unique(np.linspace(0, len(steps) - 1, STEPS).round().astype(int)).tolist() if steps else ():
                found.append(TraceBatch(size, f"trace {kind}", i, "test", steps[i]))
    return found


def compare_live(
    registry: Registry,
    store: ProfileStore,
    shape: MoEShape,
    hardware: Hardware,
    kernels: Sequence[str],
    minutes: float,
    environment: Environment,
    make_bench: MakeBench,
    progress: Progress,
    trace: Trace | None = None,
    form: str = DEFAULT_FORM,
) -> Comparison:
    """Measure the profiled candidates of these kernels on held-out batches, and on batches of the trace, and judge what
    the profiles' cost model and static table choose for them.

    Raises ProfileError where a kernel has no profile of whole paths, and whatever `profile` raises. Nothing that is
    measured is kept.
    """
    recorded = load_replay(registry, store, shape, hardware, kernels)
    if recorded.stages != (PATH,):
        raise ProfileError(
            f"the recorded times of {', '.join(recorded.kernels)} are of {', '.join(recorded.stages)}, not of whole "
            "paths; run `ramp-moe profile` first"
        )
    batches = [*held_out(shape, FIRST_SEED), *(trace_batches(trace, shape) if trace else ())]
    names = {k: [c.config.name for c in recorded.candidates if c.kernel == k] for k in recorded.kernels}
    chosen = [registry.kernel(k) for k in recorded.kernels]
    with tempfile.TemporaryDirectory(prefix="ramp-moe-live-") as folder:
        settings = Settings(minutes / RUNS, Path(folder), prune=float("inf"))
        for _ in range(RUNS):
            profile(shape, hardware, chosen, settings, environment, make_bench, progress, batches, names)
        for recording in recorded.recordings:
            place = Path(folder) / relative_path(recording.sweep.kernel, shape, hardware)
            _profiled(recording.sweep).extended(view(load_sweep(place))).save(place)
        live = load_replay(registry, ProfileStore([Path(folder)]), shape, hardware, recorded.kernels)
    sources = {r.sweep.kernel: r.path for r in recorded.recordings}
    recordings = tuple(replace(r, path=sources[r.sweep.kernel]) for r in live.recordings)
    return compare_recorded(
        replace(live, recordings=recordings, notes=[*recorded.notes, *live.notes]), form, mode="live"
    )


def _profiled(sweep: Sweep) -> Sweep:
    """What the profile knows, without the batches that it kept for judging."""
    tune = sweep.rows_of("tune")
    if not tune:
        raise ProfileError(f"the profile of {sweep.kernel} has no batches to fit on; run `ramp-moe profile` first")
    return sweep.select(tune)
