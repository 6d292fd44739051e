"""Makes a shape's plan from times on this GPU, which come from the cache or from a search."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..errors import KernelError, ProfileError
from ..measurements.calibration_file import CalibrationRecord as CalibrationRecord
from ..measurements.calibration_file import load, locked, save
from ..spec.kernel import LAYOUTS, BuildableKernel, KernelConfig, layouts_of
from ..spec.launchable import LaunchableKernel
from .calibration import ENGINE, MARGIN, Calibration, Search, Timer
from .calibration_seconds import Say
from .layer_factory import LayerPlan

COMPILING = 0.5
"""Share of the time limit for compiling kernels that are compiled ahead. What it does not suffice for is left out."""

WAITED = 1.0
"""If the lock took longer than these seconds, another process held it."""
LATE = "not compiled within the time for it; `ramp-moe kernels build` compiles it ahead"


def measured(
    key: Mapping[str, str],
    make_search: Callable[[Calibration | None], Search],
    make_timer: Callable[[], Timer],
    limit: float,
    say: Say,
    kernels: Sequence[LaunchableKernel] = (),
) -> CalibrationRecord:
    """The cache's record for the key. If it has none, a search of `limit` seconds makes it, and the cache keeps it.

    If another process measures the same, it is waited for, `limit` seconds at most, and its record is used. A record
    of a search that was cut short is continued otherwise. A cache that cannot be read or written costs a line of `say`.

    kernels: of those that are compiled ahead, the candidates that the search begins with are compiled before it.
    """
    with ExitStack() as stack:
        kept, asked = True, time.monotonic()
        try:
            if not stack.enter_context(locked(key, limit)):
                say(f"another process has measured {key['shape']} for over {limit:g} s; it is not waited for")
        except ProfileError as e:
            kept = False
            say(f"what is measured is not kept: {e}")
        record = _known(key, say)
        if record is not None and (record.complete or time.monotonic() - asked > WAITED):
            return record
        began = time.monotonic()
        search = make_search(None if record is None else Calibration(record.timings))
        compile_ahead(search, kernels, began + COMPILING * limit, say)
        found = search.run(make_timer(), began + limit)
        record = CalibrationRecord(
            key=dict(key),
            complete=found.complete,
            seconds=round(time.monotonic() - began, 2) + (0.0 if record is None else record.seconds),
            timings=found.timings,
            dropped=found.dropped,
        )
        if kept:
            keep(record, say)
        return record


def keep(record: CalibrationRecord, say: Say) -> None:
    """Write a record into the cache, or say why that is impossible."""
    try:
        save(record)
    except ProfileError as e:
        say(f"what is measured is not kept: {e}")


def renew(record: CalibrationRecord, say: Say) -> None:
    """Write a record again, if the cache has its times: one that could not be written was said to be so.

    Another server may have continued it since. Its record then stays.
    """
    with suppress(ProfileError):
        found = load(record.key)
        if found is not None and found.timings == record.timings:
            keep(record, say)


def known(record: CalibrationRecord) -> Calibration:
    return Calibration(record.timings, dict(record.dropped), record.complete)


def compile_ahead(search: Search, kernels: Sequence[LaunchableKernel], deadline: float, say: Say) -> None:
    """Compile what the search begins with. Candidates that are not compiled at the deadline are left out of it."""
    wanted = search.wanted()
    for kernel in kernels:
        if isinstance(kernel, BuildableKernel):
            configs = [c.config for c in wanted if c.kernel == kernel.name]
            dropped = _compiled(kernel, configs, deadline, say)
            search.found.dropped |= {f"{kernel.name}/{name}": reason for name, reason in dropped.items()}
            search.found.later |= {f"{kernel.name}/{name}" for name, reason in dropped.items() if reason == LATE}


def _compiled(kernel: BuildableKernel, configs: Sequence[KernelConfig], deadline: float, say: Say) -> dict[str, str]:
    """Compile as many configurations at a time as there are processors.

    Returns the reasons why configurations are left out, by their names.
    """
    dropped: dict[str, str] = {}
    each = max(1, len(os.sched_getaffinity(0)))
    for first in range(0, len(configs), each):
        if time.monotonic() >= deadline:
            say(f"{len(configs) - first} configurations of {kernel.name} left out: {LATE}")
            return dropped | {c.name: LATE for c in configs[first:]}
        done = partial(_progress, say, kernel.name, first, len(configs))
        try:
            dropped |= kernel.build_some(configs[first : first + each], done)
        except KernelError as e:  # nothing can be compiled here; objects that exist already are still used
            say(f"{kernel.name}: {e}")
            break
    return dropped


def _progress(say: Say, kernel: str, before: int, every: int, done: int, total: int, last: str) -> None:
    if last:
        say(f"compiled {before + done} of {every} configurations of {kernel} ({last})")


@dataclass(frozen=True)
class Calibrated:
    """A plan of the candidates that were timed.

    engine: whether the weights stay in the engine's order of rows, so that its own path can compute with them.
    chosen: name of the candidate for a size alone, by measured size.
    predicted: microseconds that the cost model had predicted for it, by measured size. Kernels without a profile have
        none.
    """

    plan: LayerPlan
    found: Calibration
    engine: bool
    chosen: Mapping[int, str]
    predicted: Mapping[int, float]

    def keeps(self, num_tokens: int) -> bool:
        """Whether the engine's own path computes batches of this size."""
        return self.engine and self.found.engine_keeps(num_tokens, self.chosen)

    @property
    def keeps_any(self) -> bool:
        """Whether the engine's own path keeps any size.

        The measured sizes tell: between two of them, the interpolated ratio is no smaller than at one of them.
        """
        return any(self.keeps(n) for n in self.found.tokens)


def calibrated(
    search: Search, plan: LayerPlan, kernels: Sequence[LaunchableKernel], engine_layout: str, any_format: bool = False
) -> Calibrated:
    """The plan by what a search found, with one copy of the weights.

    The weights stay in the engine's order of rows, unless `best_layout` prefers another. Kernels that do not read the
    weights' order are left out. any_format: the engine's own path is not kept, so `fastest_layout` decides. Raises
    KernelError if the search timed nothing, or if no measured kernel is left.
    """
    model = search.corrected()
    reads = {k.name: layouts_of(k, search.shape) for k in kernels}
    find = fastest_layout if any_format else best_layout
    layout = find(search.found, reads, engine_layout)
    names = {c.kernel for c in model.candidates}
    kept = [k for k in kernels if k.name in names and layout in reads[k.name]]
    if not kept:
        raise KernelError(f"no kernel that was measured reads weights in {layout}")
    model = model.restrict([k.name for k in kept])
    chosen = search.chosen(model)
    predicted = {n: us for n, name in chosen.items() if (us := search.predicted(name, n)) is not None}
    return Calibrated(
        replace(plan, kernels=kept, model=model), search.found, layout == engine_layout, chosen, predicted
    )


def predicted(plan: LayerPlan) -> Calibrated:
    """The plan of a cost model, of which nothing was measured here. The engine's own path keeps no size."""
    return Calibrated(plan, Calibration(), engine=True, chosen={}, predicted={})


def without(plan: LayerPlan, kernels: Container[str]) -> LayerPlan:
    """The plan without some kernels, by name. Raises KernelError if none is left."""
    kept = [k for k in plan.kernels if k.name not in kernels]
    if len(kept) == len(plan.kernels):
        return plan
    if not kept:
        raise KernelError(f"no kernel is left without {', '.join(k.name for k in plan.kernels)}")
    names = [k.name for k in kept]
    return replace(plan, kernels=kept, model=None if plan.model is None else plan.model.restrict(names))


def best_layout(found: Calibration, reads: Mapping[str, Sequence[str]], engine_layout: str) -> str:
    """The order of rows in which to hold the weights.

    It is the engine's, unless another is faster by MARGIN in the geometric mean over the sizes, and slower at none.
    """

    def times(layout: str) -> list[float]:
        return _least_times(found, reads, layout, (ENGINE,) if layout == engine_layout else ())

    own = times(engine_layout)
    best, gain = engine_layout, math.log(MARGIN)
    for layout in dict.fromkeys(key for keys in reads.values() for key in keys if key in LAYOUTS):
        other = times(layout)
        if layout != engine_layout and all(theirs <= ours for ours, theirs in zip(own, other, strict=True)):
            ratio = float(np.mean([math.log(ours / theirs) for ours, theirs in zip(own, other, strict=True)]))
            if ratio > gain:
                best, gain = layout, ratio
    return best


def fastest_layout(found: Calibration, reads: Mapping[str, Sequence[str]], otherwise: str) -> str:
    """The layout or format whose kernels are fastest, in the geometric mean over the sizes at which all were timed.

    otherwise: the answer if there is no such size.
    """
    timed = dict.fromkeys(key for name in sorted(found.timed) for key in reads[name.partition("/")[0]])
    times = {layout: _least_times(found, reads, layout) for layout in timed}
    sizes = [i for i in range(len(found.tokens)) if all(math.isfinite(us[i]) for us in times.values())]
    if not sizes:
        return otherwise
    return min(times, key=lambda layout: sum(math.log(times[layout][i]) for i in sizes))


def _least_times(
    found: Calibration, reads: Mapping[str, Sequence[str]], layout: str, others: Sequence[str] = ()
) -> list[float]:
    """By measured size, the least microseconds of candidates that read a layout, and of `others`; inf if there is
    none."""
    names = [n for n in found.timed if layout in reads[n.partition("/")[0]]]
    names += others
    return [
        min((us for name in names if (us := found.us(name, n)) is not None), default=math.inf) for n in found.tokens
    ]


def _known(key: Mapping[str, str], say: Say) -> CalibrationRecord | None:
    try:
        return load(key)
    except ProfileError as e:
        say(f"{e}; it is measured again")
        return None
