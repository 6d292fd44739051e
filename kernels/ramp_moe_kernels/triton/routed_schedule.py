"""The router and the schedule of a small batch in one launch, from router logits to sorted ids.

Every sorting program chooses the experts of all tokens, which takes less time than another launch. The first of them
writes ids, weights and the summary. Then each sorts the ids of its experts, as `schedule` does:

    score   float32 [rows, P]   softmax or sigmoid of the logits; NaN and infinity count as 0
    pick    int32 [rows]        k times: the lowest expert of the best score, which is then excluded
    expert  int32 [1, N]        the picks by routed id; -1 for padding

Ids and the treatment of NaN, ties and padding are those of vLLM 0.33's router.
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from ramp_moe.plugin import RouterLogits
from torch import Tensor

from ..reference import GROUP
from .launch import on_device_of
from .quantise import groups_per_program, interpreted
from .router import _best
from .schedule import PROGRAMS, ZERO_BLOCK, Schedule, _beside, _bins, _count, _schedule_expert, _summarise

MAX_SCORES = 1024
"""Most scores, rows times padded experts, that every program computes. More take longer than two launches do."""
MAX_TOP_K = 16


@triton.jit
def _choose(
    logits,
    padding,
    num_tokens,
    stride,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
):
    """Experts int32 and weights float32 of every token, both [ROWS, K padded to a power of two]. -1 is no expert."""
    P: tl.constexpr = triton.next_power_of_2(E)
    SLOTS: tl.constexpr = triton.next_power_of_2(K)
    row, expert = tl.arange(0, ROWS)[:, None], tl.arange(0, P)[None, :]
    there = (row < num_tokens) & (expert < E)
    given = tl.load(logits + row * stride + expert, mask=there, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        score = 1 / (1 + tl.exp(-given))
    else:
        power = tl.exp(given - tl.max(given, 1)[:, None])
        score = power * (1 / tl.sum(power, 1)[:, None])
    score = tl.where((score >= 0) & (score < float("inf")), score, 0.0)  # NaN compares to nothing
    score = tl.where(expert < E, score, -1.0)

    slot = tl.arange(0, SLOTS)[None, :]
    ids = tl.full((ROWS, SLOTS), -1, tl.int32)
    weights = tl.zeros((ROWS, SLOTS), tl.float32)
    for k in tl.static_range(K):
        best, pick = _best(score, expert)
        score = tl.where(expert == pick[:, None], -1.0, score)
        ids = tl.where(slot == k, pick[:, None], ids)
        weights = tl.where(slot == k, best[:, None], weights)
    if RENORMALISE:
        total = tl.sum(weights, 1)[:, None]
        weights = weights * (1 / tl.where(total > 0, total, 1.0))
    ids = tl.where(row < num_tokens, ids, -1)
    if padding is not None:
        skipped = tl.load(padding + row, mask=row < num_tokens, other=0)
        ids = tl.where(skipped != 0, -1, ids)
    return ids, weights


@triton.jit(
    do_not_specialize=["num_tokens", "num_experts", "block", "capacity", "experts_each", "num_groups", "x_programs"]
)
def routed_schedule_kernel(
    logits,  # bf16, fp16 or float32 [num_tokens, E], rows `stride` elements apart
    padding,  # uint8 [num_tokens], or None
    topk_ids,  # int32 [num_tokens, K]
    topk_weights,  # float32 [num_tokens, K]
    sorted_token_ids,
    expert_ids,
    num_tokens_post_padded,
    histogram,
    num_tokens,
    stride,
    num_experts,
    block,
    capacity,  # tiles that expert_ids has room for
    experts_each,  # experts of a program
    parts,  # programs that sort
    x,  # bf16, fp16 or float32 [num_groups, GROUP], or None
    x_fp8,
    x_scale,
    num_groups,
    x_programs,
    zero,  # any dtype, or None
    zero_size,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # a power of two, num_tokens or more
    BINS: tl.constexpr,  # a power of two, experts or more
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
):
    """Program 0 writes ids, weights and the summary, the next `parts` sort, and the others do `_beside`."""
    program = tl.program_id(0)
    if program <= parts:
        SLOTS: tl.constexpr = triton.next_power_of_2(K)
        chosen, weights = _choose(logits, padding, num_tokens, stride, E, K, ROWS, SIGMOID, RENORMALISE)
        row, slot = tl.arange(0, ROWS)[:, None], tl.arange(0, SLOTS)[None, :]
        routed = row * K + slot
        # One row of ids: scans over the transposed [4, N / 4], as `schedule` has, are wrong on a GPU if N is small.
        experts = tl.reshape(chosen, (1, ROWS * SLOTS))
        ids = tl.reshape(routed, (1, ROWS * SLOTS))
        count = _count(experts, BINS)
        tiles = tl.cdiv(count, block)
        if program == 0:
            there = (row < num_tokens) & (slot < K)
            tl.store(topk_ids + routed, chosen, mask=there)
            tl.store(topk_weights + routed, weights, mask=there)
            _summarise(tiles, count, expert_ids, num_tokens_post_padded, histogram, num_experts, block, capacity, BINS)
        else:
            earlier = tl.zeros((BINS,), tl.int32)
            first = (program - 1) * experts_each
            for expert in range(first, tl.minimum(first + experts_each, num_experts)):
                _schedule_expert(
                    expert, ids, experts, tiles, count, earlier, 0, sorted_token_ids, expert_ids, num_tokens * K,
                    block, BINS,
                )  # fmt: skip
    else:
        program -= parts + 1
        _beside(program, x, x_fp8, x_scale, num_groups, x_programs, zero, zero_size, GROUPS, GROUP, ZERO, EMULATE_FP8)


def takes(num_tokens: int, num_experts: int, top_k: int) -> bool:
    """Whether one launch routes and sorts a batch. A larger one takes a router of its own, and `schedule`."""
    if num_tokens < 1 or not 1 <= top_k <= min(num_experts, MAX_TOP_K):
        return False
    sizes = _sizes(num_tokens, num_experts, top_k)
    return sizes.rows * int(triton.next_power_of_2(num_experts)) <= MAX_SCORES


def launch_routed_schedule(
    router: RouterLogits,
    topk_ids: Tensor,
    topk_weights: Tensor,
    block: int,
    out: Schedule,
    quantise: tuple[Tensor, Tensor, Tensor] | None = None,
    zero: Tensor | None = None,
) -> None:
    """Choose the experts of a batch that `takes` allows, write topk_ids and topk_weights, and fill `out`.

    topk_ids: int32 `[T, k]`, contiguous; -1 for padding. topk_weights: float32 `[T, k]`, contiguous.
    quantise and zero: as of `schedule`. Nothing is checked. `out` has the sizes of `buffer_sizes`.
    """
    tokens, top_k = topk_ids.shape
    num_experts = router.logits.shape[1]
    sizes = _sizes(tokens, num_experts, top_k)
    x, x_fp8, x_scale = quantise or (None, None, None)
    groups = groups_each = group = x_programs = 0
    if x is not None and x_scale is not None:
        groups = x_scale.numel()
        group = x.numel() // groups if groups else GROUP
        groups_each = groups_per_program(groups)
        x_programs = -(-groups // groups_each)
    zero_size = 0 if zero is None else zero.numel()
    with on_device_of(topk_ids):
        routed_schedule_kernel[(1 + sizes.parts + x_programs + -(-zero_size // ZERO_BLOCK),)](
            router.logits,
            router.padding,
            topk_ids,
            topk_weights,
            out.sorted_token_ids,
            out.expert_ids,
            out.num_tokens_post_padded,
            out.histogram,
            tokens,
            router.logits.stride(0),
            num_experts,
            block,
            out.expert_ids.numel(),
            sizes.experts_each,
            sizes.parts,
            x,
            x_fp8,
            x_scale,
            groups,
            x_programs,
            zero,
            zero_size,
            E=num_experts,
            K=top_k,
            ROWS=sizes.rows,
            BINS=sizes.bins,
            SIGMOID=router.sigmoid,
            RENORMALISE=router.renormalise,
            GROUPS=groups_each,
            GROUP=group,
            ZERO=ZERO_BLOCK,
            EMULATE_FP8=interpreted(routed_schedule_kernel),
            num_warps=sizes.warps,
        )


class _Sizes(NamedTuple):
    rows: int
    experts_each: int
    parts: int
    bins: int
    warps: int


@functools.lru_cache(maxsize=1024)
def _sizes(num_tokens: int, num_experts: int, top_k: int) -> _Sizes:
    rows = max(triton.next_power_of_2(num_tokens), 4 // min(4, triton.next_power_of_2(top_k)))  # fewer do not compile
    experts_each = -(-num_experts // PROGRAMS)
    # One warp for a row, so that reductions stay within warps.
    return _Sizes(rows, experts_each, -(-num_experts // experts_each), _bins(num_experts), min(4, rows))
