"""Time the Triton path's best configuration on every cell of peers_h200.json, on this machine's GPU.

    python triton_path.py fp8 OUTPUT.json [SECONDS]

In each cell, every plausible configuration of each GEMM is timed alone (median of 3 launches). The most promising pairs
are then timed as whole paths in a CUDA graph, from top-k ids to the combined bf16 output. The time is the median of 20
replays, each between two CUDA events, after 256 MiB were written to flush L2. torch grouped_mm is timed the same way in
the same run, so that figures of another day or machine can be scaled. Weights are random: bf16, or e4m3 with [128, 128]
scales.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path as File
from typing import Any

import torch
import triton
from ramp_moe import MoEShape, get_registry
from ramp_moe.profiler.bench import random_weights
from ramp_moe.spec.launchable import Batch, MoEWeights, Workspace
from ramp_moe_kernels.triton import ops
from ramp_moe_kernels.triton.config import GemmConfig, Path, invalid_path, quantises_itself, space
from ramp_moe_kernels.triton.kernel import TritonMoE
from ramp_moe_kernels.triton.schedule import allocate, schedule

MODELS = {"olmoe": "olmoe-1b-7b", "qwen3": "qwen3-30b-a3b", "dsv3tp8": "deepseek-v3-tp8", "mixtral": "mixtral-8x7b"}
TOKENS, ROUTINGS = (1, 8, 32, 128, 512, 2048), ("uniform", "alpha0.5", "zipf1.2")
FINALISTS = 7
DEVICE = torch.device("cuda")
HARDWARE = get_registry().device("h200")


def routing(kind: str, tokens: int, shape: MoEShape) -> tuple[torch.Tensor, torch.Tensor]:
    """The top-k ids and weights that the peers were measured on (torch's CPU generator, seed 1)."""
    g = torch.Generator().manual_seed(1)
    p = torch.ones(shape.num_experts)
    if kind == "alpha0.5":  # half the probability on one expert, drawn with replacement
        p = 0.5 * p / shape.num_experts
        p[0] += 0.5
        ids = torch.multinomial(p, tokens * shape.top_k, replacement=True, generator=g).view(tokens, shape.top_k)
    else:
        if kind == "zipf1.2":
            p = torch.arange(1, shape.num_experts + 1).float() ** -1.2
        ids = torch.multinomial(p.expand(tokens, -1).contiguous(), shape.top_k, generator=g)
    return ids, torch.softmax(torch.randn(tokens, shape.top_k, generator=g), -1)


_flush: list[torch.Tensor] = []


def median_us(launch: Callable[[], Any], repeats: int) -> float:
    if not _flush:
        _flush.append(torch.empty(256 * 2**20, dtype=torch.int8, device=DEVICE))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        _flush[0].zero_()
        start.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return round(statistics.median(start.elapsed_time(end) * 1000 for start, end in events), 2)


def graph_us(launch: Callable[[], Any]) -> float:
    """Median microseconds of replays of a graph of the launch, which runs twice before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launch()
        launch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return median_us(graph.replay, 20)


class Stages:
    """One batch's buffers for one token block, with the contents that the launches before would write."""

    def __init__(self, weights: MoEWeights, batch: Batch, block: int, direct: bool) -> None:
        experts, hidden, inter = weights.down.shape
        n, top_k = batch.topk_ids.shape[0] * batch.top_k, batch.top_k
        self.weights, self.batch, self.n, self.top_k = weights, batch, n, top_k
        self.fp8 = ops.is_fp8(weights)
        self.x, self.x_scale, quantise = batch.hidden_states, None, None
        if self.fp8 and not direct:
            self.x = torch.empty(batch.num_tokens, hidden, dtype=torch.float8_e4m3fn, device=DEVICE)
            self.x_scale = torch.empty(batch.num_tokens, hidden // 128, device=DEVICE)
            quantise = (batch.hidden_states, self.x, self.x_scale)
        self.tiling, self.tiles, self.direct = ops.Tiling(None, batch.topk_ids), n, direct
        if not direct:
            plan = allocate(n, experts, block, DEVICE)
            schedule(batch.topk_ids, experts, block, plan, quantise=quantise)
            self.tiling, self.tiles = ops.Tiling(plan.sorted_token_ids, plan.expert_ids), plan.expert_ids.numel()
        self.act = torch.randn(n, inter, device=DEVICE).to(batch.hidden_states.dtype)
        self.act_fp8 = self.act.to(torch.float8_e4m3fn) if self.fp8 else None
        self.act_scale = torch.rand(n, inter // 128, device=DEVICE) if self.fp8 else None
        self.partial = torch.empty(4 if batch.num_tokens <= 8 else 1, n, 2 * inter, device=DEVICE)
        self.rows = torch.empty(1, n, hidden, dtype=batch.hidden_states.dtype, device=DEVICE)
        self.total = torch.zeros(batch.num_tokens, hidden, device=DEVICE)

    def up(self, c: GemmConfig) -> None:
        quantised = self.fp8 and quantises_itself(c)
        gemm = ops.up_gemm([c], [self.tiles], self.weights, False, self.direct, quantised)
        given = (gemm, self.x, self.x_scale, self.weights, self.tiling, self.n, self.top_k)
        if c.split_k > 1:
            ops.up(*given, self.partial, None)
            ops.activate(self.partial, self.weights, self.batch.topk_ids, self.act)
        else:
            ops.up(*given, self.act_fp8 if quantised else self.act, self.act_scale if quantised else None)

    def down(self, c: GemmConfig, quantised: bool) -> None:
        act, scale = (self.act_fp8, self.act_scale) if quantised else (self.act, None)
        atomic = c.split_k > 1
        gemm = ops.down_gemm([c], [self.tiles], self.weights, False, self.direct, quantised, atomic)
        topk_weights, out = self.batch.topk_weights, self.total if atomic else self.rows
        ops.down(gemm, act, scale, self.weights, self.tiling, topk_weights, self.n, self.top_k, out)


def blocks(tokens: int, shape: MoEShape) -> tuple[int, ...]:
    """Token blocks that can win: around the mean load of an expert."""
    mean = tokens * shape.top_k / shape.num_experts
    if tokens <= 8:
        return (16,)
    if tokens <= 32:
        return (16, 32)
    return (16, 32, 64) if mean <= 16 else (16, 32, 64, 128) if mean <= 64 else (32, 64, 128)


def worth(c: GemmConfig, shape: MoEShape) -> bool:
    return c.stages in (3, 4) and not (shape.dtype != "fp8" and c.block_k == 128 and c.stages > 3)


def plausible(c: GemmConfig, tokens: int, shape: MoEShape) -> bool:
    return worth(c, shape) and (c.split_k == 1 or tokens <= 8) and (c.group_m == 1 or tokens >= 512)


def tried(launch: Callable[[], Any]) -> float | None:
    """Median microseconds of a launch; None if the configuration does not run."""
    try:
        launch()
        return median_us(launch, 3)
    except triton.runtime.errors.OutOfResources:
        return None


def candidates(weights: MoEWeights, batch: Batch, shape: MoEShape) -> Iterator[tuple[float, Path]]:
    """Promising paths, each with the sum of its GEMMs' times: pairs of the best GEMM configurations per token block."""
    fp8 = shape.dtype == "fp8"
    variants = [(b, False) for b in blocks(batch.num_tokens, shape)] + [(16, True)] * (batch.num_tokens <= 8)
    for block, direct in variants:
        stages = Stages(weights, batch, block, direct)
        wanted = [
            [c for c in space(gemm, shape, HARDWARE) if c.block_m == block and plausible(c, batch.num_tokens, shape)]
            for gemm in ("up", "down")
        ]
        ups = [(us, c) for c in wanted[0] if (us := tried(partial(stages.up, c)))]
        for quantised in (False, True) if fp8 else (False,):
            downs = [(us, c) for c in wanted[1] if (us := tried(partial(stages.down, c, quantised)))]
            best = sorted(downs, key=lambda v: v[0])[:3]
            fitting = sorted((v for v in ups if (fp8 and quantises_itself(v[1])) == quantised), key=lambda v: v[0])[:4]
            for up_us, up in fitting:
                for down_us, down in best:
                    path = Path(up, down, direct, atomic=down.split_k > 1)
                    if not (direct and path.atomic) and invalid_path(path, shape, HARDWARE) is None:
                        # The direct path saves the first launch.
                        yield up_us + down_us - 2.5 * direct, path


def grouped_mm(batch: Batch, weights: MoEWeights) -> torch.Tensor:
    """Compute the layer by torch's grouped GEMM in bf16."""
    ids = batch.topk_ids.flatten().long()
    order = ids.argsort(stable=True)
    counts = torch.zeros(len(weights.gate_up), dtype=torch.int32, device=DEVICE)
    offsets = counts.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32)).cumsum(0).int()
    h = torch._grouped_mm(batch.hidden_states[order // batch.top_k], weights.gate_up.transpose(1, 2), offs=offsets)
    gate, up = h.chunk(2, 1)
    y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, weights.down.transpose(1, 2), offs=offsets)
    out = torch.empty_like(y)
    out[order] = y * batch.topk_weights.flatten()[order, None].to(y.dtype)
    return out.view(batch.num_tokens, batch.top_k, -1).sum(1)


def compile_share(work: tuple[int, int, str]) -> None:
    """Compile every n-th configuration. Processes share Triton's cache on disk."""
    first, n, dtype = work
    shape = MoEShape(4, 2, 2048, 1024, dtype)
    weights = random_weights(shape, DEVICE, seed=0)
    ids = torch.zeros(8, 2, dtype=torch.int32, device=DEVICE)
    batch = Batch(torch.randn(8, 2048, device=DEVICE, dtype=torch.bfloat16), ids, torch.rand(8, 2, device=DEVICE))
    jobs = [(g, c) for g in ("up", "down") for c in space(g, shape, HARDWARE) if worth(c, shape)]
    for gemm, c in jobs[first::n]:
        for direct in (False, True) if c.block_m == 16 else (False,):
            stages = Stages(weights, batch, c.block_m, direct)
            if gemm == "up":
                tried(partial(stages.up, c))
            else:
                for quantised in (False, True) if dtype == "fp8" else (False,):
                    tried(partial(stages.down, c, quantised))


def measure(
    shape: MoEShape, weights: MoEWeights, plain: MoEWeights, tokens: int, kind: str
) -> dict[str, str | int | float]:
    """Measure one cell: the best path, and torch grouped_mm on the bf16 weights `plain`."""
    ids, topk_weights = routing(kind, tokens, shape)
    x = torch.randn(tokens, shape.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    batch = Batch(x, ids.to(DEVICE).int(), topk_weights.to(DEVICE))
    out, workspace, kernel = torch.empty_like(x), Workspace(), TritonMoE()
    paths = [p for _, p in sorted(candidates(weights, batch, shape), key=lambda v: v[0])[:FINALISTS]]
    times = [
        (graph_us(partial(kernel.launch, kernel.describe(p, shape), weights, batch, out, workspace)), p.name)
        for p in paths
    ]
    us, best = min(times)
    peer = graph_us(partial(grouped_mm, batch, plain))
    return {"tokens": tokens, "routing": kind, "us": us, "config": best, "torch_grouped_mm": peer}


def write(output: str, dtype: str, cells: list[dict[str, str | int | float]]) -> None:
    record = {
        "device": torch.cuda.get_device_name(),
        "measured": date.today().isoformat(),
        "software": {"torch": str(torch.__version__), "triton": triton.__version__},
        "kernel": "triton",
        "dtype": dtype,
        "method": " ".join((__doc__ or "").split("\n\n")[2].split()),
    }
    lines = ",\n".join("  " + json.dumps(c) for c in cells)
    File(output).write_text(json.dumps(record)[:-1] + f', "cells": [\n{lines}\n]}}\n')


def main(dtype: str, output: str, seconds: str = "600") -> None:
    start = time.time()
    processes = max(1, (os.cpu_count() or 2) - 2)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_share, [(i, processes, dtype) for i in range(processes)]))
    cells = []
    for name, model in MODELS.items():
        shape = get_registry().shape(model, dtype)
        weights = random_weights(shape, DEVICE, seed=0)
        plain = weights if dtype == "bf16" else random_weights(get_registry().shape(model, "bf16"), DEVICE, seed=0)
        for tokens, kind in itertools.product(TOKENS, ROUTINGS):
            if time.time() - start > float(seconds):
                sys.exit(f"out of time at {name} {tokens} {kind}; {output} holds {len(cells)} cells")
            cells.append({"shape": name} | measure(shape, weights, plain, tokens, kind))
            print(*cells[-1].values(), flush=True)
            write(output, dtype, cells)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in ("fp8", "bf16"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
