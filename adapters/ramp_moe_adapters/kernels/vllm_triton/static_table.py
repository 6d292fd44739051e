"""What vLLM (0.33) itself would choose: a tuned file for the shape and device, or a heuristic by the batch size.

Its order: the user's own folder VLLM_TUNED_CONFIG_FOLDER, the files that the installed package ships, the heuristic.
VLLM_BATCH_INVARIANT=1 fixes one configuration for everything. Nothing here imports vLLM.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from ramp_moe.evaluation.vllm_table import Launch, VllmTable, find_table
from ramp_moe.plugin import SCALE_BLOCK, Hardware, MoEShape

SHIPPED = Path("model_executor", "layers", "fused_moe", "configs")
"""Within the package."""

# Up to how many tokens each holds, for bf16 and fp16.
TOKEN_BLOCKS = ((32, 16), (96, 32), (512, 64))
LARGEST_TOKEN_BLOCK = 128


def package() -> Path | None:
    """The folder of the installed vllm; None where there is none."""
    spec = importlib.util.find_spec("vllm")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def tuned_tables(shape: MoEShape, hardware: Hardware) -> list[VllmTable]:
    """The tuned files for the shape and device, that which vLLM would read first. Raises ProfileError for a broken
    one."""
    own, installed = os.environ.get("VLLM_TUNED_CONFIG_FOLDER"), package()
    folders = ([Path(own)] if own is not None else []) + ([installed / SHIPPED] if installed else [])
    return [table for folder in folders if (table := find_table([folder], shape, hardware)) is not None]


def static_launch(shape: MoEShape, hardware: Hardware, num_tokens: int) -> Launch:
    """vLLM's choice for a batch size, as `try_get_optimal_moe_config` in its `fused_moe.py` makes it."""
    tables = [] if _batch_invariant() else tuned_tables(shape, hardware)
    return tables[0].lookup(num_tokens) if tables else heuristic(shape, hardware, num_tokens)


def heuristic(shape: MoEShape, hardware: Hardware, num_tokens: int) -> Launch:
    """What vLLM takes without a tuned file: the behaviour of `get_default_config` in its `fused_moe.py`."""
    amd = hardware.arch.startswith("gfx")
    if _batch_invariant():
        return Launch(64, 64, 32, 8)
    if shape.dtype == "fp8":
        block_m, group_m = 16 if num_tokens <= 64 else 64, 1 if num_tokens <= 16 else 32
        block_n = 64 if num_tokens <= 8 and not amd else SCALE_BLOCK
        return Launch(block_m, block_n, SCALE_BLOCK, group_m, 4, 2 if amd else 4 if num_tokens <= 4 else 3)
    block_m = next((block for most, block in TOKEN_BLOCKS if num_tokens <= most), LARGEST_TOKEN_BLOCK)
    block_n, block_k = (64, 128) if num_tokens <= 64 else (128, 64)
    group_m = 16 if num_tokens // shape.num_experts > 128 else 1
    warps = 4 if num_tokens <= 128 else 8
    return Launch(block_m, block_n, block_k, group_m, warps, 2 if amd else 4 if num_tokens <= 32 else 3)


def heuristic_launches(shape: MoEShape, hardware: Hardware) -> Iterator[Launch]:
    """Every launch that the heuristic can name: one for each interval between its thresholds."""
    crowded = 129 * shape.num_experts
    for tokens in sorted({4, 8, 16, 32, 64, 96, 128, 512, 513, crowded - 1, crowded, 512 + crowded}):
        yield heuristic(shape, hardware, tokens)


def _batch_invariant() -> bool:
    return os.environ.get("VLLM_BATCH_INVARIANT", "0").strip() not in ("", "0")
