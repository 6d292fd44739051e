"""Computes a batch with Marlin: sort, up, activation, down, weighted sum.

Marlin reads the tokens' rows where they are, and writes a row for each routed id, as our schedule sorts them. The
operator comes from vLLM's compiled library, which is loaded without vLLM's Python code.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ramp_moe.plugin import Batch, KernelConfig, KernelError, MoEShape, MoEWeights, Workspace
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.checks import check_aligned, check_batch, check_bf16, check_hopper
from ramp_moe.spec.launchable import allocate
from ramp_moe_kernels.limits import check_tokens
from ramp_moe_kernels.permute.routed import activate, weighted_sum
from ramp_moe_kernels.triton.launch import on_device_of
from ramp_moe_kernels.triton.schedule import Schedule, buffer_sizes, launch_schedule
from torch import Tensor

from .config import TYPES, MarlinTile, most_tokens, sizes, tiles_of
from .layout import repack, repack_scales

LIBRARY = "_moe_C_stable_libtorch.abi3.so"
OPERATOR = "moe_wna16_marlin_gemm"
LOCKS = 1 << 12
"""Locks of CTAs that share a tile: more than four for each SM. They are zero between launches."""
MAX_EXPONENT = 230
"""Greatest e8m0 scale that is taken, 2^103. Beyond, products of weights and activations leave the range of bf16."""


@dataclass(frozen=True, slots=True)
class MarlinWeights:
    """One GEMM's weights in Marlin's layout (see `layout.py`)."""

    weight: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class PreparedMarlin:
    """The weights in Marlin's layout, and what remains of ours. shape: without its top_k, which is 1."""

    shape: MoEShape
    up: MarlinWeights
    down: MarlinWeights
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    limit: float | None


@dataclass(frozen=True, slots=True)
class MarlinPlan:
    """The tiles and buffers of a batch, which follow from its size."""

    block_m: int
    up: MarlinTile
    down: MarlinTile
    schedule: Schedule
    gate_up: Tensor
    act: Tensor
    rows: Tensor


def prepare(weights: MoEWeights) -> PreparedMarlin:
    if weights.stored.name not in TYPES:
        raise KernelError(f"marlin takes weights in {' or '.join(TYPES)}, not in {weights.stored.name}")
    check_hopper("marlin", weights.gate_up.device)
    weights, shape = relayout(weights, "gate-first"), weights.shape(top_k=1)
    operator()
    return PreparedMarlin(
        shape,
        _repacked(weights.gate_up, weights.gate_up_scale),
        _repacked(weights.down, weights.down_scale),
        weights.gate_up_bias,
        weights.down_bias,
        weights.activation,
        weights.limit,
    )


def _repacked(weight: Tensor, scale: Tensor | None) -> MarlinWeights:
    assert scale is not None
    if scale.dtype == torch.uint8 and (greatest := int(scale.max())) > MAX_EXPONENT:
        raise KernelError(
            f"marlin: MXFP4 scales must be at most 2^{MAX_EXPONENT - 127}, and one is 2^{greatest - 127} (2^128 is "
            "NaN); correct the checkpoint, or leave the layer to another kernel"
        )
    return MarlinWeights(repack(weight), repack_scales(scale))


@functools.cache
def operator() -> Any:
    """vLLM's operator. Raises KernelError if its library cannot be loaded."""
    operators: Any = torch.ops._moe_C
    if not hasattr(operators, OPERATOR):
        spec = importlib.util.find_spec("vllm")
        folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec is not None else []
        file = next((f / LIBRARY for f in folders if (f / LIBRARY).exists()), None)
        if file is None:
            raise KernelError(f"vllm has no {LIBRARY}; install vllm 0.33, whose wheel has it")
        try:
            torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
        except OSError as e:
            raise KernelError(f"vllm's {LIBRARY} cannot be loaded ({e})") from e
    if not hasattr(operators, OPERATOR):
        raise KernelError(f"vllm's library has no {OPERATOR}; install vllm 0.33")
    return getattr(operators, OPERATOR)


def launch_steps(
    config: KernelConfig, prepared: PreparedMarlin, batch: Batch, out: Tensor, workspace: Workspace
) -> Iterator[None]:
    """Launch a layer. Yields after each stage."""
    p, x, ids = prepared, batch.hidden_states, batch.topk_ids
    shape, device = p.shape, p.up.weight.device
    check_bf16("marlin", batch, out)
    check_batch("marlin", batch, out, shape.hidden_size, device)
    check_aligned("marlin", "hidden_states", x)
    key = (config, ids.shape, shape, device)
    plan = workspace.plan("marlin", key, device, lambda: _planned(config, p, batch, workspace))
    locks = workspace.plan("marlin_locks", (device,), device, lambda: allocate(4 * LOCKS, device).zero_())
    launch_schedule(ids, shape.num_experts, (plan.block_m,), plan.schedule)
    yield
    gemm(p, "up", plan.block_m, plan.up, x, plan.gate_up, plan.schedule, locks, batch.topk_weights, batch.top_k)
    yield
    activate(plan.gate_up, p.gate_up_bias, ids, shape.num_experts, plan.act, None, p.activation, p.limit)
    yield
    gemm(p, "down", plan.block_m, plan.down, plan.act, plan.rows, plan.schedule, locks, batch.topk_weights, 1)
    yield
    weighted_sum(plan.rows, p.down_bias, batch, shape.num_experts, out)
    yield


def gemm(
    prepared: PreparedMarlin,
    which: str,
    block_m: int,
    tile: MarlinTile,
    a: Tensor,
    out: Tensor,
    schedule: Schedule,
    locks: Tensor,
    topk_weights: Tensor,
    top_k: int,
) -> None:
    """Write the rows of `out [n, N]` whose ids the schedule has: row i is row i / top_k of `a`, times its expert's
    weights.

    a: bf16 `[n / top_k, K]`. The routing weights are not applied.
    """
    side = prepared.up if which == "up" else prepared.down
    n, k = sizes(prepared.shape, which)
    with on_device_of(a):
        operator()(
            a, out, side.weight, None, side.scale, None, None, None, locks.view(torch.int32),
            schedule.sorted_token_ids, schedule.expert_ids, schedule.num_tokens_post_padded, topk_weights,
            block_m, top_k, False, TYPES[prepared.shape.dtype], len(a), n, k, False, True, False,
            *tile.arguments,
        )  # fmt: skip


def _planned(config: KernelConfig, prepared: PreparedMarlin, batch: Batch, workspace: Workspace) -> MarlinPlan:
    shape, device = prepared.shape, prepared.up.weight.device
    n, bf16 = batch.topk_ids.numel(), torch.bfloat16
    check_tokens("marlin", config.name, batch.num_tokens, most_tokens(shape, batch.top_k))
    block, up, down = tiles_of(config.params)
    buffers = buffer_sizes(n, shape.num_experts, block)
    return MarlinPlan(
        block,
        up,
        down,
        Schedule(**{name: workspace.get(name, (size,), torch.int32, device) for name, size in buffers.items()}),
        workspace.get("rows_gate_up", (n, shape.gate_up_rows), bf16, device),
        workspace.get("act", (n, shape.intermediate_size), bf16, device),
        workspace.get("rows_out", (n, shape.hidden_size), bf16, device),
    )
