"""Time the fused CuTe kernel's first launches in a process: milliseconds of load(), and of the launch, for each.

    python cute_first_launch.py MODEL DTYPE CONFIGURATION ...

Torch, its CUDA context, prepared weights, the batch and the schedule exist before. The objects are compiled already.
Prints one JSON array.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from cute_contenders import DEVICE, Inner
from ramp_moe import get_registry
from ramp_moe.profiler.bench import random_weights
from ramp_moe.spec.launchable import Batch, Workspace
from ramp_moe_kernels.cute import launch
from ramp_moe_kernels.cute.aot import load
from ramp_moe_kernels.cute.kernel import CuteMoE
from ramp_moe_kernels.cute.space import configurations

TOKENS = 8


def first_launches(model: str, dtype: str, names: list[str]) -> list[dict[str, Any]]:
    shape = get_registry().shape(model, dtype)
    by_name = {config.name: config for config in configurations(shape)}
    prepared = CuteMoE().prepare(random_weights(replace(shape, num_experts=shape.top_k), DEVICE, 0))
    ids = torch.arange(shape.top_k, device=DEVICE).int().repeat(TOKENS, 1)
    x = torch.ones(TOKENS, shape.hidden_size, device=DEVICE).bfloat16()
    batch, out = Batch(x, ids, torch.ones(ids.shape, device=DEVICE)), torch.empty_like(x)
    rows = []
    for name in names:
        inner, workspace = Inner(lambda *_: None), Workspace()
        with patch.object(launch, "load", lambda _, inner=inner: inner):
            for _ in launch.launch_steps([by_name[name]], prepared, batch, out, workspace):
                pass
        torch.cuda.synchronize()
        start = time.perf_counter()
        function = load(by_name[name])
        loaded = time.perf_counter()
        function(*inner.arguments)
        torch.cuda.synchronize()
        done = time.perf_counter()
        rows.append({"config": name, "load_ms": (loaded - start) * 1e3, "launch_ms": (done - loaded) * 1e3})
    return [row | {k: round(v, 2) for k, v in row.items() if k != "config"} for row in rows]


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    print(json.dumps(first_launches(sys.argv[1], sys.argv[2], sys.argv[3:])))
