"""Measure the time that the DeepGEMM path takes beyond DeepGEMM's own two GEMMs.

    python deep_gemm_overhead.py OUTPUT.json

Two CUDA graphs are timed for each model and batch size, with uniform routing. One has 10 paths, from top-k ids to the
combined bf16 output. The other has 10 times the two GEMMs, on rows that exist already. The time is the median of 15
replays, over 10. Nothing flushes L2 but the experts' weights, which are larger. They are random e4m3 with [128, 128]
scales.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from ramp_moe import MoEShape, get_registry
from ramp_moe.profiler.bench import random_weights
from ramp_moe.spec.launchable import Batch, Workspace
from ramp_moe_adapters.kernels.deep_gemm.kernel import DeepGEMM
from ramp_moe_adapters.kernels.deep_gemm.launch import PreparedDeepGEMM, gemm
from ramp_moe_kernels.permute.permute import permute
from ramp_moe_kernels.permute.unpermute import activate

MODELS = ("olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "mixtral-8x7b-tp4")
TOKENS = (8, 64, 256)
PATHS, REPLAYS, WARM = 10, 15, 20


def graph_us(launch_once: Callable[[], None]) -> float:
    """Microseconds of one launch of a graph's PATHS."""
    launch_once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(PATHS):
            launch_once()
    for _ in range(WARM):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / PATHS)
    return statistics.median(times)


def measure(kernel: DeepGEMM, prepared: PreparedDeepGEMM, shape: MoEShape, tokens: int) -> dict[str, Any]:
    config = kernel.default_config(shape, get_registry().device("h200"), tokens)
    params: dict[str, Any] = dict(config.params)
    ids = torch.multinomial(torch.ones(tokens, shape.num_experts), shape.top_k).int().cuda()
    x = torch.randn(tokens, shape.hidden_size, device="cuda").bfloat16()
    batch, workspace = Batch(x, ids, torch.rand(tokens, shape.top_k, device="cuda")), Workspace()
    out = torch.empty_like(x)
    whole = graph_us(lambda: kernel.launch(config, prepared, batch, out, workspace))

    w = prepared.weights
    rows = permute(x, ids, shape.num_experts, params["block_m"], True, workspace)
    gate_up = torch.empty(len(rows.values), 2 * shape.intermediate_size, device="cuda", dtype=x.dtype).normal_()
    values = torch.empty(len(rows.values), shape.hidden_size, device="cuda", dtype=x.dtype)
    act, scale = activate(gate_up, None, ids, rows, True, w.layout, w.activation, w.limit, workspace)

    def gemms() -> None:
        gemm(prepared, params, "up", rows.values, rows.scale, w.gate_up, w.gate_up_scale, gate_up, rows.ends)
        gemm(prepared, params, "down", act, scale, w.down, w.down_scale, values, rows.ends)

    alone = graph_us(gemms)
    return {
        "tokens": tokens,
        "path_us": round(whole, 2),
        "gemms_us": round(alone, 2),
        "beyond_us": round(whole - alone, 2),
    }


if __name__ == "__main__":
    cells: list[dict[str, Any]] = []
    kernel = DeepGEMM()
    for model in MODELS:
        shape = get_registry().shape(model, "fp8")
        prepared = kernel.prepare(random_weights(shape, "cuda", 0))
        cells += [{"model": model, **measure(kernel, prepared, shape, tokens)} for tokens in TOKENS]
        print(*cells[-len(TOKENS) :], sep="\n", flush=True)
    found = {
        "command": "python deep_gemm_overhead.py OUTPUT.json",
        "measured": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "software": {"torch": torch.__version__, "triton": triton.__version__, "deep_gemm": DeepGEMM().version()},
        "cells": cells,
    }
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
