"""Turns rows back into tokens: the activation between the GEMMs, and the weighted sum of a token's rows after them."""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ramp_moe.plugin import Batch, Workspace
from torch import Tensor

from ..triton.combine import columns_of_program
from ..triton.epilogue import CHUNK, _activate, _gate_row
from ..triton.launch import dependent_launch, on_device_of
from ..triton.quantise import _GROUP, _quantise_groups, interpreted
from .permute import PermutedTokens

MAX_GROUPS = 8
"""Most groups of 128 intermediates per program."""


@triton.jit(do_not_specialize=["num_experts"])
def activate_kernel(
    gate_up,  # [capacity, 2 I]: bf16 or fp16
    bias,  # [E, 2 I], or None
    topk_ids,  # int32 [num_ids]
    row_of_id,
    act,  # [capacity, I]: fp8 with scale, else gate_up's dtype
    scale,  # float32 [I / 128, capacity], or None
    num_experts,
    columns,  # I
    capacity,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    GROUPS: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (routed id, part) activates GROUPS groups of intermediates. LAYOUT is the order of gate_up's columns."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0)
    expert = tl.load(topk_ids + i).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    row = tl.load(row_of_id + i).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * _GROUP + tl.arange(0, _GROUP)
    inside = column < columns
    gate_at, to_up = _gate_row(column, columns, CHUNK, LAYOUT)
    up_at = gate_at + to_up
    of_row = gate_up + row * 2 * columns
    gate = tl.load(of_row + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(of_row + up_at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        of_expert = bias + expert * 2 * columns
        gate += tl.load(of_expert + gate_at, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(of_expert + up_at, mask=inside, other=0.0).to(tl.float32)
    v = _activate(gate, up, ACTIVATION, LIMIT)
    if scale is not None:
        q, s = _quantise_groups(v, GROUPS, EMULATE_FP8)
        tl.store(scale + group.to(tl.int64) * capacity + row, s, mask=group * _GROUP < columns)
        tl.store(act + row * columns + column, q, mask=inside)
    else:
        tl.store(act + row * columns + column, v.to(act.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_experts"])
def unpermute_kernel(
    rows,  # [capacity, C]
    bias,  # [E, C], or None
    topk_ids,  # int32 [T, TOP_K]
    topk_weights,  # float32 [T, TOP_K]
    row_of_id,
    out,  # [T, C]
    num_experts,
    columns,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, part) adds up the token's weighted rows in float32, always in the same order."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        i = token * TOP_K + slot
        expert = tl.load(topk_ids + i).to(tl.int64)
        known = (expert >= 0) & (expert < num_experts)
        live = inside & known
        row = tl.load(row_of_id + i, mask=known, other=0).to(tl.int64)
        v = tl.load(rows + row * columns + column, mask=live, other=0.0).to(tl.float32)
        if bias is not None:
            v += tl.load(bias + expert * columns + column, mask=live, other=0.0).to(tl.float32)
        total += v * tl.load(topk_weights + i, mask=known, other=0.0)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=inside)


def activate(
    gate_up: Tensor,
    bias: Tensor | None,
    topk_ids: Tensor,
    rows: PermutedTokens,
    fp8: bool,
    layout: str,
    activation: str,
    limit: float | None,
    workspace: Workspace,
) -> tuple[Tensor, Tensor | None]:
    """Apply the activation to the rows of all ids in range; other rows are not written. Buffers are the workspace's.

    gate_up: `[capacity, 2 I]`, its columns in the order of `layout`.
    bias: `[E, 2 I]` in the same order; None if there is none.

    Returns (act `[capacity, I]`, its scale float32 `[I / 128, capacity]` or None if not fp8).
    """
    size, wide = gate_up.shape
    columns, device, experts = wide // 2, gate_up.device, rows.ends.numel()
    act = workspace.get("rows_act", (size, columns), torch.float8_e4m3fn if fp8 else gate_up.dtype, device)
    scale = workspace.get("rows_act_scale", (columns // 128, size), torch.float32, device) if fp8 else None
    groups = min(MAX_GROUPS, max(1, triton.next_power_of_2(columns) // 128))
    with on_device_of(gate_up):
        activate_kernel[(topk_ids.numel(), triton.cdiv(columns, groups * 128))](
            gate_up, bias, topk_ids, rows.row_of_id, act, scale, experts, columns, size,
            LAYOUT=layout, ACTIVATION=activation, LIMIT=limit, GROUPS=groups,
            EMULATE_FP8=interpreted(activate_kernel),
            **dependent_launch(device),
        )  # fmt: skip
    return act, scale


def unpermute(values: Tensor, bias: Tensor | None, batch: Batch, rows: PermutedTokens, out: Tensor) -> None:
    """Set out `[T, C]` to each token's sum of routing weight * (row of values `[capacity, C]` + bias `[E, C]`).

    The sum is in float32, one id after the other, and is cast once. Ids out of range contribute nothing.
    """
    tokens, columns = out.shape
    block, warps = columns_of_program(tokens * columns)
    with on_device_of(out):
        unpermute_kernel[(tokens, triton.cdiv(columns, block))](
            values, bias, batch.topk_ids, batch.topk_weights, rows.row_of_id, out, rows.ends.numel(), columns,
            TOP_K=batch.top_k, BLOCK=block, **dependent_launch(out.device), num_warps=warps,
        )  # fmt: skip
