"""Makes the choice that vLLM (0.33) itself would make: by a tuned file, or by a heuristic on the batch size.

vLLM looks in the user's folder VLLM_TUNED_CONFIG_FOLDER, then in the files that the package ships, and then takes the
heuristic. VLLM_BATCH_INVARIANT=1 fixes one configuration for all batches. Nothing here imports vLLM.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from ramp_moe.evaluation.vllm_table import Launch, VllmTable, find_table
from ramp_moe.plugin import SCALE_BLOCK, Hardware, MoEShape

SHIPPED = Path("model_executor", "layers", "fused_moe", "configs")
"""Folder of the tuned files within the package."""

TOKEN_BLOCKS = ((32, 16), (96, 32), (512, 64))
"""Pairs (most tokens, BLOCK_SIZE_M) of the heuristic for bf16 and fp16; LARGEST_TOKEN_BLOCK beyond."""
LARGEST_TOKEN_BLOCK = 128


def package() -> Path | None:
    """The folder of the installed vllm; None if it is not installed."""
    spec = importlib.util.find_spec("vllm")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def tuned_tables(shape: MoEShape, hardware: Hardware) -> list[VllmTable]:
    """The tuned files for the shape and device; the first is the one that vLLM would read.

    Raises ProfileError for a broken file.
    """
    own, installed = os.environ.get("VLLM_TUNED_CONFIG_FOLDER"), package()
    folders = ([Path(own)] if own is not None else []) + ([installed / SHIPPED] if installed else [])
    return [table for folder in folders if (table := find_table([folder], shape, hardware)) is not None]


def static_launch(shape: MoEShape, hardware: Hardware, num_tokens: int) -> Launch:
    """vLLM's choice for a batch size, made as by `try_get_optimal_moe_config` in its `fused_moe.py`."""
    tables = [] if _batch_invariant() else tuned_tables(shape, hardware)
    return tables[0].lookup(num_tokens) if tables else heuristic(shape, hardware, num_tokens)


def heuristic(shape: MoEShape, hardware: Hardware, num_tokens: int) -> Launch:
    """vLLM's choice without a tuned file, made as by `get_default_config` in its `fused_moe.py`."""
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
    """Yield every launch that the heuristic can choose: one per interval between its thresholds."""
    crowded = 129 * shape.num_experts
    for tokens in sorted({4, 8, 16, 32, 64, 96, 128, 512, 513, crowded - 1, crowded, 512 + crowded}):
        yield heuristic(shape, hardware, tokens)


def _batch_invariant() -> bool:
    return os.environ.get("VLLM_BATCH_INVARIANT", "0").strip() not in ("", "0")
