"""Measure the kernel time of TritonMoE (github bassrehab/triton-kernels) and of the Triton path's default, in fp16.

    PYTHONPATH=CHECKOUT_OF_TRITON_KERNELS python tritonmoe_kernel_time.py OUTPUT.json

TritonMoE synchronises with the host twice per forward, so that its latency is the host's. So both are judged by the
GPU's work alone: the sum of the kernels' durations, as torch's profiler records them. A forward is from top-k ids to
the combined output, without a graph. The time is the median of 10 forwards. 256 MiB are written before each to flush
L2, which is not counted.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from ramp_moe import get_registry
from ramp_moe.runtime.layer import LayerRuntime
from ramp_moe.spec.launchable import MoEWeights
from ramp_moe_kernels.triton.kernel import TritonMoE
from torch.profiler import ProfilerActivity, profile
from triton_kernels.moe import fused_expert_ffn, permute_tokens
from triton_path import HARDWARE, MODELS, TOKENS, routing

REPEATS = 10


def kernel_us(forward: Callable[[], Any], flush: torch.Tensor) -> float:
    forward()
    torch.cuda.synchronize()
    totals = []
    for _ in range(REPEATS):
        flush.zero_()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            forward()
            torch.cuda.synchronize()
        spans = sorted((e.time_range.start, e.time_range.end) for e in p.events() if e.device_type.name == "CUDA")
        busy = until = 0.0
        for start, end in spans:
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
        totals.append(busy)
    return round(statistics.median(totals), 2)


def theirs(x: Any, ids: Any, weights: Any, gate: Any, up: Any, down: Any, experts: int, top_k: int) -> Any:
    permuted, offsets, order, _ = permute_tokens(x, ids, experts)
    return fused_expert_ffn(permuted, gate, up, down, offsets, experts, weights, order, len(x), top_k)


def main(output: str) -> None:
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    cells = []
    for name, model in MODELS.items():
        shape = get_registry().shape(model, "fp16")
        experts, hidden, inter = shape.num_experts, shape.hidden_size, shape.intermediate_size
        gate_up = torch.empty(experts, 2 * inter, hidden, dtype=torch.float16, device="cuda").normal_(0, hidden**-0.5)
        down = torch.empty(experts, hidden, inter, dtype=torch.float16, device="cuda").normal_(0, inter**-0.5)
        gate, up = (half.contiguous() for half in gate_up.chunk(2, 1))
        layer = LayerRuntime(MoEWeights(gate_up, down), shape.top_k, HARDWARE, [TritonMoE()])
        for tokens in TOKENS:
            for kind in ("uniform", "alpha0.5"):
                ids, weights = (t.cuda() for t in routing(kind, tokens, shape))
                x = torch.randn(tokens, hidden, dtype=torch.float16, device="cuda")
                args = (x, ids, weights, gate, up, down)

                cell = {"shape": name, "tokens": tokens, "routing": kind}
                cell["triton_us"] = kernel_us(partial(layer, x, ids.int(), weights), flush)
                try:
                    cell["tritonmoe_us"] = kernel_us(partial(theirs, *args, experts, shape.top_k), flush)
                except Exception as e:  # theirs, whatever it is: recorded, the others go on
                    cell["tritonmoe_error"] = f"{type(e).__name__}: {e}"[:200]
                cells.append(cell)
                print(*cell.values(), flush=True)
    record = {
        "device": torch.cuda.get_device_name(),
        "measured": date.today().isoformat(),
        "software": {"torch": str(torch.__version__), "triton": triton.__version__},
        "method": " ".join((__doc__ or "").split("\n\n")[2].split()),
    }
    lines = ",\n".join("  " + json.dumps(c) for c in cells)
    Path(output).write_text(json.dumps(record)[:-1] + f', "cells": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
