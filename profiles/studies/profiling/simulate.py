"""Writes simulated.json: what short runs of `ramp-moe profile` would lose, by recorded sweeps. Needs no GPU.

    python simulate.py

The profiler itself runs, over a bench that answers with recorded times and a clock that counts what each call would
take. The shape's own profile is hidden from what the run knows beforehand. A configuration that the recorded run pruned
counts as PRUNED times the fastest of its kernel. The profile that the run writes then chooses for the recorded batches
to judge, and the recorded times say what each choice loses against the fastest configuration of all kernels.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ramp_moe import MoEShape, ProfileError, ProfileStore, Sweep
from ramp_moe.dispatch.load_model import load_model
from ramp_moe.measurements.sweep import PATH, path_key
from ramp_moe.profiler import pool, session
from ramp_moe.profiler.plan import PlannedBatch
from ramp_moe.profiler.prior import promising
from ramp_moe.profiler.session import profile
from ramp_moe.profiler.settings import Environment, Settings
from ramp_moe.spec.routing import IntArray, expert_histogram
from studies.shipped import h200, registry, store

HERE = Path(__file__).parent
SHAPES = ("deepseek-v3-tp8", "mixtral-8x7b-tp4", "olmoe-1b-7b", "qwen3-30b-a3b")
KERNELS = ("triton", "cute")
MINUTES = (0.5, 1.0, 1.5, 3.0, 10.0)
PRUNED = 1.3
NOISE = 0.005
START_S = 12.0
"""Seconds to start a process on the GPU: torch, and the weights."""
COMPILE_S: Mapping[str, float] = {"triton": 2.5, "cute": 4.0}
"""Seconds of one processor to compile a configuration."""
SIZES_S = 5.0
"""Seconds to compile what depends on sizes."""
WARMERS = 14
CHECK_S, OPEN_S, CALL_S, LAUNCH_US = 0.05, 0.05, 0.003, 120.0
"""Seconds of a check, of a new batch and of a call that times; microseconds of a launch beside the path's own."""


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Bench:
    """Answers with recorded times."""

    def __init__(self, shape: MoEShape, sweeps: Mapping[str, Sweep], clock: Clock) -> None:
        self._clock, self._rng = clock, np.random.default_rng(0)
        self._shape = shape
        self._us: dict[str, dict[bytes, dict[str, float]]] = {}
        for kernel, sweep in sweeps.items():
            keys = [c.key for c in sweep.record.columns]
            rows = zip(sweep.histograms, sweep.times_us, strict=True)
            self._us[kernel] = {h.tobytes(): dict(zip(keys, us.tolist(), strict=True)) for h, us in rows}

    def open(self, topk_ids: IntArray) -> None:
        self._clock.now += OPEN_S
        self._row = expert_histogram(topk_ids, self._shape.num_experts).tobytes()

    def check(self, kernel: str, config: str) -> None:
        self._clock.now += CHECK_S + COMPILE_S[kernel] / WARMERS

    def time(self, kernel: str, config: str, launches: int, patience_us: float) -> list[float]:
        us = self._of(kernel, config)
        count = 1 if us > patience_us else launches
        self._clock.now += CALL_S + count * (us + LAUNCH_US) * 1e-6
        return [float(us * np.exp(NOISE * z)) for z in self._rng.standard_normal(count)]

    def _of(self, kernel: str, config: str) -> float:
        times = self._us[kernel][self._row]
        us = times.get(path_key(kernel, config), np.nan)
        return us if np.isfinite(us) else PRUNED * float(np.nanmin(list(times.values())))


def simulated(name: str, minutes: float, informed: bool) -> dict[str, Any]:
    """One run. informed: it measures what other shapes' profiles say to be promising; else everything."""
    shape = registry.shape(name, "fp8")
    sweeps = {k: found[1].only([PATH]) for k in KERNELS if (found := store.find(k, shape, h200))}
    kernels = [registry.kernel(k) for k in sweeps]
    batches = _shared(list(sweeps.values()))
    clock = Clock()
    clock.now = 0.0
    bench = Bench(shape, sweeps, clock)
    only = promising(shape, h200, kernels, store, minutes)[0] if informed else None
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(minutes, Path(folder), stages=False, warmers=1)
        environment = Environment("NVIDIA H200", "simulated", "GPU-00000000", {})
        began, replaced = session.time, pool.Worker
        session.time, pool.Worker = clock, lambda make: _Local(bench, clock)  # type: ignore[assignment,misc]
        try:
            result = profile(shape, h200, kernels, settings, environment, lambda: bench, _Silent(), batches, only)
        finally:
            session.time, pool.Worker = began, replaced  # type: ignore[misc]
        lost = _lost(shape, Path(folder), sweeps)
    return {
        "shape": shape.label, "minutes": minutes, "informed": informed, "seconds": round(clock.now, 1),
        "configurations": sum(p.configs + len(p.pruned) for p in result.profiles), "batches": result.batches,
        "mean_regret": round(float(lost.mean()), 4), "worst_regret": round(float(lost.max()), 4),
    }  # fmt: skip


class _Local:
    """Stands in for the process that measures."""

    def __init__(self, bench: Bench, clock: Clock) -> None:
        self._bench = bench
        clock.now += START_S + SIZES_S

    def call(self, method: str, *args: Any, timeout: float) -> Any:
        return getattr(self._bench, method)(*args)

    def close(self) -> None:
        pass


class _Silent:
    def phase(self, name: str, steps: int) -> None:
        pass

    def at(self, done: int, doing: str, spent: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def _shared(sweeps: list[Sweep]) -> list[PlannedBatch]:
    """The batches that all sweeps have, in the first one's order."""
    rows = [{(b.num_tokens, b.routing, b.seed, b.split) for b in s.record.batches} for s in sweeps]
    return [
        PlannedBatch(b.num_tokens, b.routing, b.seed, b.split)
        for b in sweeps[0].record.batches
        if b.seed is not None and all((b.num_tokens, b.routing, b.seed, b.split) in known for known in rows)
    ]


def _lost(shape: MoEShape, folder: Path, sweeps: Mapping[str, Sweep]) -> Any:
    """The regret of each recorded batch to judge."""
    model, _ = load_model(registry, ProfileStore([folder]), shape, h200, list(sweeps))
    judged = [b for b in _shared(list(sweeps.values())) if b.split == "test"]
    lost = []
    for batch in judged:
        h = batch.histogram(shape)
        best, chosen = np.inf, model.candidates[model.choose(h)[0]]
        taken = np.nan
        for kernel, sweep in sweeps.items():
            row = next(i for i, other in enumerate(sweep.histograms) if (other == h).all())
            us = dict(zip([c.key for c in sweep.record.columns], sweep.times_us[row].tolist(), strict=True))
            best = min(best, float(np.nanmin(list(us.values()))))
            if chosen.kernel == kernel:
                found = us.get(path_key(kernel, chosen.config.name), np.nan)
                taken = found if np.isfinite(found) else PRUNED * float(np.nanmin(list(us.values())))
        lost.append(taken / best - 1)
    return np.array(lost)


def main() -> None:
    runs = []
    for name in SHAPES:
        for minutes in MINUTES:
            for informed in (False, True):
                try:
                    runs.append(simulated(name, minutes, informed))
                except ProfileError as e:
                    runs.append({"shape": name, "minutes": minutes, "informed": informed, "error": str(e)})
                print(json.dumps(runs[-1]), flush=True)
    (HERE / "simulated.json").write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
