"""What surrounds GEMMs whose rows are those of routed ids: rounding to fp8, the activation, and the weighted sum.

A routed id is token * top_k + slot. Rows of ids out of range are neither read nor written.
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from ramp_moe.plugin import Batch
from torch import Tensor

from ..triton.combine import columns_of_program
from ..triton.epilogue import CHUNK, _activate, _gate_row
from ..triton.launch import dependent_launch, on_device_of
from ..triton.quantise import _quantise_groups, interpreted

WIDTH, MAX_GROUPS = 128, 8
"""Columns of a group, and the most groups of a program."""


@triton.jit
def quantise_kernel(
    x,  # [T, columns]: bf16
    out,  # [T, columns]: fp8
    scale,  # float32 [T]
    columns,
    WIDTH: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token) rounds a token to fp8 with one scale."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < columns
    values = tl.load(x + token * columns + column, mask=inside, other=0.0).to(tl.float32)
    q, s = _quantise_groups(values, 1, EMULATE_FP8)
    tl.store(scale + token + tl.arange(0, 1), s)
    tl.store(out + token * columns + column, q, mask=inside)


@triton.jit(do_not_specialize=["num_experts"])
def activate_kernel(
    gate_up,  # [num_ids, 2 I], gate first: bf16
    bias,  # [E, 2 I], gate first, or None
    topk_ids,  # int32 [num_ids]
    act,  # [num_ids, I]: fp8 with scale, else bf16
    scale,  # float32 [num_ids, I / WIDTH], or None
    num_experts,
    columns,  # I
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (routed id, part) activates GROUPS groups of WIDTH intermediates."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0).to(tl.int64)
    expert = tl.load(topk_ids + i).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    gate_at, to_up = _gate_row(column, columns, CHUNK, LAYOUT)
    of_row = gate_up + i * 2 * columns
    gate = tl.load(of_row + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(of_row + gate_at + to_up, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        of_expert = bias + expert * 2 * columns
        gate += tl.load(of_expert + gate_at, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(of_expert + gate_at + to_up, mask=inside, other=0.0).to(tl.float32)
    v = _activate(gate, up, ACTIVATION, LIMIT)
    if scale is not None:
        q, s = _quantise_groups(v, GROUPS, EMULATE_FP8)
        groups = tl.cdiv(columns, WIDTH)
        tl.store(scale + i * groups + group, s, mask=group < groups)
        tl.store(act + i * columns + column, q, mask=inside)
    else:
        tl.store(act + i * columns + column, v.to(act.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_experts"])
def weighted_sum_kernel(
    rows,  # [num_ids, C]: bf16
    bias,  # [E, C], or None
    topk_ids,  # int32 [T, TOP_K]
    topk_weights,  # float32 [T, TOP_K]
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
        v = tl.load(rows + i * columns + column, mask=live, other=0.0).to(tl.float32)
        if bias is not None:
            v += tl.load(bias + expert * columns + column, mask=live, other=0.0).to(tl.float32)
        total += v * tl.load(topk_weights + i, mask=known, other=0.0)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=inside)


def quantise_tokens(x: Tensor, out: Tensor, scale: Tensor) -> None:
    """Round `x [T, C]` to fp8 `out [T, C]`, with a float32 scale a token, `[T, 1]`."""
    tokens, columns = x.shape
    width = triton.next_power_of_2(columns)
    with on_device_of(x):
        quantise_kernel[(tokens,)](
            x, out, scale, columns,
            WIDTH=width, EMULATE_FP8=interpreted(quantise_kernel),
            num_warps=_warps(width), **dependent_launch(x.device),
        )  # fmt: skip


def activate(
    gate_up: Tensor,
    bias: Tensor | None,
    topk_ids: Tensor,
    num_experts: int,
    act: Tensor,
    scale: Tensor | None,
    activation: str,
    limit: float | None,
) -> None:
    """Activate `gate_up [n, 2 I]` into `act [n, I]`.

    scale: float32 `[n, I / 128]` or `[n, 1]`, if act is fp8: of groups of 128 columns, or of whole rows.
    """
    n, columns = act.shape
    width = triton.next_power_of_2(columns) if scale is not None and scale.shape[1] == 1 else WIDTH
    groups = min(MAX_GROUPS, max(1, triton.next_power_of_2(columns) // width)) if width == WIDTH else 1
    with on_device_of(gate_up):
        activate_kernel[(n, triton.cdiv(columns, groups * width))](
            gate_up, bias, topk_ids, act, scale, num_experts, columns,
            ACTIVATION=activation, LIMIT=limit, LAYOUT="gate-first", CHUNK=CHUNK, GROUPS=groups, WIDTH=width,
            EMULATE_FP8=interpreted(activate_kernel),
            num_warps=_warps(groups * width), **dependent_launch(gate_up.device),
        )  # fmt: skip


def weighted_sum(rows: Tensor, bias: Tensor | None, batch: Batch, num_experts: int, out: Tensor) -> None:
    """Set out `[T, C]` to each token's sum of routing weight * (row of `rows [T k, C]` + bias `[E, C]`)."""
    tokens, columns = out.shape
    block, warps = columns_of_program(tokens * columns)
    with on_device_of(out):
        weighted_sum_kernel[(tokens, triton.cdiv(columns, block))](
            rows, bias, batch.topk_ids, batch.topk_weights, out, num_experts, columns,
            TOP_K=batch.top_k, BLOCK=block, num_warps=warps, **dependent_launch(out.device),
        )  # fmt: skip


def _warps(columns: int) -> int:
    """Warps of a program that holds that number of columns: 16 columns a thread, and 4 to 16 warps."""
    return min(16, max(4, columns // 512))
