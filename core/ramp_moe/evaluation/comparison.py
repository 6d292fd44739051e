"""Comparing dispatch policies on the same batches: static, by histogram, and the oracle (the best in hindsight)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import msgspec
import numpy as np

from ..cost_model.model import DEFAULT_FORM, Candidate, CostModel, provenance
from ..dispatch.profile_store import ProfileStore
from ..errors import ProfileError, RampMoEError
from ..measurements.trace import Trace, spread_out
from ..registry.registry import Registry
from ..spec.hardware import Hardware
from ..spec.routing import FloatArray, IntArray, active_experts, expert_histogram
from ..spec.shapes import MoEShape
from .regret import (
    DEALS,
    IndexArray,
    Summary,
    cross_validated_choices,
    pooled_regret,
    regret,
    selection_noise,
    single_choice,
    single_choices,
    sparse_table,
    split_half_regret,
    static_table,
    table_choice,
    table_choices,
)
from .replay import Replay, load_replay, of_plugins
from .vllm_table import POLICY, VllmTable, judge

Mode = Literal["replay", "live", "predicted"]


def percent(value: float | None) -> str:
    """Format a fraction for a person to read; empty if it was not measured."""
    return "" if value is None else f"{value:.1%}"


@dataclass(frozen=True, slots=True)
class Pick:
    """A candidate and its time: predicted in mode "predicted", measured otherwise."""

    kernel: str
    config: str
    token_block: int
    us: float

    @classmethod
    def of(cls, candidate: Candidate, us: float) -> Pick:
        return cls(candidate.kernel, candidate.config.name, candidate.config.gemms[0].block_m, float(us))


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch, or `steps` batches of one kind from a trace.

    For several steps, times are means, picks are the commonest, and `tokens` is the most that one of them has. `best`
    is None if nothing was measured.
    """

    tokens: int
    routing: str
    active_experts: float
    static: Pick
    histogram: Pick
    best: Pick | None
    steps: int = 1
    changed: float = 0.0
    """Share of the steps whose histogram choice differs from the static one."""
    runs: float = 1.0
    """How often batches of this kind ran, by which speed-ups over a trace are weighted."""

    @property
    def speedup(self) -> float:
        return self.static.us / self.histogram.us

    def regret_of(self, pick: Pick) -> float | None:
        return None if self.best is None else pick.us / self.best.us - 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "speedup": self.speedup,
            "regret": self.regret_of(self.histogram),
            "static_regret": self.regret_of(self.static),
        }


@dataclass(frozen=True, slots=True)
class Ratios:
    """Speed-ups over batches."""

    geomean: float
    min: float
    max: float

    @classmethod
    def of(cls, ratios: FloatArray, weights: Sequence[float] | None = None) -> Ratios:
        mean = np.average(np.log(ratios), weights=weights)
        return cls(float(np.exp(mean)), float(ratios.min()), float(ratios.max()))


@dataclass(frozen=True, slots=True)
class Noise:
    """What repeated measurements say of the regrets, on the `batches` that were measured twice.

    `selection` is the regret of choosing the best on one run and judging it on another. `regret` is each policy's mean
    regret against the best so chosen, which noise does not flatter.
    """

    batches: int
    selection: Summary
    regret: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """A comparison in one line: its kernels, the number of batches that all of them share, speed-ups and mean regrets.

    The speed-ups are over static dispatch: of dispatch by histogram, and of the oracle.
    """

    kernels: tuple[str, ...]
    batches: int
    speedup_over_static: Ratios
    best_over_static: Ratios
    regret: float
    static_regret: float

    @classmethod
    def of(cls, result: Comparison) -> Row:
        """Make the row of a comparison on measured times."""
        assert result.best_over_static is not None
        means = (result.baselines[policy].mean for policy in ("histogram", "static"))
        ratios = result.speedup_over_static, result.best_over_static
        return cls(tuple(result.kernels), len(result.batches), *ratios, *means)


@dataclass(frozen=True)
class Comparison:
    """What `ramp-moe compare` shows. Regrets are fractions, None if they were not measured."""

    mode: Mode
    device: str
    model: str
    dtype: str
    kernels: list[str]
    form: str
    sources: list[dict[str, Any]]
    stages: list[str]
    stages_left_out: Mapping[str, list[str]]
    """Kinds of stages that the times do not contain, by kernel."""
    batches: list[Batch]
    baselines: Mapping[str, Summary]
    """Regret of each policy by name; empty if nothing was measured."""
    speedup_over_static: Ratios
    """Speed-ups of dispatch by histogram."""
    best_over_static: Ratios | None
    """Speed-ups of the oracle, which no choice can exceed. None if nothing was measured."""
    notes: list[str]
    noise: Noise | None = None
    """None if no batch was measured more than once."""
    static_table: Mapping[str, Any] | None = None
    """A table of vLLM's format that was judged, too: its file, the kernel on whose times, and what each entry became
    among the recorded candidates."""
    guessed: bool = False
    """True if the cost model was fitted to other shapes or another GPU."""
    plugins: Sequence[Row] = ()
    """Plugins' kernels, which have no part in the figures above: each alone, and beside the library's own."""

    def provenance(self) -> str:
        """Say in two sentences where the numbers come from, and what they cover."""
        what = "; ".join(s["summary"] for s in self.sources)
        origin = {
            "replay": f"Replay of recorded measurements, nothing was run on this machine: {what}.",
            "live": f"MEASURED on this machine's GPU just now; the cost model was fitted to: {what}.",
            "predicted": f"{'GUESSED' if self.guessed else 'PREDICTED'} by the cost model, not measured; it was fitted "
            f"to recorded measurements of {what}.",
        }[self.mode]
        left_out = "; ".join(f"{k} without {', '.join(v)}" for k, v in self.stages_left_out.items() if v)
        return f"{origin} Times cover: {', '.join(self.stages)}" + (f" ({left_out})." if left_out else ".")

    def as_dict(self) -> dict[str, Any]:
        empty: dict[str, float | None] = dict.fromkeys(("mean", "median", "p95", "max"))
        summaries = {name: s.as_dict() for name, s in self.baselines.items()}
        return {
            "mode": self.mode,
            "guessed": self.guessed,
            "device": self.device,
            "model": self.model,
            "dtype": self.dtype,
            "kernels": self.kernels,
            "form": self.form,
            "sources": self.sources,
            "stages": self.stages,
            "stages_left_out": self.stages_left_out,
            "regret": summaries.get("histogram", empty),
            "static_regret": summaries.get("static", empty),
            "baselines": summaries,
            "speedup_over_static": asdict(self.speedup_over_static),
            "best_over_static": self.best_over_static and asdict(self.best_over_static),
            "noise": self.noise and asdict(self.noise),
            "static_table": self.static_table,
            "plugins": [asdict(row) for row in self.plugins],
            "notes": self.notes,
            "batches": [b.as_dict() for b in self.batches],
        }


def sources_of(replay: Replay) -> list[dict[str, Any]]:
    """Describe where the replay's sweeps are from, as `Comparison.sources` has it."""
    return [
        {
            "summary": provenance(r.sweep),
            "kernel": r.sweep.kernel,
            "kernel_version": r.sweep.record.kernel_version,
            "runs": msgspec.to_builtins(r.sweep.record.runs),
            "file": str(r.path),
        }
        for r in replay.recordings
    ]


@dataclass(frozen=True, slots=True)
class _Policies:
    """Choices `[rows]` of each policy on the judged batches, and what a reader must know of them.

    There is one array for each way of dealing folds, or a single one if the batches are held out anyway.
    """

    choices: Mapping[str, list[IndexArray]]
    notes: list[str]


def _held_out_policies(tune: Replay, test: Replay, form: str) -> _Policies:
    """Fit and tune every policy on `tune`, and let it choose for the batches of `test`."""
    table = static_table(tune.times_us, tune.labels)
    choices = {
        "histogram": tune.fit(form=form).cost(test.histograms).argmin(1),
        "static": table_choices(table, test.labels),
        "nearest-batch table": table_choices(sparse_table(table), test.labels),
        "one configuration": np.full(len(test.labels), single_choice(tune.times_us)),
    }
    kinds = sorted({kind for _, kind in test.labels} - {kind for _, kind in tune.labels})
    note = f"fitted, and static dispatch tuned, on {len(tune.labels)} batches; judged on {len(test.labels)} others" + (
        f", among them routing never used in tuning: {', '.join(kinds)}" if kinds else ""
    )
    return _Policies({k: [v] for k, v in choices.items()}, [note])


def _cross_validated_policies(replay: Replay, form: str) -> _Policies:
    times, labels = replay.times_us, replay.labels
    by_histogram = [
        cross_validated_choices(replay.histograms, lambda rows: replay.fit(rows, form), seed=deal)
        for deal in range(DEALS)
    ]
    table = static_table(times, labels)
    means = [float(regret(times, choices).mean()) for choices in by_histogram]
    notes = [
        f"histogram choices are cross-validated, {DEALS} ways of dealing the batches into folds pooled (mean "
        f"regret {percent(min(means))} to {percent(max(means))}); the table shows the first",
        "static is judged on the uniform batches it was tuned on, which favours it",
    ]
    choices = {
        "histogram": by_histogram,
        "static": [table_choices(table, labels)],
        "nearest-batch table": [table_choices(sparse_table(table), labels)],
        "one configuration": [single_choices(times, seed=deal) for deal in range(DEALS)],
    }
    return _Policies(choices, notes)


def compare_recorded(
    replay: Replay, form: str = DEFAULT_FORM, mode: Mode = "replay", table: VllmTable | None = None
) -> Comparison:
    """Judge every policy on measured times.

    The replay's test batches are judged, with everything fitted and tuned on the others. If it has no test batches, all
    of them are judged, and the histogram choices are cross-validated. Mode "live" says that the test batches were
    measured just now. `table` is one more policy (see `vllm_table.judge`).
    """
    tune, test = replay.of("tune"), replay.of("test")
    if tune is None:
        raise ProfileError(f"{replay.shape.title} on {replay.hardware.name}: no batches to fit on; measure some first")
    judged = test or tune
    policies = _cross_validated_policies(tune, form) if test is None else _held_out_policies(tune, test, form)
    named = None if table is None else judge(table, judged.candidates)
    if named is not None:
        policies = _Policies(
            {**policies.choices, POLICY: [named.choices(judged.labels)]}, [*policies.notes, named.note()]
        )
    times, candidates = judged.times_us, judged.candidates
    by_histogram, (static,) = policies.choices["histogram"], policies.choices["static"]
    rows = np.arange(len(times))
    static_us, best = times[rows, static], times.argmin(1)
    active = active_experts(judged.histograms)

    def pick(row: int, candidate: int) -> Pick:
        return Pick.of(candidates[candidate], times[row, candidate])

    batches = [
        Batch(
            tokens=tokens,
            routing=routing,
            active_experts=float(active[i]),
            static=pick(i, static[i]),
            histogram=pick(i, by_histogram[0][i]),
            best=pick(i, best[i]),
            changed=float(static[i] != by_histogram[0][i]),
        )
        for i, (tokens, routing) in enumerate(judged.labels)
    ]
    return Comparison(
        mode=mode,
        device=replay.hardware.name,
        model=replay.shape.label,
        dtype=replay.shape.dtype,
        kernels=replay.kernels,
        form=form,
        sources=sources_of(replay),
        stages=list(replay.stages),
        stages_left_out=replay.stages_left_out,
        batches=batches,
        baselines={name: Summary.of(pooled_regret(times, deals)) for name, deals in policies.choices.items()},
        speedup_over_static=Ratios.of(np.concatenate([static_us / times[rows, choices] for choices in by_histogram])),
        best_over_static=Ratios.of(static_us / times.min(1)),
        noise=_noise(judged, policies),
        notes=[*replay.notes, *policies.notes, *_bounds(judged, policies)],
        static_table=None if named is None else named.as_dict(candidates),
    )


def compare_plugins(
    registry: Registry,
    store: ProfileStore,
    shape: MoEShape,
    hardware: Hardware,
    beside: Sequence[str],
    stages: Sequence[str] = (),
    form: str = DEFAULT_FORM,
) -> tuple[list[Row], list[str]]:
    """Compare each plugin's kernel that has a sweep: a row of its own, and one with all kernels of `beside`.

    Each row is over the batches that its kernels share. Notes say which rows are missing, and why.
    """
    rows, notes = [], []
    for name in of_plugins(registry, store, shape, hardware):
        for kernels in ([name], [*beside, name]) if name not in beside else ():
            try:
                replay = load_replay(registry, store, shape, hardware, kernels, stages)
                rows.append(Row.of(compare_recorded(replay, form)))
            except RampMoEError as e:
                notes.append(f"no row of {' + '.join(kernels)}: {e}")
    return rows, notes


def _bounds(judged: Replay, policies: _Policies) -> list[str]:
    """Write a line if a policy is judged by times that are only bounds."""
    rows = np.arange(len(judged.labels))
    count = {k: int(sum(judged.bounded[rows, c].sum() for c in deals)) for k, deals in policies.choices.items()}
    chosen = ", ".join(f"{n} of {name}" for name, n in count.items() if n)
    return [f"choices that were never timed, counted at the least they can take: {chosen}"] if chosen else []


def _noise(judged: Replay, policies: _Policies) -> Noise | None:
    """Estimate the noise of the regrets. None if no batch was measured twice."""
    rows, runs = judged.repeated()
    if not len(rows):
        return None
    against = {}
    for name, deals in policies.choices.items():
        lost = np.concatenate([split_half_regret(runs, choices[rows]).ravel() for choices in deals])
        if np.isfinite(lost).any():
            against[name] = float(lost[np.isfinite(lost)].mean())
    return Noise(len(rows), Summary.of(selection_noise(runs).ravel()), against)


DECODE_SIZES = (1, 4, 16, 64, 256)
PREFILL_SIZES = (64, 256, 1024, 4096)
STEPS = 1024
"""Most batches of one kind and size in a trace that are judged."""


def compare_trace(replay: Replay, trace: Trace, form: str = DEFAULT_FORM) -> Comparison:
    """Predict what each policy would cost on a recorded trace. Nothing here is measured on these batches.

    Static dispatch is the table tuned on the replay's measured uniform batches. Raises RoutingError if the trace is of
    another shape.
    """
    shape = replay.shape
    trace.require(shape)
    tune = replay.of("tune")
    if tune is None:
        raise ProfileError(f"{shape.title} on {replay.hardware.name}: no batches to fit on; measure some first")
    found = compare_predicted(
        tune.fit(form=form), static_table(tune.times_us, tune.labels), trace_batches(trace, shape.num_experts)
    )
    return replace(
        found,
        sources=sources_of(replay),
        stages_left_out=replay.stages_left_out,
        notes=[*replay.notes, *found.notes, "their regret is what `compare` without a trace reports"],
    )


TraceBatches = Iterable[tuple[str, int, list[int], IntArray, FloatArray]]
"""(Kind, number of batches, tokens of each judged one, their histograms, how many that ran each stands for)."""


def compare_predicted(model: CostModel, table: dict[int, int], kinds: TraceBatches) -> Comparison:
    """Predict what each policy would cost on these batches. `table` is the static one, of the model's candidates."""
    batches, outside, total, left = [], 0, 0, 0
    for routing, count, sizes, histograms, runs in kinds:
        left += count - len(sizes)
        prediction = model.predict(histograms)
        static = np.array([table_choice(table, size) for size in sizes])
        chosen = prediction.us.argmin(1)
        outside += int(prediction.extrapolated[np.arange(len(chosen)), chosen].sum())
        total += len(chosen)
        batches.append(_trace_batch(model, routing, max(sizes), histograms, static, chosen, prediction.us, runs))
    notes = ["times are predictions of the cost model, so the speed-up is at least 1 by construction"]
    if left:
        notes.append(f"of each kind {STEPS} batches at most are judged, evenly spread over the trace: {left} are not")
    if outside:
        notes.append(f"{outside} of {total} predictions lie outside the batches that the fit saw")
    kernels = list(dict.fromkeys(c.kernel for c in model.candidates))
    return Comparison(
        mode="predicted",
        guessed=model.guessed,
        device=model.hardware.name,
        model=model.shape.label,
        dtype=model.shape.dtype,
        kernels=kernels,
        form=model.form,
        sources=[{"summary": line, "kernel": line.split()[0], "runs": []} for line in model.measured],
        stages=list(model.covered),
        stages_left_out={kernel: [] for kernel in kernels},
        batches=batches,
        baselines={},
        speedup_over_static=Ratios.of(np.array([b.speedup for b in batches]), [b.runs for b in batches]),
        best_over_static=None,
        notes=notes,
    )


def trace_batches(trace: Trace, num_experts: int) -> Iterator[tuple[str, int, list[int], IntArray, FloatArray]]:
    """Yield a trace's TraceBatches.

    They are the recorded batches, or those of the sizes that the trace is long enough for.
    """
    for of_size in trace.recorded():
        batches = [of_size[i] for i in spread_out(len(of_size), STEPS)]
        histograms = np.stack([b.histogram for b in batches])
        runs = np.array([b.runs for b in batches])
        runs *= sum(b.runs for b in of_size) / runs.sum()
        yield "trace recorded", len(of_size), [b.tokens for b in batches], histograms, runs
    for kind, ids in trace.cut(DECODE_SIZES, PREFILL_SIZES):
        steps = [ids[i] for i in spread_out(len(ids), STEPS)]
        histograms = np.stack([expert_histogram(step, num_experts) for step in steps])
        # A trace of ids is cut into batches of every size: none of them counts more.
        even = np.full(len(steps), 1 / len(steps))
        yield f"trace {kind}", len(ids), [len(step) for step in steps], histograms, even


def _trace_batch(
    model: CostModel,
    routing: str,
    size: int,
    histograms: IntArray,
    static: IntArray,
    chosen: IntArray,
    us: Any,
    runs: FloatArray,
) -> Batch:
    def pick(choices: IntArray) -> Pick:
        common, _ = Counter(choices.tolist()).most_common(1)[0]
        return Pick.of(model.candidates[common], np.average(us[np.arange(len(us)), choices], weights=runs))

    return Batch(
        tokens=size,
        routing=routing,
        active_experts=float(active_experts(histograms).mean()),
        static=pick(static),
        histogram=pick(chosen),
        best=None,
        steps=len(us),
        changed=float((chosen != static).mean()),
        runs=float(runs.sum()),
    )
