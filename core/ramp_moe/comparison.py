"""The main job: the same batches with static dispatch, with retrofitted dispatch, and with the best in hindsight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from .cost_model import DEFAULT_FORM, Candidate, CostModel, provenance
from .errors import RoutingError
from .evaluation import (
    DEALS,
    Summary,
    cross_validated_choices,
    nearest_batch_choices,
    pooled_regret,
    regret,
    single_choices,
    static_choices,
    static_table,
    table_choice,
)
from .replay import Replay
from .routing import FloatArray, IntArray, active_experts, expert_histogram
from .trace import Trace

Mode = Literal["replay", "predicted"]


def percent(value: float | None) -> str:
    """A fraction for a person to read; nothing where it was not measured."""
    return "" if value is None else f"{value:.1%}"


@dataclass(frozen=True, slots=True)
class Pick:
    """A candidate and its time: measured in replay mode, predicted otherwise."""

    kernel: str
    config: str
    token_block: int
    us: float

    @classmethod
    def of(cls, candidate: Candidate, us: float) -> Pick:
        return cls(candidate.kernel, candidate.config.name, candidate.config.gemms[0].block_tokens, float(us))


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch, or `steps` batches of one kind from a trace (times are then means, picks the commonest).

    `best` is None where nothing was measured.
    """

    tokens: int
    routing: str
    active_experts: float
    static: Pick
    retrofitted: Pick
    best: Pick | None
    steps: int = 1
    changed: float = 0.0
    """Share of the steps for which the retrofitted choice is not the static one."""

    @property
    def speedup(self) -> float:
        return self.static.us / self.retrofitted.us

    def regret_of(self, pick: Pick) -> float | None:
        return None if self.best is None else pick.us / self.best.us - 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "speedup": self.speedup,
            "regret": self.regret_of(self.retrofitted),
            "static_regret": self.regret_of(self.static),
        }


@dataclass(frozen=True, slots=True)
class Ratios:
    """Speed-ups over batches."""

    geomean: float
    min: float
    max: float

    @classmethod
    def of(cls, ratios: FloatArray) -> Ratios:
        return cls(float(np.exp(np.log(ratios).mean())), float(ratios.min()), float(ratios.max()))


@dataclass(frozen=True)
class Comparison:
    """What `ramp-moe compare` shows. Regrets are fractions, None where they were not measured."""

    mode: Mode
    device: str
    model: str
    kernels: list[str]
    form: str
    sources: list[dict[str, str]]
    stages: list[str]
    stages_left_out: Mapping[str, list[str]]
    """By kernel, the kinds of stages that its times do not contain."""
    batches: list[Batch]
    baselines: Mapping[str, Summary]
    """Regret of each policy by name; empty where nothing was measured."""
    speedup_over_static: Ratios
    """Of the retrofitted dispatch."""
    best_over_static: Ratios | None
    """Of the best in hindsight: more than this no choice can gain. None where nothing was measured."""
    notes: list[str]

    def provenance(self) -> str:
        """Where the numbers come from, and what they cover, in two sentences."""
        what = "; ".join(s["summary"] for s in self.sources)
        origin = (
            f"Replay of recorded measurements, nothing was run on this machine: {what}."
            if self.mode == "replay"
            else f"PREDICTED by the cost model, not measured; it was fitted to recorded measurements of {what}."
        )
        left_out = "; ".join(f"{k} without {', '.join(v)}" for k, v in self.stages_left_out.items() if v)
        return f"{origin} Times cover: {', '.join(self.stages)}" + (f" ({left_out})." if left_out else ".")

    def as_dict(self) -> dict[str, Any]:
        empty: dict[str, float | None] = dict.fromkeys(("mean", "median", "p95", "max"))
        summaries = {name: s.as_dict() for name, s in self.baselines.items()}
        return {
            "mode": self.mode,
            "device": self.device,
            "model": self.model,
            "kernels": self.kernels,
            "form": self.form,
            "sources": self.sources,
            "stages": self.stages,
            "stages_left_out": self.stages_left_out,
            "regret": summaries.get("retrofitted", empty),
            "static_regret": summaries.get("static", empty),
            "baselines": summaries,
            "speedup_over_static": asdict(self.speedup_over_static),
            "best_over_static": self.best_over_static and asdict(self.best_over_static),
            "notes": self.notes,
            "batches": [b.as_dict() for b in self.batches],
        }


def _sources(replay: Replay) -> list[dict[str, str]]:
    return [
        {
            "summary": provenance(r.sweep),
            "kernel": r.sweep.kernel,
            "kernel_version": r.sweep.record.kernel_version,
            "device_name": r.sweep.record.device_name,
            "driver": r.sweep.record.driver,
            "measured": r.sweep.record.measured,
            "method": r.sweep.record.method,
            "file": str(r.path),
        }
        for r in replay.recordings
    ]


def compare_recorded(replay: Replay, form: str = DEFAULT_FORM) -> Comparison:
    """Judge every policy on the replay's measured times; the retrofitted choices are cross-validated."""
    times, labels, candidates = replay.times_us, replay.labels, replay.candidates
    retrofitted = [
        cross_validated_choices(replay.histograms, lambda rows: replay.fit(rows, form), seed=deal)
        for deal in range(DEALS)
    ]
    static = static_choices(times, labels)
    policies = {
        "retrofitted": retrofitted,
        "static": [static],
        "nearest-batch table": [nearest_batch_choices(times, labels)],
        "one configuration": [single_choices(times, seed=deal) for deal in range(DEALS)],
    }
    means = [float(regret(times, choices).mean()) for choices in retrofitted]
    rows = np.arange(len(times))
    static_us, best = times[rows, static], times.argmin(1)
    active = active_experts(replay.histograms)

    def pick(row: int, candidate: int) -> Pick:
        return Pick.of(candidates[candidate], times[row, candidate])

    batches = [
        Batch(
            tokens=tokens,
            routing=routing,
            active_experts=float(active[i]),
            static=pick(i, static[i]),
            retrofitted=pick(i, retrofitted[0][i]),
            best=pick(i, best[i]),
            changed=float(static[i] != retrofitted[0][i]),
        )
        for i, (tokens, routing) in enumerate(labels)
    ]
    return Comparison(
        mode="replay",
        device=replay.hardware.name,
        model=replay.shape.label,
        kernels=replay.kernels,
        form=form,
        sources=_sources(replay),
        stages=list(replay.stages),
        stages_left_out=replay.stages_left_out,
        batches=batches,
        baselines={name: Summary.of(pooled_regret(times, deals)) for name, deals in policies.items()},
        speedup_over_static=Ratios.of(np.concatenate([static_us / times[rows, choices] for choices in retrofitted])),
        best_over_static=Ratios.of(static_us / times.min(1)),
        notes=[
            *replay.notes,
            f"retrofitted choices are cross-validated, {DEALS} ways of dealing the batches into folds pooled (mean "
            f"regret {percent(min(means))} to {percent(max(means))}); the table shows the first",
            "static is judged on the uniform batches it was tuned on, which favours it",
        ],
    )


DECODE_SIZES = (1, 4, 16, 64, 256)
PREFILL_SIZES = (64, 256, 1024, 4096)


def compare_trace(replay: Replay, trace: Trace, form: str = DEFAULT_FORM) -> Comparison:
    """Predict what each policy would cost on a recorded trace: nothing here is measured on these batches.

    Static dispatch is the table tuned on the replay's measured uniform batches. Raises RoutingError where the trace is
    of another shape.
    """
    shape = replay.shape
    if (trace.num_experts or shape.num_experts, trace.top_k) != (shape.num_experts, shape.top_k):
        raise RoutingError(
            f"the trace names {trace.top_k} of {trace.num_experts or 'so many'} experts a token, "
            f"{shape.label} {shape.top_k} of {shape.num_experts}"
        )
    model = replay.fit(form=form)
    table = static_table(replay.times_us, replay.labels)
    batches, outside, total = [], 0, 0
    for routing, size, histograms in _trace_batches(trace, shape.num_experts):
        prediction = model.predict(histograms)
        static = table_choice(table, size)
        chosen = prediction.us.argmin(1)
        outside += int(prediction.extrapolated[np.arange(len(chosen)), chosen].sum())
        total += len(chosen)
        batches.append(_trace_batch(model, routing, size, histograms, static, chosen, prediction.us))
    notes = [
        *replay.notes,
        "times are predictions of the cost model, so the speed-up is at least 1 by construction; "
        "its regret on measured batches is what `compare` without a trace reports",
    ]
    if outside:
        notes.append(f"{outside} of {total} predictions lie outside the batches that the fit saw")
    return Comparison(
        mode="predicted",
        device=replay.hardware.name,
        model=shape.label,
        kernels=replay.kernels,
        form=form,
        sources=_sources(replay),
        stages=list(replay.stages),
        stages_left_out=replay.stages_left_out,
        batches=batches,
        baselines={},
        speedup_over_static=Ratios.of(np.array([b.speedup for b in batches])),
        best_over_static=None,
        notes=notes,
    )


def _trace_batches(trace: Trace, num_experts: int) -> Iterator[tuple[str, int, IntArray]]:
    """(kind, tokens, histograms) for the batch sizes that the trace is long enough for."""
    sizes: Sequence[tuple[str, int]] = [("decode", n) for n in DECODE_SIZES] + [("prefill", n) for n in PREFILL_SIZES]
    for kind, size in sizes:
        cut = trace.decode if kind == "decode" else trace.prefill
        try:
            ids = list(cut(size))
        except RoutingError:  # longer than the trace
            continue
        if ids:
            yield f"trace {kind}", size, np.stack([expert_histogram(b, num_experts) for b in ids])


def _trace_batch(
    model: CostModel, routing: str, size: int, histograms: IntArray, static: int, chosen: IntArray, us: Any
) -> Batch:
    common, _ = Counter(chosen.tolist()).most_common(1)[0]
    return Batch(
        tokens=size,
        routing=routing,
        active_experts=float(active_experts(histograms).mean()),
        static=Pick.of(model.candidates[static], us[:, static].mean()),
        retrofitted=Pick.of(model.candidates[common], us[np.arange(len(us)), chosen].mean()),
        best=None,
        steps=len(us),
        changed=float((chosen != static).mean()),
    )
