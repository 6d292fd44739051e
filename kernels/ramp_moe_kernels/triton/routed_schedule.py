"""Routes and schedules a small batch in one launch: router logits in, top-k and the schedule of its ids out.

The first program does all of it, since other programs could not see its choice. The others quantise activations and
zero an output, as those of `schedule` do. The first keeps a matrix in registers, a row for each token:

    score   float32 [ROWS, P]   of each expert; P = experts, padded to a power of two
    slot    int32 [ROWS, P]     the slot of the token's top-k that the expert has; -1 without one
    rank    int32 [ROWS, P]     the earlier tokens that chose the expert, since a token chooses an expert once

Everything else are sums along an axis of that matrix. The rules are those of vLLM's top-k operators:

- Experts are ordered by their scores, not by logits, since unequal logits can have equal scores. Of equal scores the
  lowest expert is first.
- Scores that are NaN or infinite count as 0. A NaN in a row makes all its softmax scores NaN.
- Weights are renormalised by their sum in the order of the top-k. A sum of 0 is left alone.
- A padding row has ids of -1, and is not scheduled.
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from ramp_moe.plugin import RouterLogits
from torch import Tensor

from .beside import _beside, beside_of
from .gemm import _after_previous
from .launch import dependent_launch, on_device_of
from .router import UNROLLED_TOP_K, _best
from .schedule import Schedule, _summarise

MAX_TOKENS = 64
"""Most tokens of a batch. From about there on, a launch for the top-k and one for the schedule take less time."""
MAX_SCORES = 8192
"""Most scores, tokens and experts both padded to powers of two: one program keeps them in registers."""

_PADDING = tl.constexpr(16)  # slots of padding that are written at a time


@triton.jit
def _scores(logits, SIGMOID: tl.constexpr):
    """The score of each logit, float32 [ROWS, P]. What is NaN or infinite is 0."""
    if SIGMOID:
        scores = tl.div_rn(tl.full(logits.shape, 1.0, tl.float32), 1.0 + tl.exp(-logits))
    else:
        scores = tl.exp(logits - tl.max(logits, 1)[:, None])
        total = tl.sum(scores, 1)
        scores *= tl.div_rn(tl.full(total.shape, 1.0, tl.float32), total)[:, None]
    return tl.where(tl.abs(scores) < float("inf"), scores, 0.0)


@triton.jit
def _take(merit, expert, ids, chosen, slot, k):
    """Put the best expert of each row into slot k of ids, and its merit into that of chosen. Exclude it from merit."""
    best, pick = _best(merit, expert)
    ids = tl.where(slot == k, pick[:, None], ids)
    chosen = tl.where(slot == k, best[:, None], chosen)
    return tl.where(expert == pick[:, None], -1, merit), ids, chosen


@triton.jit
def _schedule_choice(
    ids,
    one,
    live,
    sorted_token_ids,
    expert_ids,
    num_tokens_post_padded,
    histogram,
    num_tokens,
    block,
    capacity,
    E: tl.constexpr,
    K: tl.constexpr,
):
    """Write the schedule of the live rows' ids [ROWS, SLOTS]. one: int32 [ROWS, P], 1 for each expert chosen."""
    count = tl.sum(one, 0)
    tiles = tl.cdiv(count, block)
    first_tile = tl.cumsum(tiles, 0) - tiles
    first = first_tile * block
    place = tl.gather(first[None, :] + tl.cumsum(one, 0) - one, ids, 1)
    slot = tl.arange(0, ids.shape[1])[None, :]
    routed = tl.arange(0, ids.shape[0])[:, None] * K + slot
    tl.store(sorted_token_ids + place, routed, mask=live & (slot < K))
    short = tiles * block - count
    for at in range(0, block, _PADDING):
        padding = at + tl.arange(0, _PADDING)[None, :]
        tl.store(sorted_token_ids + (first + count)[:, None] + padding, num_tokens * K, mask=padding < short[:, None])
    expert = tl.arange(0, one.shape[1])
    for tile in range(tl.cdiv(num_tokens, block)):
        tl.store(expert_ids + first_tile + tile, expert, mask=tile < tiles)
    _summarise(tiles, count, expert_ids, num_tokens_post_padded, histogram, E, block, capacity, one.shape[1])


@triton.jit(do_not_specialize=["num_tokens", "block", "capacity", "num_groups", "x_programs"])
def routed_schedule_kernel(
    logits,  # [T, E], rows `stride` elements apart
    padding,  # bool [T], or None
    topk_weights,  # float32 [T, K]
    topk_ids,  # int32 [T, K]
    sorted_token_ids,  # as the next three of a Schedule, or None
    expert_ids,
    num_tokens_post_padded,
    histogram,
    num_tokens,
    stride,
    block,
    capacity,  # tiles that expert_ids has room for
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
    P: tl.constexpr,  # a power of two, E or more
    SLOTS: tl.constexpr,  # a power of two, K or more
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    UNROLL: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program 0 routes and schedules. Those after it do `_beside`."""
    _after_previous(PDL)
    program = tl.program_id(0)
    if program == 0:
        row = tl.arange(0, ROWS)[:, None]
        expert = tl.arange(0, P)[None, :]
        real, exists = row < num_tokens, expert < E
        given = tl.load(logits + row * stride + expert, mask=real & exists, other=-float("inf"))
        scores = _scores(given.to(tl.float32), SIGMOID)
        merit = tl.where(exists, scores.to(tl.int32, bitcast=True), -1)  # no score is negative: integers order them
        slot = tl.arange(0, SLOTS)[None, :]
        ids = tl.zeros((ROWS, SLOTS), tl.int32)
        chosen = tl.zeros((ROWS, SLOTS), tl.int32)
        if UNROLL:
            for k in tl.static_range(K):
                merit, ids, chosen = _take(merit, expert, ids, chosen, slot, k)
        else:
            for k in range(K):
                merit, ids, chosen = _take(merit, expert, ids, chosen, slot, k)
        weights = chosen.to(tl.float32, bitcast=True)
        if RENORMALISE:
            total = tl.sum(weights, 1)
            total = tl.where(total > 0, total, 1.0)
            weights *= tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), total)[:, None]
        live = real
        if padding is not None:
            live = real & (tl.load(padding + row, mask=real, other=1) == 0)
        at, written = row * K + slot, real & (slot < K)
        tl.store(topk_weights + at, weights, mask=written)
        tl.store(topk_ids + at, tl.where(live, ids, -1), mask=written)
        if sorted_token_ids is not None:
            one = ((merit < 0) & exists & live).to(tl.int32)
            _schedule_choice(
                ids, one, live, sorted_token_ids, expert_ids, num_tokens_post_padded, histogram, num_tokens, block,
                capacity, E, K,
            )  # fmt: skip
    else:
        _beside(
            program - 1, x, x_fp8, x_scale, num_groups, x_programs, zero, zero_size, GROUPS, GROUP, ZERO, EMULATE_FP8
        )


def takes(num_tokens: int, num_experts: int, top_k: int) -> bool:
    """Whether one launch can route and schedule a batch, and takes less time than two."""
    if not (1 <= num_tokens <= MAX_TOKENS and 1 <= top_k <= num_experts):
        return False
    return bool(triton.next_power_of_2(num_tokens) * triton.next_power_of_2(num_experts) <= MAX_SCORES)


def launch_routed_schedule(
    router: RouterLogits,
    topk_ids: Tensor,
    topk_weights: Tensor,
    block: int = 1,
    out: Schedule | None = None,
    quantise: tuple[Tensor, Tensor, Tensor] | None = None,
    zero: Tensor | None = None,
) -> None:
    """Choose the experts of a batch that `takes` allows, and fill `out` for them as `schedule` does, in one launch.

    topk_ids: contiguous int32 `[T, k]`, which is written, -1 in padding rows.
    topk_weights: contiguous float32 `[T, k]`, which is written.
    out: has the sizes of `buffer_sizes`. None if the ids alone are wanted.
    quantise and zero: as of `schedule`.

    Nothing is checked or allocated, and the host does not wait.
    """
    (tokens, top_k), experts = topk_ids.shape, router.logits.shape[1]
    rows, wide = triton.next_power_of_2(tokens), triton.next_power_of_2(experts)
    warps = _warps(rows * wide)
    beside, programs = beside_of(quantise, zero, warps)
    plan: tuple[Tensor | None, ...] = (None,) * 4
    if out is not None:
        plan = out.sorted_token_ids, out.expert_ids, out.num_tokens_post_padded, out.histogram
    with on_device_of(topk_ids):
        routed_schedule_kernel[(1 + programs,)](
            router.logits,
            router.padding,
            topk_weights,
            topk_ids,
            *plan,
            tokens,
            router.logits.stride(0),
            block,
            0 if out is None else out.expert_ids.numel(),
            E=experts,
            K=top_k,
            ROWS=rows,
            P=wide,
            SLOTS=triton.next_power_of_2(top_k),
            SIGMOID=router.sigmoid,
            RENORMALISE=router.renormalise,
            UNROLL=top_k <= UNROLLED_TOP_K,
            num_warps=warps,
            **dependent_launch(topk_ids.device),
            **beside,
        )


def _warps(scores: int) -> int:
    """One for each row that fits into the registers' first loads, so that few reductions leave a warp."""
    return max(1, min(16, scores // 256))
