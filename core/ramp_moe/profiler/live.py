"""`ramp-moe compare --live`: static, histogram and oracle dispatch, measured on batches that no profile saw."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..cost_model.model import DEFAULT_FORM
from ..dispatch.load_model import view
from ..dispatch.profile_store import ProfileStore, relative_path
from ..errors import ProfileError
from ..evaluation.comparison import DECODE_SIZES, PREFILL_SIZES, Comparison, compare_recorded, sources_of
from ..evaluation.replay import Replay, load_replay
from ..measurements.sweep import PATH, Sweep, load_sweep, path_key
from ..measurements.trace import Trace, spread_out
from ..registry.registry import Registry
from ..spec.hardware import Hardware
from ..spec.kernel import known_version
from ..spec.routing import IntArray
from ..spec.shapes import MoEShape
from .journal import Stopped
from .plan import TEST_SIZES, PlannedBatch, held_out
from .session import profile
from .settings import Environment, MakeBench, Progress, Result, Settings

RUNS = 2
"""Number of times that the batches are measured, so that the noise of measuring can be told from regret."""

FIRST_SEED = 1000
"""First seed of the held-out batches: no profile draws from these seeds."""

STEPS = 3
"""Batches of each kind and size that a trace gives, evenly spread over it."""

MAX_TOKENS = max(*TEST_SIZES, *DECODE_SIZES, *PREFILL_SIZES)
"""Tokens of the largest batch."""


@dataclass(frozen=True, slots=True)
class TraceBatch(PlannedBatch):
    """A batch cut from a recorded trace; `seed` counts the steps."""

    ids: IntArray = field(compare=False)

    def topk_ids(self, shape: MoEShape) -> IntArray:
        return self.ids


def trace_batches(trace: Trace, shape: MoEShape) -> list[PlannedBatch]:
    """Cut STEPS batches of each kind and size that the trace is long enough for, or of each size that it recorded, up
    to MAX_TOKENS.

    Raises RoutingError for a trace of another shape.
    """
    trace.require(shape)
    found: list[list[PlannedBatch]] = []

    def add(kind: str, steps: Mapping[int, IntArray]) -> None:
        found.append([TraceBatch(len(ids), f"trace {kind}", i, "test", ids) for i, ids in steps.items()])

    for recorded in trace.recorded():
        fitting = [batch for batch in recorded if batch.tokens <= MAX_TOKENS]
        add("recorded", {i: fitting[i].topk_ids(trace.top_k) for i in spread_out(len(fitting), STEPS)})
    for kind, steps in trace.cut(DECODE_SIZES, PREFILL_SIZES):
        add(kind, {i: steps[i] for i in spread_out(len(steps), STEPS)})
    return _in_turns(found)


def _in_turns(lists: Sequence[Sequence[PlannedBatch]]) -> list[PlannedBatch]:
    """Take the first of each list, then the second of each. If time is up early, all had their share."""
    return [batch for turn in itertools.zip_longest(*lists) for batch in turn if batch is not None]


def compare_live(
    registry: Registry,
    store: ProfileStore,
    shape: MoEShape,
    hardware: Hardware,
    kernels: Sequence[str],
    minutes: float,
    warmers: int,
    environment: Environment,
    make_bench: MakeBench,
    progress: Progress,
    trace: Trace | None = None,
    form: str = DEFAULT_FORM,
) -> Comparison:
    """Measure the profiled candidates of these kernels, and judge what the profiles' cost model and static table
    choose.

    The batches are held out, or cut from the trace. Each of the RUNS may take its part of `minutes`. Nothing that is
    measured is kept. Raises ProfileError if a kernel has no profile of whole paths, and whatever `profile` raises.
    """
    recorded = load_replay(registry, store, shape, hardware, kernels)
    if recorded.stages != (PATH,):
        raise ProfileError(
            f"the recorded times of {', '.join(recorded.kernels)} are of {', '.join(recorded.stages)}, not of whole "
            "paths; run `ramp-moe profile` first"
        )
    tuned = {r.sweep.kernel: _profiled(r.sweep) for r in recorded.recordings}
    seen = {(r.num_tokens, *r.histogram) for sweep in tuned.values() for r in sweep.record.batches}
    # With few experts, small batches can hardly differ.
    unseen = [b for b in held_out(shape, FIRST_SEED) if (b.num_tokens, *b.histogram(shape).tolist()) not in seen]
    batches = _in_turns([unseen, trace_batches(trace, shape) if trace else []])
    names = {k: [c.config.name for c in recorded.candidates if c.kernel == k] for k in recorded.kernels}
    chosen = [registry.kernel(k) for k in recorded.kernels]
    notes = [*environment.notes, *_changed(registry, recorded), *recorded.notes]
    with tempfile.TemporaryDirectory(prefix="ramp-moe-live-") as name:
        folder = Path(name)
        settings = Settings(minutes / RUNS, folder, prune=float("inf"), stages=False, warmers=warmers)
        failed: set[str] = set()
        for run in range(1, RUNS + 1):
            progress.note(f"run {run} of {RUNS}")
            try:
                result = profile(shape, hardware, chosen, settings, environment, make_bench, progress, batches, names)
            except Stopped as e:  # whose remedy is about a journal that is gone with the folder
                raise ProfileError(f"{e.what}; nothing is kept of a live comparison") from None
            failed |= _failed(result, notes)
            chosen = [registry.kernel(p.kernel) for p in result.profiles if p.path]
            settings = replace(settings, warmers=1)  # everything is compiled
        for kernel in chosen:
            place = folder / relative_path(kernel.name, shape, hardware)
            tuned[kernel.name].extended(view(load_sweep(place)).without(failed)).save(place)
        live = load_replay(registry, ProfileStore([folder]), shape, hardware, [k.name for k in chosen])
    notes += [n for n in live.notes if n not in notes]
    sources = [s for s in sources_of(recorded) if s["kernel"] in live.kernels]
    return replace(compare_recorded(replace(live, notes=notes), form, mode="live"), sources=sources)


def _changed(registry: Registry, recorded: Replay) -> list[str]:
    """Note each kernel whose profile is of another version than what is measured now."""
    notes = []
    for recording in recorded.recordings:
        sweep = recording.sweep
        now = known_version(registry.kernel(sweep.kernel))
        if now != sweep.record.kernel_version:
            notes.append(f"{sweep.kernel} {now} was measured, its profile is of {sweep.record.kernel_version}")
    return notes


def _failed(result: Result, notes: list[str]) -> set[str]:
    """Keys of the columns that failed; `notes` gains a line for each."""
    failed: set[str] = set()
    for of_kernel in result.profiles:
        for reason, configs in of_kernel.failed.items():
            notes.append(f"{of_kernel.kernel}/{', '.join(configs)} left out: {reason}")
            failed.update(path_key(of_kernel.kernel, c) for c in configs)
        if of_kernel.path is None:
            notes.append(f"{of_kernel.kernel} left out: none of its configurations can be measured")
    return failed


def _profiled(sweep: Sweep) -> Sweep:
    """Restrict a sweep to what the profile fits on, without the batches that it kept for judging."""
    tune = sweep.batches_of("tune")
    if not tune:
        raise ProfileError(f"the profile of {sweep.kernel} has no batches to fit on; run `ramp-moe profile` first")
    return sweep.select(tune)
