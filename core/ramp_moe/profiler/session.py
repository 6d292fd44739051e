"""One profiling run: what is compiled, checked, timed and dropped, and in which order. Nothing of it is lost.

Every result goes into the journal before the next measurement starts. After any interruption, the same call goes on
behind the journal's last line, and the time spent before it counts. Orders are drawn from seeds, so that they are the
same then.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..cost_model.fit_file import digest
from ..cost_model.model import Candidate
from ..errors import KernelError, RampMoEError
from ..measurements.sweep import MAX_US, MIN_US, Run
from ..spec.hardware import Hardware
from ..spec.kernel import Kernel, known_version, usable_configs
from ..spec.launchable import LaunchableKernel
from ..spec.routing import IntArray, expert_histogram, generate, repeats_experts
from ..spec.shapes import MoEShape
from .journal import (
    AnyEvent,
    BatchDone,
    BatchRecord,
    Bounded,
    Complete,
    Dropped,
    Header,
    Journal,
    Judged,
    KernelRecord,
    Noted,
    Passed,
    Restored,
    Stages,
    Stopped,
    Visit,
    journal_path,
    open_journal,
)
from .plan import PlannedBatch, plan
from .pool import Measurer, Warmers
from .pruning import TOO_FAR, Contest, cover
from .settings import Environment, MakeBench, Progress, Result, Settings
from .worker import Died, Failed
from .writing import Place, all_batches, find_place, measured_configs, write_profile

FIRST_ROWS = 8
"""Tune batches before candidates are pruned. They are measured in any case. The plan spreads its first ones over what
the cost model sees."""

MORE_ROWS, CLOSER = 16, 1 / 3
"""Tune batches after which candidates are pruned again, by this part of the margin."""

MOST, FEWER = 24, 8
"""Most candidates of a kernel that one batch can keep, the first and the second time. On few tokens nearly all of them
may be within the margin, and any of those will do."""

STAGES_EVERY = 3
"""Stages are timed on every test batch, and on one of this number of tune batches. They cost as much as the paths, by
which dispatch goes."""

PATIENCE, MIN_PATIENCE_US = 3.0, 500.0
"""A path that takes this factor of its kernel's best so far on a batch is timed only once, unless that saves little.
"""

MAX_STATIC_TOKENS = 8192
CHECK_TOKENS, CHECK_ROUTING = 33, "balancedness0.5"
"""The batch for checks: a hot expert, experts without a token, an expert twice in a token, and no round number of
tokens."""

FAILURES = {
    "warm": "cannot be compiled",
    "check": "fails its check",
    "time": "cannot be timed",
    "time_stages": "its stages cannot be timed",
}

SHOWN_REASONS = 3


def profile(
    shape: MoEShape,
    hardware: Hardware,
    kernels: Sequence[Kernel],
    settings: Settings,
    environment: Environment,
    make_bench: MakeBench,
    progress: Progress,
    batches: Sequence[PlannedBatch] | None = None,
    only: Mapping[str, Collection[str]] | None = None,
) -> Result:
    """Measure these kernels on `batches` (the plan for the shape if None) and write a profile of each.

    `only` names the configurations to measure, by kernel; None measures all. A profile that is extended keeps those
    that it has, and a run that goes on keeps those that it began with. Raises ProfileError for a profile or journal
    that cannot be used or written, or if nothing could be measured. Raises KernelError for a kernel without
    configurations. An exception or Ctrl-C leaves the journal, to go on from.
    """
    planned = plan(shape) if batches is None else batches
    session = _open(shape, hardware, kernels, settings, environment, make_bench, progress, planned, only)
    try:
        return session.run(environment.notes)
    finally:
        session.close()


def _open(
    shape: MoEShape,
    hardware: Hardware,
    kernels: Sequence[Kernel],
    settings: Settings,
    environment: Environment,
    make_bench: MakeBench,
    progress: Progress,
    planned: Sequence[PlannedBatch],
    only: Mapping[str, Collection[str]] | None,
) -> _Session:
    configs = {k.name: usable_configs(k, shape, hardware) for k in kernels}
    wanted = {k: [c.name for c in of_kernel if only is None or c.name in only[k]] for k, of_kernel in configs.items()}
    versions = {k.name: known_version(k) for k in kernels}
    merging = frozenset(k.name for k in kernels if not k.counts_repeats)
    static = {f"{k.name}/{name}" for k in kernels for name in _defaults(k, shape, hardware)}
    places: dict[str, Place] = {}

    def make_header(found: Header | None) -> Header:
        records = {}
        for name, of_kernel in configs.items():
            run = found.run if found else None
            place = places[name] = find_place(settings.folder, name, versions[name], of_kernel, shape, hardware, run)
            if found and place.written and name in found.kernels:
                records[name] = found.kernels[name]
            elif place.base:
                names = measured_configs(place.base, of_kernel)
                records[name] = KernelRecord(versions[name], names, digest(place.base))
            else:
                begun, names = found and found.kernels.get(name), wanted[name]
                if begun and begun.base is None and {*begun.candidates} <= {c.name for c in of_kernel}:
                    names = begun.candidates
                records[name] = KernelRecord(versions[name], names, None)
        if found and any(p.written for p in places.values()):
            drawn = found.batches  # what a run has written itself must not change what it takes for given
        else:
            bases = [p.base for p in places.values() if p.base]
            drawn = [BatchRecord.of(b) for b in all_batches(bases, planned)]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        e = environment
        run = Run(now, e.device_name, e.driver, e.software, settings.method, e.gpu)
        prune = settings.prune if math.isfinite(settings.prune) else None
        return Header.of(shape, hardware, run, prune, settings.rounds, settings.close, records, drawn)

    path = journal_path(settings.folder, shape, hardware)
    journal = open_journal(path, make_header, progress.note)
    by_name = {k: {c.name: c for c in of_kernel} for k, of_kernel in configs.items()}
    candidates = [Candidate(k, by_name[k][n]) for k, r in journal.header.kernels.items() for n in r.candidates]
    given = {BatchRecord.of(b): b for b in planned}
    drawn = [given.get(b) or b.batch() for b in journal.header.batches]
    return _Session(shape, settings, journal, places, candidates, drawn, static, merging, make_bench, progress)


def _defaults(kernel: Kernel, shape: MoEShape, hardware: Hardware) -> set[str]:
    """Names of the configurations that the kernel runs without a profile."""
    if not isinstance(kernel, LaunchableKernel):
        return set()
    try:
        return {kernel.default_config(shape, hardware, n).name for n in range(1, MAX_STATIC_TOKENS + 1)}
    except RampMoEError:
        raise
    except Exception as e:  # a plugin's own mistake, which must not look like ours
        raise KernelError(f"kernel {kernel.name} fails to give its default: {type(e).__name__}: {e}") from e


def _batch_to_check(shape: MoEShape) -> IntArray:
    return generate(CHECK_ROUTING, CHECK_TOKENS, shape.num_experts, shape.top_k)


class _Session:
    def __init__(
        self,
        shape: MoEShape,
        settings: Settings,
        journal: Journal,
        places: dict[str, Place],
        candidates: Sequence[Candidate],
        batches: Sequence[PlannedBatch],
        static: Collection[str],
        merging: frozenset[str],
        make_bench: MakeBench,
        progress: Progress,
    ) -> None:
        self._shape, self._settings, self._journal, self._taken = shape, settings, journal, journal.taken
        self._places, self._static, self._progress, self._make_bench = places, static, progress, make_bench
        self._candidates, self._batches, self._merging = {c.name: c for c in candidates}, batches, merging
        self._failing: list[str] = []
        """Candidates that failed since one last succeeded."""
        self._covered: tuple[dict[str, set[str]], list[str]] | None = None
        self._measurer = Measurer(make_bench, settings.call_s)
        self._contest = Contest(self._candidates, lambda row: batches[row].histogram(shape), self._taken)
        self._kernel_of = self._contest.kernel_of
        self._began = time.monotonic() - self._taken.spent

    def run(self, notes: Iterable[str]) -> Result:
        if not self._taken.complete:
            if self._taken.spent:
                self._progress.note(
                    f"going on with {self._journal.path}: {len(self._taken.batches)} of {len(self._batches)} batches "
                    f"measured in {self._taken.spent / 60:.1f} minutes"
                )
            for text in notes:
                if text not in self._taken.notes:
                    self._keep(Noted(self._spent, text))
            self._warm()
            self._check()
            self._require_candidates()
            self._probe()
            self._measure()
        return self._finish()

    def close(self) -> None:
        self._measurer.close()
        self._journal.close()

    @property
    def _spent(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def _keep(self, event: AnyEvent) -> None:
        self._journal.append(event)

    @property
    def _live(self) -> list[str]:
        return [name for name in self._candidates if name not in self._taken.dropped]

    def _attempt(self, method: str, name: str, *args: object, timeout: float) -> Any:
        """Call the bench for a candidate. None if the candidate failed, which is kept.

        Raises Stopped if too many fail one after another for the candidates to be at fault.
        """
        try:
            answer = self._measurer.call(method, self._candidates[name], *args, timeout=timeout)
        except (Failed, Died) as e:
            self._drop(name, method, str(e))
            self._failing.append(name)
            return None
        except Stopped:
            for failed in self._failing:
                self._keep(Restored(self._spent, failed))
            raise
        self._failing.clear()
        return answer

    def _drop(self, name: str, method: str, reason: str) -> None:
        self._keep(Dropped(self._spent, name, f"{FAILURES[method]}: {reason}"))

    def _warm(self) -> None:
        """Launch once whatever may have to be compiled, in several processes: they share the compilers' caches on disk.

        Every candidate runs on one batch. Then, for each size of batch to be measured, enough candidates run to cover
        all stages besides the GEMMs, which may be compiled for sizes. Different candidates run at the same time, so
        that no two processes compile the same. The process that measures starts beside them.
        """
        passed = self._taken.passed
        todo = [n for n in self._live if n not in passed["warm"] and n not in passed["check"]]
        if self._settings.warmers < 2 or not todo:
            return
        others = {n: {s.key for s in self._candidates[n].config.stages if s.kind != "gemm"} for n in todo}
        sizes = dict.fromkeys(b.num_tokens for b in self._batches)
        first = _batch_to_check(self._shape)
        self._measurer.begin(first)
        routings = [generate("uniform", n, self._shape.num_experts, self._shape.top_k) for n in sizes]
        tasks = [(first, n) for n in todo] + [(ids, n) for n in cover(others) for ids in routings]
        self._progress.phase("compile", len(tasks))
        warmers = Warmers(
            self._make_bench,
            [(ids, self._candidates[n]) for ids, n in tasks],
            self._settings.warmers,
            self._settings.first_call_s,
            self._settings.call_s,
        )
        with contextlib.closing(warmers.outcomes()) as outcomes:
            for done, (candidate, reason) in enumerate(outcomes, 1):
                if reason is not None:
                    self._drop(candidate.name, "warm", reason)
                elif candidate.name not in passed["warm"]:
                    self._keep(Passed(self._spent, "warm", candidate.name))
                self._progress.at(done, candidate.name, self._spent)

    def _check(self) -> None:
        """Compare the output of every candidate with the float32 layer, on all experts."""
        todo = [n for n in self._live if n not in self._taken.passed["check"]]
        if todo:
            self._progress.phase("check", len(todo))
            self._measurer.open(_batch_to_check(self._shape))
        for done, name in enumerate(todo):
            self._progress.at(done, name, self._spent)
            self._attempt("check", name, timeout=self._settings.first_call_s)
            if name not in self._taken.dropped:
                self._keep(Passed(self._spent, "check", name))

    def _probe(self) -> None:
        """Visit the candidates on the first tune batches, the smallest first, and prune those that are near the best on
        none.

        If all kernels extend a recorded sweep, nothing is probed, since nothing of it is pruned.
        """
        tune = self._first_tune(FIRST_ROWS)
        extends = all(k.base for k in self._journal.header.kernels.values())
        if self._taken.judged or extends or math.isinf(self._settings.prune) or len(tune) < FIRST_ROWS:
            return
        tune.sort(key=lambda row: self._batches[row].num_tokens)
        self._progress.phase("probe", len(tune))
        for done, row in enumerate(tune):
            self._open(row)
            names = self._turn(row, 0)
            for name in names:
                self._progress.at(done, f"{self._batches[row].num_tokens} tokens, {name}", self._spent)
                self._visit(row, name)
        self._require_candidates()
        self._prune(tune, self._settings.prune, MOST)

    def _first_tune(self, count: int) -> list[int]:
        return [i for i, b in enumerate(self._batches) if b.split == "tune"][:count]

    def _measure(self) -> None:
        taken = self._taken
        self._progress.phase("measure", len(self._batches))
        more = self._first_tune(MORE_ROWS)
        for row, batch in enumerate(self._batches):
            if row in taken.batches:
                continue
            if 0 < taken.judged < len(more) == MORE_ROWS and taken.batches.issuperset(more):
                self._prune(more, 1 + CLOSER * (self._settings.prune - 1), FEWER)
            late = self._spent >= self._settings.minutes * 60
            if late and row not in taken.visits and len(taken.visits) >= FIRST_ROWS:
                continue  # only what is begun, by the probe or before an interruption, is finished
            self._measure_row(row, batch)
        self._keep(Complete(self._spent))

    def _measure_row(self, row: int, batch: PlannedBatch) -> None:
        self._open(row)
        where = f"batch {row + 1} of {len(self._batches)} ({batch.num_tokens} tokens, {batch.routing})"
        for turn in range(self._settings.rounds):
            for name in self._turn(row, turn):
                self._progress.at(len(self._taken.batches), f"{where}, {len(self._live)} configurations", self._spent)
                self._visit(row, name)
        staged = self._settings.stages and (batch.split == "test" or row % STAGES_EVERY == 0)
        while names := self._stages_to_time(row) if staged else ():
            for name in names:
                self._progress.at(len(self._taken.batches), f"{where}, stages", self._spent)
                self._visit_stages(row, name)
        self._require_candidates()
        self._keep(BatchDone(self._spent, row))

    def _open(self, row: int) -> None:
        ids = self._batches[row].topk_ids(self._shape)
        self._measurer.open(ids)
        self._uncounted = self._merging if self._merging and repeats_experts(ids) else frozenset()
        self._fastest = self._contest.best({n: v[0][0] for n, v in self._taken.visits.get(row, {}).items()})
        self._expected = self._contest.estimates(row)

    def _turn(self, row: int, turn: int) -> list[str]:
        """The candidates to visit in one turn of a row, less those that an interrupted run visited.

        They are shuffled. Only the one expected to be its kernel's best comes first, for the others to be compared
        with.
        """
        visits, bounded = self._taken.visits.get(row, {}), self._taken.bounded.get(row, ())
        left = {n for n in self._live if len(visits.get(n, [])) == turn and n not in bounded}
        left = {n for n in left if self._kernel_of(n) not in self._uncounted}
        if turn:
            ratios = self._contest.ratios(row, self._live, turn)
            left = {n for n in left if ratios[n] <= self._settings.close}
        # The shuffle is over all candidates, so that the order of the others stays if one is dropped.
        names = list(self._candidates)
        order = [names[i] for i in np.random.default_rng((row, turn)).permutation(len(names))]
        # Likewise, what an interrupted run visited first stays the first.
        known = [n for n in order if n in self._expected and (n in left or n in visits)]
        first = {self._kernel_of(n): n for n in sorted(known, key=lambda n: -self._expected[n].us)}
        return sorted((n for n in order if n in left), key=lambda n: first.get(self._kernel_of(n)) != n)

    def _visit(self, row: int, name: str) -> None:
        kernel = self._kernel_of(name)
        best = self._fastest.get(kernel, math.inf)
        timed = name in self._taken.visits.get(row, {})
        expected = self._expected.get(name)
        if not timed and expected is not None and expected.behind and expected.us > TOO_FAR * best:
            self._keep(Bounded(self._spent, row, name))
            return
        patience = max(PATIENCE * best, MIN_PATIENCE_US)
        us = self._attempt("time", name, self._settings.launches, patience, timeout=self._settings.call_s)
        if us is not None and self._plausible("time", name, us):
            self._keep(Visit(self._spent, row, name, us))
            self._fastest[kernel] = min(us[0], best)

    def _visit_stages(self, row: int, name: str) -> None:
        us = self._attempt("time_stages", name, self._settings.launches, timeout=self._settings.call_s)
        if us is not None and all(self._plausible("time_stages", name, of_stage) for of_stage in us.values()):
            self._keep(Stages(self._spent, row, name, us))

    def _plausible(self, method: str, name: str, us: list[float]) -> bool:
        """Tell whether a sweep can hold these times. A candidate with others is dropped."""
        if us and all(MIN_US <= t <= MAX_US for t in us):
            return True
        self._drop(name, method, f"{us} are no times in microseconds")
        return False

    def _stages_to_time(self, row: int) -> list[str]:
        """Choose candidates that cover the stages without a time on the row.

        For a new row they cover all stages. That takes a while to find, and changes only if candidates are dropped.
        """
        untimed = self._untimed(row)
        if row in self._taken.staged:
            return cover(untimed)
        if self._covered is None or self._covered[0] != untimed:
            self._covered = untimed, cover(untimed)
        return self._covered[1]

    def _untimed(self, row: int) -> dict[str, set[str]]:
        """Keys of the stages that have no time on the row, by candidate that is not far behind there."""
        taken = self._taken
        asked = taken.staged.get(row, set())
        known = {*taken.stages.get(row, {}), *(s.key for n in asked for s in self._candidates[n].config.stages)}
        return {
            name: {s.key for s in self._candidates[name].config.stages} - known
            for name, ratio in self._contest.ratios(row, self._live).items()
            if ratio <= PATIENCE and self._kernel_of(name) not in taken.stageless
        }

    def _prune(self, rows: Sequence[int], factor: float, most: int) -> None:
        """Drop the candidates that are behind on all of these rows, except those of profiles that are extended."""
        spared = set(self._static)
        for kernel, record in self._journal.header.kernels.items():
            if record.base:
                spared.update(f"{kernel}/{n}" for n in record.candidates)
        reason = (
            f"on none of {len(rows)} spread batches among the kernel's {most} fastest within {factor:.3g}x of its best"
        )
        for name in self._contest.losers(rows, factor, most, spared):
            self._keep(Dropped(self._spent, name, reason, pruned=True))
        self._keep(Judged(self._spent, len(rows)))

    def _require_candidates(self) -> None:
        if self._live:
            return
        by_reason = Counter(d.reason for d in self._taken.dropped.values())
        reasons = "; ".join(f"{count} of them: {why}" for why, count in by_reason.most_common(SHOWN_REASONS))
        raise Stopped(
            f"none of {len(self._candidates)} configurations can be measured ({reasons})",
            f"move {self._journal.path}, which has all reasons, away to try again",
        )

    def _finish(self) -> Result:
        taken, header = self._taken, self._journal.header
        ids = {i: self._batches[i].topk_ids(self._shape) for i in sorted(taken.batches)}
        rows = {i: (self._batches[i], expert_histogram(of, self._shape.num_experts)) for i, of in ids.items()}
        counted = {i: row for i, row in rows.items() if not repeats_experts(ids[i])}
        profiles = []
        for kernel, place in self._places.items():
            configs = {c.config.name: c.config for c in self._candidates.values() if c.kernel == kernel}
            own = counted if kernel in self._merging else rows
            profiles.append(write_profile(self._settings.folder, place, header, kernel, configs, taken, own))
        self._journal.delete()
        return Result(profiles, len(rows), len(self._batches), taken.spent, taken.notes)
