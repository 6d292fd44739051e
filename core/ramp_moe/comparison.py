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
    Summary,
    cross_validated_choices,
    nearest_batch_choices,
    regret,
    single_choices,
    static_choices,
    static_table,
    table_choice,
)
from .replay import Replay
from .routing import IntArray, active_experts, expert_histogram
from .trace import Trace

Mode = Literal["replay", "predicted"]


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
    stages_left_out: list[str]
    batches: list[Batch]
    baselines: Mapping[str, Summary]
    """Regret of each policy by name; empty where nothing was measured."""
    notes: list[str]

    def speedups(self) -> dict[str, float]:
        """Of retrofitted over static dispatch."""
        return _ratios([b.speedup for b in self.batches])

    def headroom(self) -> dict[str, float] | None:
        """Speed-ups of the best in hindsight over static dispatch: more than this no choice can gain."""
        best = [b.static.us / b.best.us for b in self.batches if b.best is not None]
        return _ratios(best) if best else None

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
            "speedup_over_static": self.speedups(),
            "best_over_static": self.headroom(),
            "notes": self.notes,
            "batches": [b.as_dict() for b in self.batches],
        }


def _ratios(values: Sequence[float]) -> dict[str, float]:
    v = np.array(values)
    return {"geomean": float(np.exp(np.log(v).mean())), "min": float(v.min()), "max": float(v.max())}


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
    chosen = {
        "retrofitted": cross_validated_choices(replay.histograms, lambda rows: replay.fit(rows, form)),
        "static": static_choices(times, labels),
        "nearest-batch table": nearest_batch_choices(times, labels),
        "one configuration": single_choices(times),
    }
    best = times.argmin(1)
    active = active_experts(replay.histograms)

    def pick(row: int, candidate: int) -> Pick:
        return Pick.of(candidates[candidate], times[row, candidate])

    batches = [
        Batch(
            tokens=tokens,
            routing=routing,
            active_experts=float(active[i]),
            static=pick(i, chosen["static"][i]),
            retrofitted=pick(i, chosen["retrofitted"][i]),
            best=pick(i, best[i]),
            changed=float(chosen["static"][i] != chosen["retrofitted"][i]),
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
        baselines={name: Summary.of(regret(times, choices)) for name, choices in chosen.items()},
        notes=[
            *replay.notes,
            "retrofitted choices are cross-validated; static is judged on the uniform batches it was tuned on",
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
    if (trace.num_experts, trace.top_k) != (shape.num_experts, shape.top_k):
        raise RoutingError(
            f"the trace names {trace.top_k} of {trace.num_experts} experts a token, "
            f"{shape.label} {shape.top_k} of {shape.num_experts}"
        )
    model = replay.fit(form=form)
    table = static_table(replay.times_us, replay.labels)
    batches, outside, total = [], 0, 0
    for routing, size, histograms in _trace_batches(trace):
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
        notes=notes,
    )


def _trace_batches(trace: Trace) -> Iterator[tuple[str, int, IntArray]]:
    """(kind, tokens, histograms) for the batch sizes that the trace is long enough for."""
    sizes: Sequence[tuple[str, int]] = [("decode", n) for n in DECODE_SIZES] + [("prefill", n) for n in PREFILL_SIZES]
    for kind, size in sizes:
        cut = trace.decode if kind == "decode" else trace.prefill
        try:
            ids = list(cut(size))
        except RoutingError:  # longer than the trace
            continue
        if ids:
            yield f"trace {kind}", size, np.stack([expert_histogram(b, trace.num_experts) for b in ids])


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
