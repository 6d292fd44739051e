"""Tokens to rows: every routed id gets a row of its own, sorted by expert, each expert's rows padded to whole tiles.

Row r of `rows` holds the hidden states of one routed id (token * top_k + slot), quantised by groups of 128 columns for
fp8 GEMMs. What is between an expert's end and the next expert's first row is never written: what a GEMM makes of it is
never read.

    x [T, H]   ids [T, k]        rows [capacity, H]      scale [H / 128, capacity]      row_of_id [T * k]   ends [E]

Up to FUSED_IDS ids take one launch, in which every program counts all ids again and ranks those of its own token. More
ids take `schedule`, then a launch that inverts its slots, then the one that copies.
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ramp_moe.plugin import KernelError, Workspace
from torch import Tensor

from ..limits import MAX_EXPERTS, MAX_IDS
from ..triton.launch import dependent_launch
from ..triton.quantise import _GROUP, _quantise_groups, interpreted
from ..triton.schedule import Schedule, buffer_sizes, max_tiles, schedule

FUSED_IDS = 2048
STEP = 512
PROGRAMS = 264
"""About which many are launched: two an SM of an H200."""
COLUMNS = 1024
"""Columns of x that a program copies at a time."""
SLOTS = 1024
"""Slots of the schedule that a program inverts."""


@dataclass(frozen=True, slots=True)
class PermutedTokens:
    """values `[capacity, C]` fp8 or the dtype of x; scale float32 `[C / 128, capacity]` with fp8, else None; row_of_id
    int32 `[n]`, not written for ids out of range; ends int32 `[E]`: the row after each expert's last, its first where
    it has none. Experts begin at multiples of the tile."""

    values: Tensor
    scale: Tensor | None
    row_of_id: Tensor
    ends: Tensor


@triton.jit
def _rows_of_token(topk_ids, token, num_ids, top_k, num_experts, block, STEP: tl.constexpr, BINS: tl.constexpr,
                   TOP_K: tl.constexpr):  # fmt: skip
    """(rows int32 [TOP_K], -1 where the id is skipped; ends int32 [BINS]) from all ids, STEP of them at a time: code
    for all at once would take longer to be fetched than to run."""
    slot = tl.arange(0, TOP_K)
    own = token * top_k + slot
    expert = tl.load(topk_ids + own, mask=slot < top_k, other=-1)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, -1)
    count = tl.zeros((BINS,), tl.int32)
    rank = tl.zeros((TOP_K,), tl.int32)
    for begin in range(0, num_ids, STEP):
        at = begin + tl.arange(0, STEP)
        experts = tl.load(topk_ids + at, mask=at < num_ids, other=-1)
        experts = tl.where((experts >= 0) & (experts < num_experts), experts, -1)
        count += tl.histogram(experts, BINS, mask=experts >= 0)
        before = (experts[None, :] == expert[:, None]) & (at[None, :] < own[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    padded = tl.cdiv(count, block) * block
    first = tl.cumsum(padded, 0) - padded
    base = tl.where(tl.arange(0, BINS)[None, :] == expert[:, None], first[None, :], 0)
    return tl.where(expert >= 0, tl.sum(base, 1) + rank, -1), first + count


@triton.jit(do_not_specialize=["num_ids", "top_k", "num_experts", "block"])
def permute_kernel(
    x,  # [T, C]: bf16 or fp16
    topk_ids,  # int32 [T, top_k]
    rows,  # [capacity, C]: fp8 with scale, else x's dtype
    scale,  # float32 [C / 128, capacity], or None
    row_of_id,  # int32 [num_ids]
    ends,  # int32 [E]
    num_ids,
    top_k,
    num_experts,
    block,
    columns,
    capacity,
    FUSED: tl.constexpr,  # rows and ends are found here, not given
    STEP: tl.constexpr,  # ids that are looked at at a time
    BINS: tl.constexpr,  # a power of two, experts or more
    TOP_K: tl.constexpr,  # a power of two, top_k or more
    GROUPS: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, one of several): every several-th GROUPS groups of the token's columns, quantised once, to all of
    its rows."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    part = tl.program_id(1)
    slot = tl.arange(0, TOP_K)
    own = token * top_k + slot
    lane = tl.arange(0, GROUPS)[:, None] * _GROUP + tl.arange(0, _GROUP)
    of_token = x + token.to(tl.int64) * columns
    first = part * GROUPS * _GROUP
    stride = tl.num_programs(1) * GROUPS * _GROUP
    # Asked for before the ids are looked at: both may come from memory.
    ahead = tl.load(of_token + first + lane, mask=first + lane < columns, other=0.0)
    if FUSED:
        row, end = _rows_of_token(topk_ids, token, num_ids, top_k, num_experts, block, STEP, BINS, TOP_K)
        if part == 0:
            tl.store(row_of_id + own, row, mask=(slot < top_k) & (row >= 0))
            if token == 0:
                bins = tl.arange(0, BINS)
                tl.store(ends + bins, end, mask=bins < num_experts)
    else:
        expert = tl.load(topk_ids + own, mask=slot < top_k, other=-1)
        known = (expert >= 0) & (expert < num_experts)
        row = tl.load(row_of_id + own, mask=known, other=-1)
    for begin in range(first, columns, stride):
        v = ahead
        column = begin + lane
        inside = column < columns
        ahead = tl.load(of_token + stride + column, mask=stride + column < columns, other=0.0)
        if scale is not None:
            q, s = _quantise_groups(v.to(tl.float32), GROUPS, EMULATE_FP8)
        else:
            q = v
        group = begin // _GROUP + tl.arange(0, GROUPS)
        # One row at a time: stores of several would be a byte wide.
        for i in range(top_k):
            to = tl.sum(tl.where(slot == i, row, 0), 0).to(tl.int64)
            if to >= 0:
                tl.store(rows + to * columns + column, q, mask=inside)
                if scale is not None:
                    tl.store(scale + group.to(tl.int64) * capacity + to, s, mask=group * _GROUP < columns)


@triton.jit(do_not_specialize=["num_ids", "num_experts", "block"])
def invert_kernel(
    sorted_token_ids,  # int32 [num_tokens_post_padded or more]
    num_tokens_post_padded,  # int32 [1]
    histogram,  # int32 [E]
    row_of_id,
    ends,
    num_ids,
    num_experts,
    block,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """row_of_id[sorted_token_ids[r]] = r; program 0 writes the experts' ends, too."""
    program = tl.program_id(0)
    row = program * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(sorted_token_ids + row, mask=row < tl.load(num_tokens_post_padded), other=num_ids)
    tl.store(row_of_id + ids, row, mask=ids < num_ids)
    if program == 0:
        bins = tl.arange(0, BINS)
        count = tl.load(histogram + bins, mask=bins < num_experts, other=0)
        padded = tl.cdiv(count, block) * block
        tl.store(ends + bins, tl.cumsum(padded, 0) - padded + count, mask=bins < num_experts)


def capacity(num_ids: int, num_experts: int, block: int) -> int:
    """Rows for the worst routing of `num_ids` ids, in whole tiles of `block`. Raises KernelError beyond the limits."""
    if not 1 <= num_ids <= MAX_IDS:
        raise KernelError(f"permute takes 1 to {MAX_IDS} routed ids, not {num_ids}")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise KernelError(f"permute takes 1 to {MAX_EXPERTS} experts, not {num_experts}")
    return max_tiles(num_ids, num_experts, block) * block


def permute(
    x: Tensor, topk_ids: Tensor, num_experts: int, block: int, fp8: bool, workspace: Workspace
) -> PermutedTokens:
    """The rows of x bf16 or fp16 `[T, C]` for topk_ids int32 `[T, k]`, with an expert's rows padded to whole tiles of
    `block`; quantised by groups of 128 columns, of which C is a multiple then, if fp8. Buffers are the workspace's."""
    tokens, columns = x.shape
    num_ids, top_k, device = topk_ids.numel(), topk_ids.shape[1], x.device
    size = capacity(num_ids, num_experts, block)
    rows = PermutedTokens(
        workspace.get("rows_x", (size, columns), torch.float8_e4m3fn if fp8 else x.dtype, device),
        workspace.get("rows_x_scale", (columns // 128, size), torch.float32, device) if fp8 else None,
        workspace.get("row_of_id", (num_ids,), torch.int32, device),
        workspace.get("ends", (num_experts,), torch.int32, device),
    )
    fused = num_ids <= FUSED_IDS
    # 128 are avoided: where weights have gone through L2 before, counting into them takes twice as long as into 256 (12
    # and 6 us on an H200).
    bins = 64 if num_experts <= 64 else max(256, triton.next_power_of_2(num_experts))
    with torch.cuda.device_of(x):
        if not fused:
            sizes = buffer_sizes(num_ids, num_experts, block)
            plan = Schedule(**{n: workspace.get(n, (s,), torch.int32, device) for n, s in sizes.items()})
            schedule(topk_ids, num_experts, block, plan)
            invert_kernel[(triton.cdiv(size, SLOTS),)](
                plan.sorted_token_ids, plan.num_tokens_post_padded, plan.histogram, rows.row_of_id, rows.ends,
                num_ids, num_experts, block, BINS=bins, BLOCK=SLOTS,
            )  # fmt: skip
        groups = max(1, min(COLUMNS, triton.next_power_of_2(columns)) // 128)
        # Where few tokens leave SMs idle, several programs share one, each of which counts all ids.
        parts = max(1, min(triton.cdiv(columns, groups * 128), PROGRAMS // tokens))
        permute_kernel[(tokens, parts)](
            x, topk_ids, rows.values, rows.scale, rows.row_of_id, rows.ends,
            num_ids, top_k, num_experts, block, columns, size,
            FUSED=fused, STEP=STEP, BINS=bins,
            TOP_K=triton.next_power_of_2(top_k), GROUPS=groups, EMULATE_FP8=interpreted(permute_kernel),
            **dependent_launch(device), num_warps=4,
        )  # fmt: skip
    return rows
