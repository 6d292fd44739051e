"""The schedule of a launch that works off a list of items: sorts routed ids by expert, and plans the items.

The plan is that of `ramp_moe.spec.item_plan`, which defines the rule. The sort has no padding: an item says how many of
its block's slots it has. So sort and plan depend on the histogram alone, not on each other, and run side by side:

    launch   programs                                    write
    1        one a chunk                                 partial[chunk, :]: the chunk's histogram
    2 or 1   one a chunk and some experts                sorted_token_ids: their ids
             one for some experts                        items: theirs; the first one num_items, too

Up to 4096 ids take one launch. Every program that plans compares all limits for itself, and so finds the same plan.
Every word is written by one program, so that the list does not depend on the order of programs. Further programs of the
first launch quantise activations and zero an output.
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from ramp_moe.plugin import PlanTable
from ramp_moe.spec.item_plan import MAX_TOKENS, ROWS
from torch import Tensor

from ..reference import GROUP
from .launch import on_device_of
from .quantise import groups_per_program, interpreted
from .schedule import (
    _NOTHING,
    PROGRAMS,
    ZERO_BLOCK,
    _beside,
    _bins,
    _chunks,
    _count,
    _load_experts,
    _read_histograms,
    _split,
    histogram_kernel,
)

_MAX_TOKENS = tl.constexpr(MAX_TOKENS)
_ROWS = tl.constexpr(ROWS)
_WORDS = tl.constexpr(256)
"""Words of the list that are written at a time."""
# What is known of an expert, in 64 bits, since each reduction costs a barrier: the index of its block in 4 bits, the time
# of its longest item in 13, then its items; or its tokens in 21, and those of experts before it.
_TIME = tl.constexpr(4)
_ITEMS = tl.constexpr(17)
_BEFORE = tl.constexpr(38)
_CODE_FIELD = tl.constexpr(2**4 - 1)
_TIME_FIELD = tl.constexpr(2**13 - 1)
_TOKENS_FIELD = tl.constexpr(2**21 - 1)


@dataclass(frozen=True, slots=True)
class ItemSchedule:
    """The int32 device tensors that `launch_item_schedule` fills.

    sorted_token_ids `[num_ids]`: routed ids in the order of their experts, an expert's ids ascending.
    items `[capacity, 4]`: first slot, expert + (index of the block << 16), first column, width + (slots << 16).
    num_items `[1]`: items in use.
    partial: working memory, needed above 4096 ids.
    """

    sorted_token_ids: Tensor
    items: Tensor
    num_items: Tensor
    partial: Tensor


def item_buffer_sizes(max_ids: int, num_experts: int, table: PlanTable) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of an ItemSchedule, for up to `max_ids` routed ids."""
    chunks = _chunks(max_ids)
    return {
        "sorted_token_ids": (max_ids,),
        "items": (table.capacity(max_ids, num_experts), 4),
        "num_items": (1,),
        "partial": (chunks * _bins(num_experts) if chunks > 1 else 0,),
    }


def device_table(table: PlanTable, device: torch.device | str) -> Tensor:
    """The table for the planning programs, int32 `[4 * blocks * ROWS + blocks]`: see `_field`."""
    fields = (table.cost, table.parts, table.longest, table.width)
    words = np.concatenate([*(field.T.ravel() for field in fields), table.blocks])
    return torch.from_numpy(words.astype(np.int32)).to(device)


@triton.jit
def _field(table, field, code, row, BLOCKS: tl.constexpr):
    """A field of a block and a limit: 0 cost, 1 parts, 2 longest, 3 width; 4 the block itself, with row 0."""
    return tl.load(table + (field * len(BLOCKS) + code) * _ROWS + row)


@triton.jit
def _sort_expert(expert, ids, experts, count, earlier, sorted_token_ids, BINS: tl.constexpr):
    """Write one expert's ids in one chunk. count, earlier: int32 [BINS], all ids, and those in chunks before."""
    bins = tl.arange(0, BINS)
    first = tl.sum(tl.where(bins < expert, count, tl.where(bins == expert, earlier, 0)))
    mine = experts == expert
    one = mine.to(tl.int32)
    of_lane = tl.sum(one, 0)
    rank = first + tl.cumsum(of_lane, 0) - of_lane
    tl.store(sorted_token_ids + rank[None, :] + tl.cumsum(one, 0) - 1, ids, mask=mine)


@triton.jit
def _choose_limit(count, table, capacity, slots, BLOCKS: tl.constexpr, BINS: tl.constexpr, CLAMP: tl.constexpr):
    """Choose the limit with the least score. Returns its index, the number of items, and of each expert the items, the
    time of the longest, and the index of its block."""
    row = tl.arange(0, _ROWS)
    best = tl.full((_ROWS, BINS), 2**31 - 1, tl.int32)
    work = best
    items = tl.zeros((_ROWS, BINS), tl.int32)
    longest = items
    code = items
    for i in tl.static_range(len(BLOCKS)):
        cost = _field(table, 0, i, row, BLOCKS)[:, None]
        parts = _field(table, 1, i, row, BLOCKS)[:, None]
        time = _field(table, 2, i, row, BLOCKS)[:, None]
        tiles = ((count + (BLOCKS[i] - 1)) // BLOCKS[i])[None, :]
        total = tiles * cost
        compared = total
        if CLAMP:  # a wrong block is as good for many tokens, and products stay within 32 bits
            compared = tl.minimum(tiles, (_MAX_TOKENS + BLOCKS[i] - 1) // BLOCKS[i]) * cost
        better = compared < best
        best = tl.where(better, compared, best)
        if CLAMP:
            work = tl.where(better, total, work)
        else:
            work = best
        items = tl.where(better, tiles * parts, items)
        longest = tl.where(better, time, longest)
        code = tl.where(better, i, code)
    longest = tl.where(count[None, :] > 0, longest, 0)
    both = tl.sum(work.to(tl.int64) << 32 | items.to(tl.int64), 1)
    num_items = (both & 0xFFFFFFFF).to(tl.int32)
    rounds = tl.cdiv(num_items, slots).to(tl.float32)
    mean = tl.div_rn(rounds * (both >> 32).to(tl.int32).to(tl.float32), tl.maximum(num_items, 1).to(tl.float32))
    score = tl.maximum(tl.max(longest, 1).to(tl.float32), mean)
    chosen = tl.argmin(tl.where(num_items <= capacity, score, float("inf")), 0)
    packed = items.to(tl.int64) << _ITEMS | (longest << _TIME | code).to(tl.int64)
    own = tl.sum(tl.where(row[:, None] == chosen, packed, 0), 0)
    return (
        chosen,
        tl.sum(tl.where(row == chosen, num_items, 0)),
        (own >> _ITEMS).to(tl.int32),
        (own >> _TIME & _TIME_FIELD).to(tl.int32),
        (own & _CODE_FIELD).to(tl.int32),
    )


@triton.jit
def _list_expert(
    expert, count, limit, of_each, longest, code, table, list, columns, BLOCKS: tl.constexpr, BINS: tl.constexpr
):
    """Write the items of one expert. of_each, longest, code: int32 [BINS], of every expert as `_choose_limit` says."""
    bins = tl.arange(0, BINS)
    own = count.to(tl.int64) << _ITEMS | (longest << _TIME | code).to(tl.int64)
    before = count.to(tl.int64) << _BEFORE
    packed = tl.sum(tl.where(bins == expert, own, tl.where(bins < expert, before, 0)))
    block_code = (packed & _CODE_FIELD).to(tl.int32)
    time = (packed >> _TIME & _TIME_FIELD).to(tl.int32)
    tokens = (packed >> _ITEMS & _TOKENS_FIELD).to(tl.int32)
    slot = (packed >> _BEFORE).to(tl.int32)
    if tokens > 0:
        parts = _field(table, 1, block_code, limit, BLOCKS)
        width = _field(table, 3, block_code, limit, BLOCKS)
        block = tl.load(table + 4 * len(BLOCKS) * _ROWS + block_code)
        earlier = (longest > time) | ((longest == time) & (bins < expert))
        list += tl.sum(tl.where(earlier, of_each, 0)) * 4
        words = tl.cdiv(tokens, block) * parts * 4
        for first in range(0, words, _WORDS):
            word = first + tl.arange(0, _WORDS)
            item, field = word // 4, word % 4
            tile = item // parts
            column = (item - tile * parts) * width
            sizes = tl.minimum(width, columns - column) | (tl.minimum(block, tokens - tile * block) << 16)
            value = tl.where(field == 2, column, sizes)
            value = tl.where(field == 1, expert | (block_code << 16), value)
            value = tl.where(field == 0, slot + tile * block, value)
            tl.store(list + word, value, mask=word < words)


# Sizes that change with every batch must not compile a kernel each. zero_size stays specialised, as in `schedule`.
_SIZES = ["num_ids", "num_tokens", "top_k", "num_experts", "chunks", "num_groups", "x_programs"]


@triton.jit(do_not_specialize=[*_SIZES, "experts_each", "parts", "planned_each", "planning", "columns", "capacity", "slots"])
def item_kernel(
    topk_ids,  # int32 or int64 [num_tokens, top_k]
    num_valid,  # int32 [1], or None
    partial,  # int32 [chunks, BINS], or None: this launch counts for itself, there is one chunk
    table,  # as of device_table
    sorted_token_ids,
    list,  # int32 [capacity, 4]
    num_items,
    num_ids,
    num_tokens,
    top_k,
    num_experts,
    chunks,
    experts_each,  # experts that a program sorts
    parts,  # programs of a chunk
    planned_each,  # experts whose items a program lists
    planning,  # programs that plan
    columns,
    capacity,
    slots,
    x,  # as of schedule_kernel
    x_fp8,
    x_scale,
    num_groups,
    x_programs,
    zero,
    zero_size,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
):
    """Plan with the first programs, sort with the next chunks * parts. Those after them do `_beside`."""
    program = tl.program_id(0)
    if program < planning + chunks * parts:
        worker = tl.maximum(program - planning, 0)
        chunk = worker // parts
        ids, experts = _load_experts(topk_ids, num_valid, chunk * CHUNK, num_ids, num_tokens, top_k, num_experts, CHUNK)
        if partial is None:
            count = _count(experts, BINS)
            earlier = tl.zeros((BINS,), tl.int32)
        else:
            count, earlier = _read_histograms(partial, chunk, chunks, BINS)
        if program < planning:
            limit, total, of_each, longest, code = _choose_limit(
                count, table, capacity, slots, BLOCKS, BINS, partial is not None
            )
            if program == 0:
                tl.store(num_items, total)
            first = program * planned_each
            for expert in range(first, tl.minimum(first + planned_each, num_experts)):
                _list_expert(expert, count, limit, of_each, longest, code, table, list, columns, BLOCKS, BINS)
        else:
            first = worker % parts * experts_each
            for expert in range(first, tl.minimum(first + experts_each, num_experts)):
                _sort_expert(expert, ids, experts, count, earlier, sorted_token_ids, BINS)
    else:
        program -= planning + chunks * parts
        _beside(program, x, x_fp8, x_scale, num_groups, x_programs, zero, zero_size, GROUPS, GROUP, ZERO, EMULATE_FP8)


def launch_item_schedule(
    topk_ids: Tensor,
    num_experts: int,
    table: PlanTable,
    on_device: Tensor,
    out: ItemSchedule,
    num_valid: Tensor | None = None,
    quantise: tuple[Tensor, Tensor, Tensor] | None = None,
    zero: Tensor | None = None,
) -> None:
    """Fill `out` for a batch. Nothing is checked: `out` has the shapes of `item_buffer_sizes`.

    on_device: `device_table` of the table. The other arguments are as of `schedule`.
    """
    tokens, top_k = topk_ids.shape
    num_ids = tokens * top_k
    split = _split(num_ids, num_experts)
    planned_each = -(-num_experts // PROGRAMS)
    planning = -(-num_experts // planned_each)
    x, x_fp8, x_scale = quantise or (None, None, None)
    groups = groups_each = group = x_programs = 0
    if x is not None and x_scale is not None:
        groups = x_scale.numel()
        group = x.numel() // groups if groups else GROUP
        groups_each = groups_per_program(groups)
        x_programs = -(-groups // groups_each)
    zero_size = 0 if zero is None else zero.numel()
    beside = (x, x_fp8, x_scale, groups, x_programs, zero, zero_size)
    beside_programs = x_programs + -(-zero_size // ZERO_BLOCK)
    constants = {
        "CHUNK": split.chunk,
        "BINS": split.bins,
        "GROUPS": groups_each,
        "GROUP": group,
        "ZERO": ZERO_BLOCK,
        "EMULATE_FP8": interpreted(item_kernel),
        "num_warps": split.warps,
    }
    with on_device_of(topk_ids):
        if split.chunks > 1:
            histogram_kernel[(split.chunks + beside_programs,)](
                topk_ids, num_valid, out.partial, num_ids, tokens, top_k, num_experts, split.chunks, *beside,
                **constants,
            )  # fmt: skip
            beside, beside_programs = _NOTHING, 0
            constants |= {"GROUPS": 0, "GROUP": 0}
        item_kernel[(planning + split.chunks * split.parts + beside_programs,)](
            topk_ids,
            num_valid,
            out.partial if split.chunks > 1 else None,
            on_device,
            out.sorted_token_ids,
            out.items,
            out.num_items,
            num_ids,
            tokens,
            top_k,
            num_experts,
            split.chunks,
            split.experts_each,
            split.parts,
            planned_each,
            planning,
            table.columns,
            out.items.shape[0],
            table.slots,
            *beside,
            BLOCKS=table.blocks,
            **constants,
        )
