"""Measure, on this machine's GPU, what each optimisation of the Triton path gains. Writes one file per model beside
this script.

    python -m studies.regions.measure [--models NAME ...]

A model whose file exists is skipped, so the same command resumes after an interruption. --models splits the work over
several GPUs (CUDA_VISIBLE_DEVICES). Each cell (tokens x routing) times every configuration of `paths` through the
library's bench: whole paths in a CUDA graph with a cold L2, in interleaved rounds, the median of at least 20 launches.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path as File
from typing import Any, Protocol

import msgspec
from ramp_moe import Candidate, Hardware, KernelError, MoEShape, generate, get_registry
from ramp_moe.measurements.json_file import write_atomically
from ramp_moe.profiler.gpu import gpu_state
from ramp_moe.profiler.pool import Warmers
from ramp_moe.profiler.settings import Settings, default_warmers
from ramp_moe.registry.detect import detect
from ramp_moe_kernels.triton.config import GemmConfig, Path, invalid_path
from ramp_moe_kernels.triton.kernel import TritonMoE

HERE = File(__file__).parent

STUDIED = (
    "olmoe-1b-7b",
    "qwen3-30b-a3b",
    "qwen3-next-80b",
    "qwen2-57b-a14b",
    "deepseek-v3-tp8",
    "glm-4.5-tp4",
    "mixtral-8x7b",
    "mixtral-8x22b",
)
HELD_OUT = ("llama-4-scout", "kimi-k2-tp8", "phi-3.5-moe")
"""Models that were predicted first (`predictions.json`) and measured after. The first has experts far larger than L2.
The second has a deep reduction for few CTAs. An expert of the third just fits L2."""
MODELS = (*STUDIED, *HELD_OUT)
DTYPE = "fp8"

CELLS = (
    (1, "uniform"),  # k experts with one token each, whatever the routing
    *itertools.product((8, 64, 512, 2048), ("uniform", "zipf1.2")),
)
SEED = 1
LAUNCHES, ROUND = 20, 5
KINDS = ("sum", "direct", "atomic")
SPLIT_TOKENS = 64
"""Largest batch on which split-K, and the paths that go with it, are tried. Larger batches keep all SMs busy."""


def paths(shape: MoEShape, hardware: Hardware) -> list[Path]:
    """The configurations that are compared. All token blocks take part, each with and without GROUP_M and the wide
    tile. Token block 16 also takes part in every kind of path, with and without split-K.

    The optimisations are varied in the up projection, for which the regions are stated. The other parameters have the
    values that win most often."""

    def path(block: int, rows: int, group_m: int = 1, split_k: int = 1, kind: str = "sum") -> Path:
        swap, warps, atomic = block <= 32, 8 if block == 128 else 4, kind == "atomic"
        up = GemmConfig(block, rows, 128, warps, 3, group_m, split_k, swap and rows >= 64)
        down = GemmConfig(block, 128, 128, warps, 3, group_m, 4 if atomic else 1, swap)
        return Path(up, down, kind == "direct", atomic)

    grid = [path(*given) for given in itertools.product((16, 32, 64, 128), (64, 128), (1, 8))]
    small = [path(16, rows, 1, sk, kind) for rows, sk, kind in itertools.product((32, 64, 128), (1, 4), KINDS)]
    return [p for p in dict.fromkeys([*grid, *small]) if invalid_path(p, shape, hardware) is None]


class StudiedTriton(TritonMoE):
    """The Triton path with the configurations of the study."""

    def paths(self, shape: MoEShape, hardware: Hardware) -> list[Path]:
        return paths(shape, hardware)


class Timer(Protocol):
    """The part of `profiler.bench.Bench` that measuring needs."""

    def open(self, topk_ids: Any) -> None: ...

    def time(self, kernel: str, config: str, launches: int) -> list[float]: ...


def make_bench(model: str, hardware: str) -> Any:
    """A bench of the study's configurations, for this process or for one that compiles."""
    from ramp_moe.profiler.bench import Bench

    registry = get_registry()
    return Bench(registry.shape(model, DTYPE), registry.device(hardware), [StudiedTriton()])


def compile_all(model: str, hardware: Hardware) -> None:
    """Compile every configuration, in many processes. They share Triton's cache on disk. Other models mostly need the
    same kernels, so one model suffices. Raises KernelError if a configuration does not compile."""
    shape = get_registry().shape(model, DTYPE)
    ids = generate("uniform", 8, shape.num_experts, shape.top_k, SEED)
    tasks = [(ids, Candidate("triton", c)) for c in StudiedTriton().configs(shape, hardware)]
    bench = functools.partial(make_bench, model, hardware.name)
    warmers = Warmers(bench, tasks, default_warmers(), Settings.first_call_s, Settings.call_s)
    for candidate, reason in warmers.outcomes():
        if reason is not None:
            raise KernelError(f"{candidate.name} cannot be compiled: {reason}")


def measure(bench: Timer, shape: MoEShape, hardware: Hardware, tokens: int, routing: str) -> dict[str, Any]:
    """One cell: the parameters that vary, and the median microseconds, for each path."""
    bench.open(generate(routing, tokens, shape.num_experts, shape.top_k, SEED))
    few = tokens <= SPLIT_TOKENS
    tried = [p for p in paths(shape, hardware) if few or not (p.direct or p.atomic or p.up.split_k > 1)]
    times: dict[Path, list[float]] = {p: [] for p in tried}
    while left := [p for p in tried if len(times[p]) < LAUNCHES]:  # a call gives fewer launches of a long path
        for p in left:
            times[p] += bench.time("triton", p.name, ROUND)
    return {
        "tokens": tokens,
        "routing": routing,
        "paths": [
            {
                "block": p.up.block_m,
                "rows": p.up.block_n,
                "group_m": p.up.group_m,
                "split_k": p.up.split_k,
                "direct": p.direct,
                "atomic": p.atomic,
                "us": round(statistics.median(us), 2),
            }
            for p, us in times.items()
        ],
    }


def about(hardware: Hardware) -> dict[str, Any]:
    """The machine, software and method, as the file records them."""
    import torch
    import triton

    state = gpu_state()
    return {
        "device": hardware.name,
        "device_name": state.name,
        "gpu": state.uuid[:12],
        "driver": state.driver,
        "software": {"torch": str(torch.__version__), "triton": triton.__version__},
        "kernel": f"triton {TritonMoE().version()}",
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": " ".join((__doc__ or "").split("Each cell")[1].split()),
    }


def main(models: Sequence[str]) -> None:
    hardware = detect()
    left = [m for m in models if not (HERE / f"{m}.json").exists()]
    if left:
        compile_all(left[0], hardware)
    for model in left:
        shape, bench = get_registry().shape(model, DTYPE), make_bench(model, hardware.name)
        cells = [measure(bench, shape, hardware, tokens, routing) for tokens, routing in CELLS]
        record = {"model": model, "dtype": DTYPE, **about(hardware), "seed": SEED, "cells": cells}
        write_atomically(HERE / f"{model}.json", layout(record))
        print(f"{model}: {len(cells)} cells", flush=True)


def layout(record: dict[str, Any]) -> bytes:
    """JSON with one line per cell."""
    cells = b",\n".join(b"  " + msgspec.json.encode(c) for c in record["cells"])
    head = msgspec.json.encode({k: v for k, v in record.items() if k != "cells"})
    return head[:-1] + b',"cells":[\n' + cells + b"\n]}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="measure only these models")
    main(parser.parse_args().models)
