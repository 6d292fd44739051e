"""Kernels without code, and a bench that simulates them. A spawned process can import this module.

Run as a script with the path of a pickled `Call`, it profiles the kernels, so that a test can kill the run.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ramp_moe import GridGeometry, Hardware, KernelConfig, MoEShape, Registry, Stage, WeightLayout
from ramp_moe.profiler.plan import PlannedBatch
from ramp_moe.profiler.session import profile
from ramp_moe.profiler.settings import Environment, Result, Settings
from ramp_moe.profiler.worker import Failed
from ramp_moe.spec.launchable import LaunchableKernel
from ramp_moe.spec.routing import expert_histogram

SHAPE = MoEShape(8, 2, 256, 128, "bf16", "tiny")
HARDWARE = Registry(load_entry_points=False).device("h200")
ROUTINGS = ("uniform", "zipf1.2", "one-hot")
BATCHES = [
    PlannedBatch(n, ROUTINGS[i % 3], i, "test" if i in (5, 9) else "tune")
    for i, n in enumerate((64, 1, 512, 8, 2, 48, 4, 16, 32, 96, 128, 256))
]
"""The planned batches. The eighth tune batch has index 8."""

SLOW = 4.0
COUNT = itertools.count()
"""Counts the benches of a process, so that no two draw the same noise."""


class Simulated(LaunchableKernel):
    """A kernel with six configurations of two token blocks. A "slow" one takes SLOW times as long as its fast twin, on
    every batch."""

    def __init__(self, name: str = "sim", version: str = "1", slower: float = 1.0) -> None:
        self.name, self._version, self.slower = name, version, slower

    def version(self) -> str:
        return self._version

    def configs(self, shape: MoEShape, hardware: Hardware) -> Sequence[KernelConfig]:
        return [self._config(shape, block, kind) for block in (16, 64) for kind in ("a", "b", "slow")]

    @functools.cache  # noqa: B019 - a few objects in a test
    def _config(self, shape: MoEShape, block: int, kind: str) -> KernelConfig:
        grid = GridGeometry.fused(shape, block_m=block, block_n=64, block_k=64)
        name = f"bm{block}-{kind}"
        stages = (
            Stage("schedule", f"schedule/bm{block}"),
            Stage("gemm", f"{self.name}/{name}", grid),
            Stage("combine", "combine"),
        )
        return KernelConfig(name, stages, (("block", block), ("kind", kind)))

    def weight_layout(self, shape: MoEShape) -> WeightLayout:
        return WeightLayout("gate-first", shape.num_experts * shape.expert_bytes)

    def default_config(self, shape: MoEShape, hardware: Hardware, num_tokens: int) -> KernelConfig:
        return self._config(shape, 16, "a") if num_tokens < 8192 else self._config(shape, 64, "slow")

    def prepare(self, weights: Any) -> Any:
        raise AssertionError

    def run(self, config: Any, prepared: Any, batch: Any, out: Any, workspace: Any) -> None:
        raise AssertionError

    def stage_us(self, config: KernelConfig, histogram: Any) -> dict[str, float]:
        """Microseconds of each stage on a batch."""
        factor = {"a": 1.0, "b": 1.1, "slow": SLOW}[str(dict(config.params)["kind"])] * self.slower
        gemm = config.stages[1].geometry
        assert gemm is not None
        us = 5 + gemm.block_m / 8 + 0.25 * int(gemm.logical(histogram))
        return {
            config.stages[0].key: 2.0,
            config.stages[1].key: factor * us,
            "combine": 1 + int(histogram.sum()) / 1000,
        }

    def path_us(self, config: KernelConfig, histogram: Any) -> float:
        return 0.5 + sum(self.stage_us(config, histogram).values())


@dataclass(frozen=True)
class Script:
    """The behaviour of the simulation. Each call is logged as a line of JSON. `acts` gives the failures by
    METHOD/CONFIG, or by METHOD/CONFIG/TOKENS for batches of that size."""

    log: Path
    acts: dict[str, str] = field(default_factory=dict)
    noise: float = 0.0
    delay_s: float = 0.0
    stageless: bool = False


class SimulatedBench:
    def __init__(self, script: Script, kernels: Sequence[Simulated]) -> None:
        if "make" in script.acts:
            raise MemoryError(script.acts["make"])
        self.script = script
        self.kernels = {k.name: k for k in kernels}
        self.answers = True
        self.rng = np.random.default_rng(next(COUNT))

    def open(self, topk_ids: Any) -> None:
        self.histogram = expert_histogram(topk_ids, SHAPE.num_experts)
        self._called("open", "")

    def healthy(self) -> bool:
        return self.answers

    def warm(self, kernel: str, config: str) -> None:
        self._called("warm", config, kernel)

    def check(self, kernel: str, config: str) -> None:
        self._called("check", config, kernel)

    def time(self, kernel: str, config: str, launches: int, patience_us: float) -> list[float]:
        self._called("time", config, kernel, patience_us=patience_us)
        found = self._find(kernel, config)
        us = self._noisy(self.kernels[kernel].path_us(found, self.histogram), launches)
        return us[:1] if us[0] > patience_us else us

    def time_stages(self, kernel: str, config: str, launches: int) -> dict[str, list[float]]:
        self._called("time_stages", config, kernel)
        if self.script.stageless:
            return {}
        found = self._find(kernel, config)
        stages = self.kernels[kernel].stage_us(found, self.histogram)
        return {key: self._noisy(us, launches) for key, us in stages.items()}

    def _find(self, kernel: str, config: str) -> KernelConfig:
        return next(c for c in self.kernels[kernel].configs(SHAPE, HARDWARE) if c.name == config)

    def _noisy(self, us: float, launches: int) -> list[float]:
        return (
            (us * self.rng.lognormal(0, self.script.noise, launches)).tolist() if self.script.noise else [us] * launches
        )

    def _called(self, method: str, config: str, kernel: str = "", **given: float) -> None:
        batch = "-".join(map(str, self.histogram))
        call = {"pid": os.getpid(), "method": method, "kernel": kernel, "config": config, "batch": batch} | given
        with self.script.log.open("a") as f:
            f.write(json.dumps(call) + "\n")
        if self.script.delay_s:
            time.sleep(self.script.delay_s)
        acts, tokens = self.script.acts, int(self.histogram.sum()) // SHAPE.top_k
        act = acts.get(f"{method}/{config}/{tokens}", acts.get(f"{method}/{config}"))
        if act == "raises":
            raise ValueError("wrong by far")
        if act == "breaks the context":
            self.answers = False
            raise RuntimeError("an illegal memory access was encountered")
        if act == "exits":
            os._exit(3)
        if act == "hangs":
            time.sleep(600)
        if act == "kills the run":
            os.kill(os.getppid(), signal.SIGKILL)


def make_bench(script: Script, shape: MoEShape, hardware: str, kernels: Sequence[str]) -> Any:
    """Make a bench. Replaces the function of the command line."""
    assert (shape, hardware) == (SHAPE, HARDWARE.name)
    return SimulatedBench(script, [Simulated(k) for k in kernels])


class Here:
    """A worker without a process, which starts at once, for tests that need no process."""

    def __init__(self, make_bench: Callable[[], SimulatedBench]) -> None:
        self.bench = make_bench()

    def call(self, method: str, *args: Any, timeout: float) -> Any:
        try:
            return getattr(self.bench, method)(*args)
        except Exception as e:
            raise Failed(f"{type(e).__name__}: {e}", self.bench.healthy()) from None

    def close(self) -> None:
        pass


class Silent:
    """Progress that is kept for a test to read."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int]] = []
        self.notes: list[str] = []

    def phase(self, name: str, steps: int) -> None:
        self.phases.append((name, steps))

    def at(self, done: int, doing: str, spent: float) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


ENVIRONMENT = Environment("NVIDIA H200", "580.1", "GPU-00000000", {"torch": "2.9"})


@dataclass(frozen=True)
class Call:
    """One profiling run of simulated kernels."""

    script: Script
    settings: Settings
    kernels: tuple[Simulated, ...] = (Simulated(),)
    environment: Environment = ENVIRONMENT
    batches: Sequence[PlannedBatch] = tuple(BATCHES)
    only: Mapping[str, Collection[str]] | None = None

    def run(self, progress: Silent | None = None) -> Result:
        return profile(
            SHAPE,
            HARDWARE,
            self.kernels,
            self.settings,
            self.environment,
            functools.partial(SimulatedBench, self.script, self.kernels),
            progress or Silent(),
            self.batches,
            self.only,
        )

    def calls(self) -> list[dict[str, Any]]:
        """The calls of the benches, in order."""
        return [json.loads(line) for line in self.script.log.read_text().splitlines()]


def settings(folder: Path, **changes: Any) -> Settings:
    return replace(Settings(60, folder, warmers=1, first_call_s=20, call_s=20), **changes)


if __name__ == "__main__":
    # By its module's name, so that what is pickled has one class in every process.
    import simulated_bench

    call: simulated_bench.Call = pickle.loads(Path(sys.argv[1]).read_bytes())
    call.run()
