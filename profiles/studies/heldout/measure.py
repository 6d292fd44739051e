"""Measure dispatch from the shipped profiles, and its rivals, on routings that no profile has seen. Runs on this
machine's GPU, and writes one file per model beside this script.

    python -m studies.heldout.measure [--models NAME ...] [--dtype D] [--kernel NAME ...] [--trace FILE] [--minutes N]

For each number of tokens, every configuration of the kernels' profiles is timed on two tune draws of each kind of
routing. Some configurations are kept: those that dispatch chooses on any draw, for one kernel or for all together, and
each kernel's four fastest on each of these draws and over all of them. A group is a number of tokens and a kind. The
kept configurations are timed on every draw of a group through the library's bench. It times whole paths in a CUDA graph
with a cold L2. Every configuration has two halves of at least 20 launches, five at a time, interleaved. A half's time
is its median. A group is stored once it is measured, so the same command resumes after an interruption. No group is
begun after --minutes, counted per model.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from ramp_moe import (
    Candidate,
    Dispatcher,
    KernelError,
    MoEShape,
    ProfileError,
    ProfileStore,
    Trace,
    expert_histogram,
    generate,
    get_registry,
    load_trace,
)
from ramp_moe.cli.gpu import Setup, choose_kernels, find_gpu, recorded_kernels, set_up
from ramp_moe.measurements.json_file import write_atomically
from ramp_moe.profiler.pool import Measurer, Warmers
from ramp_moe.profiler.pruning import cover
from ramp_moe.profiler.settings import Settings
from ramp_moe.spec.routing import FloatArray, IntArray
from studies.heldout.draws import TOKENS, Draw, draws, kinds

HERE = Path(__file__).parent
MODELS = ("olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "mixtral-8x7b-tp4")
DTYPES = ("fp8", "bf16")
HALVES, LAUNCHES, ROUND = 2, 20, 5
SCREENED = 2
"""Draws of each kind on which all configurations are timed, with ROUND launches each."""
NEAREST = 4
"""Configurations of each kernel that are kept from a screened draw."""

Record = dict[str, Any]


class Study:
    """The measurements of one model: its dispatchers, its file, and a bench in a separate process."""

    def __init__(
        self, model: str, dtype: str, device: str, kernels: Sequence[str], setup: Setup, trace: Trace | None
    ) -> None:
        joint = Dispatcher.for_model(model, device, kernels, dtype)
        alone = [Dispatcher.for_model(model, device, [k], dtype) for k in kernels]
        self.dispatchers = [joint, *alone] if len(kernels) > 1 else alone
        self.shape: MoEShape = joint.model.shape
        self.candidates = {c.name: c for c in joint.model.candidates}
        self.trace, self.path = trace, path_of(HERE, model, dtype)
        self.measurer = Measurer(setup.make_bench, Settings.call_s)
        self.setup = setup
        versions = {k: get_registry().kernel(k).version() for k in kernels}
        fresh: Record = {
            "model": model, "dtype": dtype, "device": device, "kernels": versions,
            "profiles": list(joint.model.measured), "method": " ".join((__doc__ or "").split("\n\n")[2].split()),
            "runs": [], "sizes": [], "groups": [],
        }  # fmt: skip
        self.record: Record = msgspec.json.decode(self.path.read_bytes()) if self.path.exists() else fresh
        if changed := [k for k in ("dtype", "device", "kernels", "profiles") if self.record[k] != fresh[k]]:
            raise ProfileError(f"{self.path} was measured with other {' and '.join(changed)}; move it away")

    def todo(self) -> list[tuple[int, str]]:
        """The groups (tokens, kind) that are not measured yet. If more kinds are planned for a size than when its
        configurations were kept, all groups of that size are measured again."""
        planned = {tokens: kinds(tokens, self.shape, self.trace) for tokens in TOKENS}
        sizes = [s for s in self.record["sizes"] if set(s["kinds"]).issuperset(planned[s["tokens"]])]
        known = {s["tokens"] for s in sizes}
        self.record["sizes"], found = sizes, self.record["groups"]
        self.record["groups"] = [g for g in found if g["tokens"] in known]
        done = {(g["tokens"], g["kind"]) for g in self.record["groups"]}
        return [(t, kind) for t, of_size in planned.items() for kind in of_size if (t, kind) not in done]

    def run(self, minutes: float) -> None:
        """Measure the groups that are left, until the time is over."""
        began = time.monotonic()
        left = self.todo()
        if not left:
            return
        environment = msgspec.to_builtins(self.setup.environment)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.record["runs"].append({"measured": now, **environment})
        failed = self.warm()
        for i, (tokens, kind) in enumerate(left):
            spent = time.monotonic() - began
            if spent >= 60 * minutes:
                say(f"{self.path.stem}: out of time, {len(left) - i} groups left: the same command goes on")
                return
            say(f"{self.path.stem}: {tokens} tokens, {kind}, {i} of {len(left)} groups, {spent:.0f} s", "\r")
            kept = [self.candidates[name] for name in self.kept(tokens, failed)]
            found = [self.measured(tokens, i, draw, kept) for i, draw in enumerate(self.draws(tokens, kind))]
            group = {"tokens": tokens, "kind": kind, "run": len(self.record["runs"]) - 1, "draws": found}
            self.record["groups"].append(group)
            self.record["runs"][-1]["seconds"] = round(time.monotonic() - began, 1)
            write_atomically(self.path, layout(self.record))
        say(f"{self.path.stem}: {len(left)} groups in {time.monotonic() - began:.0f} s")

    def draws(self, tokens: int, kind: str) -> list[Draw]:
        return draws(kind, tokens, self.shape, self.trace)

    def histogram(self, draw: Draw) -> IntArray:
        return expert_histogram(draw.topk_ids, self.shape.num_experts)

    def warm(self) -> set[str]:
        """Compile in many processes, which share the compilers' caches, and return the names that do not compile. Every
        configuration is compiled once. Stages other than GEMMs are compiled for each size of batch."""
        ids = {n: generate("uniform", n, self.shape.num_experts, self.shape.top_k) for n in TOKENS}
        others = {n: {s.key for s in c.config.stages if s.kind != "gemm"} for n, c in self.candidates.items()}
        tasks = [(ids[TOKENS[-1]], c) for c in self.candidates.values()]
        tasks += [(ids[n], self.candidates[name]) for name in cover(others) for n in TOKENS]
        say(f"{self.path.stem}: compiling {len(self.candidates)} configurations", "\r")
        failed = set()
        warmers = Warmers(self.setup.make_bench, tasks, self.setup.warmers, Settings.first_call_s, Settings.call_s)
        with contextlib.closing(warmers.outcomes()) as outcomes:
            for candidate, reason in outcomes:
                if reason is not None:
                    say(f"{candidate.name} left out: {reason}")
                    failed.add(candidate.name)
        return failed

    def kept(self, tokens: int, failed: Iterable[str]) -> list[str]:
        """Names of the configurations to time on all draws of a number of tokens, of any kind."""
        for size in self.record["sizes"]:
            if size["tokens"] == tokens:
                return list(size["configs"])
        planned = kinds(tokens, self.shape, self.trace)
        everything = [self.draws(tokens, kind) for kind in planned]
        histograms = [self.histogram(draw) for found in everything for draw in found]
        names = {d.choose(h, tokens).candidate.name for d in self.dispatchers for h in histograms}
        if lost := names.intersection(failed):
            raise KernelError(f"{min(lost)}, which dispatch chooses, cannot be compiled")
        live = [c for c in self.candidates.values() if c.name not in failed]
        us = np.array([self.screened(d, live) for found in everything for d in found[:SCREENED]])
        for kernel in {c.kernel for c in live}:
            own = [i for i, c in enumerate(live) if c.kernel == kernel]
            for row in (*us, np.exp(np.log(us).mean(0))):
                names |= {live[i].name for i in sorted(own, key=row.__getitem__)[:NEAREST]}
        configs = [name for name in self.candidates if name in names]
        self.record["sizes"].append({"tokens": tokens, "kinds": planned, "configs": configs})
        return configs

    def screened(self, draw: Draw, live: Sequence[Candidate]) -> FloatArray:
        """Microseconds of each candidate `[candidates]`, the median of one round of launches."""
        self.measurer.open(draw.topk_ids)
        return np.array([statistics.median(self.time(c)) for c in live])

    def measured(self, tokens: int, number: int, draw: Draw, kept: Sequence[Candidate]) -> Record:
        """One draw, with the microseconds of each candidate in each half."""
        self.measurer.open(draw.topk_ids)
        rng = np.random.default_rng((tokens, number))
        times: dict[tuple[int, str], list[float]] = {(half, c.name): [] for half in range(HALVES) for c in kept}
        while any(len(us) < LAUNCHES for us in times.values()):  # a call gives fewer launches of a long path
            for half, i in itertools.product(range(HALVES), rng.permutation(len(kept)).tolist()):
                if len(times[half, kept[i].name]) < LAUNCHES:
                    times[half, kept[i].name] += self.time(kept[i])
        return {
            "split": draw.split,
            "seed": draw.seed,
            "histogram": self.histogram(draw).tolist(),
            "us": [[round(statistics.median(times[half, c.name]), 2) for c in kept] for half in range(HALVES)],
        }

    def time(self, candidate: Candidate) -> list[float]:
        us: list[float] = self.measurer.call("time", candidate, ROUND, math.inf, timeout=Settings.first_call_s)
        return us


def path_of(folder: Path, model: str, dtype: str) -> Path:
    return folder / f"{model}-{dtype}.json"


def say(text: str, end: str = "\n") -> None:
    """Print a line of progress. On a terminal, a line that ends in a carriage return is replaced by the next."""
    terminal = sys.stderr.isatty()
    print(f"\r\033[K{text}" if terminal else text, end=end if terminal else "\n", file=sys.stderr, flush=True)


def layout(record: Record) -> bytes:
    """JSON with one line per draw."""

    def lines(entries: Iterable[bytes]) -> bytes:
        return b"[\n" + b",\n".join(entries) + b"\n]"

    def groups() -> Iterator[bytes]:
        for group in record["groups"]:
            head = msgspec.json.encode({k: v for k, v in group.items() if k != "draws"})
            yield head[:-1] + b',"draws":' + lines(map(msgspec.json.encode, group["draws"])) + b"}"

    head = msgspec.json.encode({k: v for k, v in record.items() if k not in ("sizes", "groups")})
    sizes = lines(map(msgspec.json.encode, record["sizes"]))
    return head[:-1] + b',\n"sizes":' + sizes + b',\n"groups":' + lines(groups()) + b"}\n"


def main(models: Sequence[str], dtype: str, kernels: Sequence[str], trace: Path | None, minutes: float) -> None:
    registry, recorded = get_registry(), None if trace is None else load_trace(trace)
    store = ProfileStore(shipped=registry.profile_dirs)
    for model in models:
        shape = registry.shape(model, dtype)
        state, hardware = find_gpu(registry)
        there, left_out = recorded_kernels(registry, store, shape, hardware)
        chosen, not_here = choose_kernels(registry, kernels, there, shape, hardware)
        for note in (*left_out, *not_here):
            say(f"{model}: {note}")
        setup = set_up(shape, hardware, state, chosen, max(TOKENS), say)
        study = Study(model, dtype, hardware.name, [k.name for k in chosen], setup, recorded)
        try:
            study.run(minutes)
        finally:
            study.measurer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="measure only these models")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="dtype of weights (default: %(default)s)")
    parser.add_argument("--kernel", action="append", default=[], help="measure only this kernel; may be repeated")
    parser.add_argument("--trace", type=Path, help="recorded routing, for models with as many experts")
    parser.add_argument("--minutes", type=float, default=3.0, help="time per model (default: %(default)s)")
    options = parser.parse_args()
    main(options.models, options.dtype, options.kernel, options.trace, options.minutes)
