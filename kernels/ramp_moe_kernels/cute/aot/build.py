"""Compiles ahead of time what the cache lacks."""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

from ramp_moe.plugin import Built

from .cache import Cache, Configuration, Damaged
from .compiler import CUTE, Compiler
from .pool import Outcome, Pool

COMPILE_SECONDS = 120.0
"""Time limit of one configuration, which takes two to six seconds."""
MAX_JOBS = 16
"""Most processes, unless more are asked for. Each takes 300 MB of memory."""


def build(
    configs: Iterable[Configuration],
    *,
    report: Callable[[int, int, str], None] = lambda done, total, name: None,
    jobs: int | None = None,
    timeout: float = COMPILE_SECONDS,
    cache: Cache | None = None,
    compiler: Compiler = CUTE,
) -> Built:
    """Compile what the cache lacks.

    report: called in this thread with the number done, the total, and the name of the last one ("" at first).
    jobs: processes; None: one for each core that this one may use, up to MAX_JOBS.
    timeout: seconds for one configuration.

    A configuration is dropped if it spills registers, fails to compile, or exceeds the timeout. The cache remembers
    why. Damaged entries are compiled again, with a note. Other processes may build the same at the same time, and any
    may be killed.

    Raises KernelError if something needed is missing, which the message names, or if the cache cannot be written.
    Nothing is needed or written if the cache has everything.
    """
    start, cpu = time.perf_counter(), _cpu_seconds()
    cache = cache or Cache.current()
    every = list({config.name: config for config in configs}.values())
    done: list[Outcome] = []
    missing: list[tuple[Configuration, str | None]] = []
    for config in every:
        entry, note = None, None
        try:
            entry = cache.look_up(config)
        except Damaged as e:
            note = f"{e}; compiled again"
        if entry is not None and entry.finished:
            done.append(Outcome(config.name, entry, compiled=False))
        else:
            missing.append((config, note))
    if missing:
        report(len(done), len(every), "")
        processes = min(jobs or _cores(), len(missing))
        with contextlib.closing(_compiled(missing, processes, timeout, cache, compiler)) as outcomes:
            for outcome in outcomes:
                done.append(outcome)
                report(len(done), len(every), outcome.name)
    whole = [d for d in done if d.entry.reason is None]
    return Built(
        folder=cache.folder,
        compiled=tuple(d.name for d in whole if d.compiled),
        reused=tuple(d.name for d in whole if not d.compiled),
        dropped={d.name: d.entry.reason for d in done if d.entry.reason is not None},
        notes=tuple(d.note for d in done if d.note is not None),
        bytes=sum(d.entry.bytes for d in whole),
        seconds=time.perf_counter() - start,
        cpu_seconds=_cpu_seconds() - cpu,
    )


def build_each(
    configs: Iterable[Configuration],
    *,
    jobs: int | None = None,
    nice: int = 0,
    timeout: float = COMPILE_SECONDS,
    cache: Cache | None = None,
    compiler: Compiler = CUTE,
) -> Generator[tuple[str, str | None]]:
    """Compile configurations, and yield each one's name as it is done, with the reason if it cannot be used.

    configs: asked for the next one whenever a process is free, so that what comes next can be decided late.
    nice: by how much the processes stand back behind others.

    Ends as the generator is closed. Otherwise as `build`.
    """
    cache = cache or Cache.current()
    pairs = ((config, None) for config in configs)
    with contextlib.closing(_compiled(pairs, jobs or _cores(), timeout, cache, compiler, nice)) as outcomes:
        for outcome in outcomes:
            yield outcome.name, outcome.entry.reason


def built(configs: Iterable[Configuration], cache: Cache | None = None) -> dict[str, str | None]:
    """What needs no compiling, by name: None if it can be loaded, else the reason why it cannot be used.

    Raises KernelError if tvm-ffi is missing.
    """
    cache, found = cache or Cache.current(), dict[str, str | None]()
    for config in configs:
        with contextlib.suppress(Damaged):  # which is compiled again
            entry = cache.look_up(config)
            if entry is not None and entry.finished:
                found[config.name] = entry.reason
    return found


def _compiled(
    missing: Iterable[tuple[Configuration, str | None]],
    jobs: int,
    timeout: float,
    cache: Cache,
    compiler: Compiler,
    nice: int = 0,
) -> Generator[Outcome]:
    with tempfile.TemporaryDirectory(prefix="ramp-moe-build-") as folder:
        compiler.check(Path(folder))
        pool = Pool(cache, compiler, Path(folder), timeout, nice)
        with contextlib.closing(pool.outcomes(missing, jobs)) as outcomes:
            yield from outcomes


def _cores() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_JOBS)


def _cpu_seconds() -> float:
    """CPU seconds of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
