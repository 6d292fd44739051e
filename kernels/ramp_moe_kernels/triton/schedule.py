"""The schedule: sorts routed ids by expert, and pads them to tiles of `block` slots, on the device alone.

A routed id is token * top_k + slot. The sort counts. An id's slot is a sum: the slots of earlier experts' tiles, its
expert's ids in earlier chunks, and its rank within its chunk. A chunk has at most 4096 ids.

Up to 4096 ids take one launch, in which every program counts all ids: that costs less than another launch. More ids
take two:

    launch   programs                                    write
    1        one a chunk                                 partial[chunk, :]: the chunk's histogram
    2 or 1   one a chunk and some experts                slots of their ids; in chunk 0 also padding, expert_ids
             one more                                    histogram, num_tokens_post_padded, -1 past the last tile

Nothing is added to memory, so that no buffer needs zeroing. Every word is written by one program, so that the result
does not depend on the order of programs. Further programs of the first launch quantise activations and zero an output.
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from ramp_moe.plugin import KernelError, ShapeError
from ramp_moe.spec.checks import check_gpu, check_tensor
from torch import Tensor

from ..limits import MAX_EXPERTS, MAX_IDS
from .beside import _beside, beside_of
from .gemm import _after_previous
from .launch import dependent_launch, on_device_of
from .quantise import check_quantise, interpreted

MAX_BLOCK = 256
MIN_CHUNK = 512
MAX_CHUNK = 4096
PROGRAMS = 128
"""Most sorting programs of the only launch: one per SM of a large GPU, since each of them counts all ids."""
PROGRAMS_IN_CHUNKS = 512
"""Most sorting programs of the second launch, which reads the counts: several share an SM."""

_MAX_BLOCK = tl.constexpr(MAX_BLOCK)
_PARTIALS = tl.constexpr(16)  # chunks whose histograms are loaded at a time
_TAIL = tl.constexpr(1024)
_BITS = tl.constexpr(21)  # three counts of at most MAX_IDS in an int64
_FIELD = tl.constexpr(2**21 - 1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The int32 device tensors that `schedule` fills. Larger buffers are used from the front.

    sorted_token_ids `[max_tiles * block]`: routed ids in the order of their experts, an expert's ids ascending. Padding
        is the number of ids. Nothing is written from num_tokens_post_padded on.
    expert_ids `[max_tiles]`: the expert of each tile of `block` slots; -1 after the last tile, to the buffer's end.
    num_tokens_post_padded `[1]`: slots in use, tiles * block.
    histogram `[num_experts]`: ids of each expert.
    partial: working memory, needed above 4096 ids.
    """

    sorted_token_ids: Tensor
    expert_ids: Tensor
    num_tokens_post_padded: Tensor
    histogram: Tensor
    partial: Tensor | None = None


def max_tiles(num_ids: int, num_experts: int, block: int) -> int:
    """The number of tiles in the worst routing: each expert has one id, and the other ids fill whole tiles."""
    return num_ids if num_ids <= num_experts else num_experts + (num_ids - num_experts) // block


def buffer_sizes(max_ids: int, num_experts: int, block: int) -> dict[str, int]:
    """The number of elements of each tensor of a Schedule, for up to `max_ids` routed ids.

    Raises KernelError beyond the limits of `schedule`.
    """
    if not 0 <= max_ids <= MAX_IDS:
        raise KernelError(f"the schedule takes up to {MAX_IDS} routed ids, not {max_ids}")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise KernelError(f"the schedule takes 1 to {MAX_EXPERTS} experts, not {num_experts}")
    if not 1 <= block <= MAX_BLOCK:
        raise KernelError(f"the schedule takes blocks of 1 to {MAX_BLOCK} tokens, not {block}")
    tiles = max_tiles(max_ids, num_experts, block)
    return {
        "sorted_token_ids": tiles * block,
        "expert_ids": tiles,
        "num_tokens_post_padded": 1,
        "histogram": num_experts,
        "partial": _chunks(max_ids) * _bins(num_experts) if max_ids > MAX_CHUNK else 0,
    }


def allocate(max_ids: int, num_experts: int, block: int, device: torch.device | str) -> Schedule:
    """Allocate uninitialised buffers for up to `max_ids` routed ids. Raises KernelError as `buffer_sizes` does.

    They serve every smaller batch, and other blocks if their tiles and slots fit.
    """
    sizes = buffer_sizes(max_ids, num_experts, block)
    return Schedule(**{name: torch.empty(size, dtype=torch.int32, device=device) for name, size in sizes.items()})


@triton.jit
def _load_experts(topk_ids, num_valid, first, num_ids, num_tokens, top_k, num_experts, CHUNK: tl.constexpr):
    """The routed ids from `first` on, and their experts, both int32 [4, CHUNK / 4]. Experts of skipped ids are -1.

    Neighbouring ids lie along the first axis. One thread loads them at once, and ranks them without a shuffle.
    """
    lane = tl.arange(0, CHUNK // 4)
    ids = first + tl.arange(0, 4)[:, None] + lane[None, :] * 4
    experts = tl.load(topk_ids + ids, mask=ids < num_ids, other=-1)
    live = (experts >= 0) & (experts < num_experts)  # before the cast: an int64 id must not wrap into range
    if num_valid is not None:
        # Any value is safe: it is clamped before the product, which then cannot overflow.
        live = live & (ids < tl.minimum(tl.maximum(tl.load(num_valid), 0), num_tokens) * top_k)
    return ids, tl.where(live, experts, -1).to(tl.int32)


@triton.jit
def _count(experts, BINS: tl.constexpr):
    """Count how often each expert occurs, int32 [BINS]. -1 is not counted."""
    flat = tl.ravel(experts)
    return tl.histogram(flat, BINS, mask=flat >= 0)


@triton.jit
def _read_histograms(partial, chunk, chunks, BINS: tl.constexpr):
    """Read the number of each expert's ids in all chunks, and in those before `chunk`, both int32 [BINS]."""
    bins = tl.arange(0, BINS)
    count = tl.zeros((BINS,), tl.int32)
    earlier = tl.zeros((BINS,), tl.int32)
    for first in range(0, chunks, _PARTIALS):
        row = first + tl.arange(0, _PARTIALS)[:, None]
        rows = tl.load(partial + row * BINS + bins, mask=row < chunks, other=0)
        count += tl.sum(rows, 0)
        earlier += tl.sum(tl.where(row < chunk, rows, 0), 0)
    return count, earlier


@triton.jit
def _schedule_expert(
    expert, ids, experts, tiles, count, earlier, chunk, sorted_token_ids, expert_ids, num_ids, block, BINS: tl.constexpr
):
    """Write the slots of one expert's ids in one chunk. In chunk 0, write its padding and its tiles' experts, too.

    tiles, count, earlier: int32 [BINS], every expert's tiles, ids, and ids in chunks before this one.
    """
    bins = tl.arange(0, BINS)
    # One reduction for three sums, since each costs a barrier: tiles before, own ids, own ids in earlier chunks.
    own = count.to(tl.int64) << _BITS | earlier.to(tl.int64) << 2 * _BITS
    packed = tl.sum(tl.where(bins < expert, tiles, 0) + tl.where(bins == expert, own, 0))
    first_tile = (packed & _FIELD).to(tl.int32)
    num_own = (packed >> _BITS & _FIELD).to(tl.int32)
    if num_own > 0:
        sorted_token_ids += first_tile * block
        mine = experts == expert
        one = mine.to(tl.int32)
        of_lane = tl.sum(one, 0)
        rank = (packed >> 2 * _BITS).to(tl.int32) + tl.cumsum(of_lane, 0) - of_lane
        tl.store(sorted_token_ids + rank[None, :] + tl.cumsum(one, 0) - 1, ids, mask=mine)
        if chunk == 0:
            num_tiles = tl.cdiv(num_own, block)
            padding = num_own + tl.arange(0, _MAX_BLOCK)
            tl.store(sorted_token_ids + padding, num_ids, mask=padding < num_tiles * block)
            for first in range(0, num_tiles, _MAX_BLOCK):
                tile = first + tl.arange(0, _MAX_BLOCK)
                tl.store(expert_ids + first_tile + tile, expert, mask=tile < num_tiles)


@triton.jit
def _summarise(
    tiles, count, expert_ids, num_tokens_post_padded, histogram, num_experts, block, capacity, BINS: tl.constexpr
):
    """Write histogram, num_tokens_post_padded, and -1 after the last tile to the end of expert_ids."""
    bins = tl.arange(0, BINS)
    tl.store(histogram + bins, count, mask=bins < num_experts)
    num_tiles = tl.sum(tiles)
    tl.store(num_tokens_post_padded, num_tiles * block)
    for first in range(num_tiles, capacity, _TAIL):
        tile = first + tl.arange(0, _TAIL)
        tl.store(expert_ids + tile, -1, mask=tile < capacity)


# Sizes that change with every batch must not compile a kernel each. zero_size stays specialised: it is a multiple of 16
# always, which makes stores wide.
_SIZES = ["num_ids", "num_tokens", "top_k", "num_experts", "chunks", "num_groups", "x_programs"]


@triton.jit(do_not_specialize=_SIZES)
def histogram_kernel(
    topk_ids,
    num_valid,
    partial,
    num_ids,
    num_tokens,
    top_k,
    num_experts,
    chunks,
    x,
    x_fp8,
    x_scale,
    num_groups,
    x_programs,
    zero,
    zero_size,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Do the first of two launches: write partial[chunk, :] for each of `chunks`. Programs after those do `_beside`."""
    _after_previous(PDL)
    program = tl.program_id(0)
    if program < chunks:
        _, experts = _load_experts(topk_ids, num_valid, program * CHUNK, num_ids, num_tokens, top_k, num_experts, CHUNK)
        count = _count(experts, BINS)
        tl.store(partial + program * BINS + tl.arange(0, BINS), count)
    else:
        program -= chunks
        _beside(program, x, x_fp8, x_scale, num_groups, x_programs, zero, zero_size, GROUPS, GROUP, ZERO, EMULATE_FP8)


@triton.jit(do_not_specialize=[*_SIZES, "block", "capacity", "experts_each", "parts"])
def schedule_kernel(
    topk_ids,  # int32 or int64 [num_tokens, top_k]
    num_valid,  # int32 [1], or None
    choice,  # int32 [1]: index into BLOCKS; or None
    partial,  # int32 [chunks, BINS], or None: this launch counts for itself, there is one chunk
    sorted_token_ids,
    expert_ids,
    num_tokens_post_padded,
    histogram,
    num_ids,
    num_tokens,
    top_k,
    num_experts,
    block,
    capacity,  # tiles that expert_ids has room for
    chunks,
    experts_each,  # experts of a program
    parts,  # programs of a chunk
    x,  # bf16, fp16 or float32 [num_groups, GROUP], or None
    x_fp8,
    x_scale,
    num_groups,
    x_programs,
    zero,  # any dtype, or None
    zero_size,
    CHUNK: tl.constexpr,  # a power of two, 4096 if there are several
    BINS: tl.constexpr,  # a power of two, experts or more
    BLOCKS: tl.constexpr,  # to be taken in place of `block`; or None
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sort. Program 0 does `_summarise`, the next chunks * parts sort, and those after them do `_beside`."""
    _after_previous(PDL)
    program = tl.program_id(0)
    if choice is not None:
        chosen = tl.load(choice)
        for i in tl.static_range(len(BLOCKS)):
            block = tl.where(chosen == i, BLOCKS[i], block)
    if program <= chunks * parts:
        worker = tl.maximum(program, 1) - 1
        chunk = worker // parts
        ids, experts = _load_experts(topk_ids, num_valid, chunk * CHUNK, num_ids, num_tokens, top_k, num_experts, CHUNK)
        if partial is None:
            count = _count(experts, BINS)
            earlier = tl.zeros((BINS,), tl.int32)
        else:
            count, earlier = _read_histograms(partial, chunk, chunks, BINS)
        tiles = tl.cdiv(count, block)
        if program == 0:
            _summarise(tiles, count, expert_ids, num_tokens_post_padded, histogram, num_experts, block, capacity, BINS)
        else:
            first = worker % parts * experts_each
            for expert in range(first, tl.minimum(first + experts_each, num_experts)):
                _schedule_expert(
                    expert,
                    ids,
                    experts,
                    tiles,
                    count,
                    earlier,
                    chunk,
                    sorted_token_ids,
                    expert_ids,
                    num_ids,
                    block,
                    BINS,
                )
    else:
        program -= chunks * parts + 1
        _beside(program, x, x_fp8, x_scale, num_groups, x_programs, zero, zero_size, GROUPS, GROUP, ZERO, EMULATE_FP8)


def schedule(
    topk_ids: Tensor,
    num_experts: int,
    block: int | Sequence[int],
    out: Schedule,
    *,
    choice: Tensor | None = None,
    num_valid: Tensor | None = None,
    quantise: tuple[Tensor, Tensor, Tensor] | None = None,
    zero: Tensor | None = None,
) -> None:
    """Fill `out` for a batch: one launch up to 4096 ids, two above.

    topk_ids: contiguous int32 or int64 `[T, k]`. Ids outside [0, num_experts) are skipped: they get no slot.
    block: slots of a tile. If there are several, `out` must have room for any.
    choice: int32 `[1]`, index of the block to take. None with a single block.
    num_valid: int32 `[1]` on the device. Ids of tokens from there on are skipped, as padding of captured batches.
    quantise: (x, x_fp8, x_scale), which the first launch quantises as `quantise` does.
    zero: contiguous tensor, which the first launch sets to zero.

    The launches depend on sizes alone. Nothing is allocated and the host does not wait, so CUDA graphs can hold them.
    The sort is stable and deterministic. Takes up to 2^20 ids, 1024 experts and blocks of 1 to 256. Raises KernelError
    beyond that, for buffers that are too small, and for wrong dtypes, strides and devices. Raises ShapeError for shapes
    that do not fit.
    """
    if topk_ids.ndim != 2:
        raise ShapeError(f"topk_ids must be [T, k], not {list(topk_ids.shape)}")
    tokens, top_k = topk_ids.shape
    num_ids = tokens * top_k
    check_tensor("topk_ids", topk_ids, (tokens, top_k), (torch.int32, torch.int64), topk_ids.device)
    blocks = (block,) if isinstance(block, int) else tuple(block)
    for size in blocks:
        _check_out(out, num_ids, num_experts, size, topk_ids.device)
    if (choice is None) != (len(blocks) == 1):
        raise KernelError(f"several blocks and a choice among them belong together; blocks are {list(blocks)}")
    if choice is not None:
        check_tensor("the choice", choice, (1,), (torch.int32,), topk_ids.device)
    if num_valid is not None:
        check_tensor("num_valid", num_valid, (1,), (torch.int32,), topk_ids.device)
    if quantise is not None:
        check_quantise(*quantise, topk_ids.device)
    if zero is not None:
        check_tensor("the tensor to zero", zero, tuple(zero.shape), (zero.dtype,), topk_ids.device)
    if not interpreted(schedule_kernel):
        check_gpu("topk_ids", topk_ids)
    launch_schedule(topk_ids, num_experts, blocks, out, choice, num_valid, quantise, zero)


def launch_schedule(
    topk_ids: Tensor,
    num_experts: int,
    blocks: tuple[int, ...],
    out: Schedule,
    choice: Tensor | None = None,
    num_valid: Tensor | None = None,
    quantise: tuple[Tensor, Tensor, Tensor] | None = None,
    zero: Tensor | None = None,
) -> None:
    """Do what `schedule` does, without checks. `out` has the sizes of `buffer_sizes`."""
    tokens, top_k = topk_ids.shape
    num_ids = tokens * top_k
    split = _split(num_ids, num_experts)
    beside, programs = beside_of(quantise, zero)
    constants = {
        "CHUNK": split.chunk,
        "BINS": split.bins,
        "num_warps": split.warps,
        **dependent_launch(topk_ids.device),
    }
    with on_device_of(topk_ids):
        if split.chunks > 1:
            histogram_kernel[(split.chunks + programs,)](
                topk_ids, num_valid, out.partial, num_ids, tokens, top_k, num_experts, split.chunks, **beside,
                **constants,
            )  # fmt: skip
            beside, programs = beside_of(None, None)
        schedule_kernel[(1 + split.chunks * split.parts + programs,)](
            topk_ids,
            num_valid,
            choice,
            out.partial if split.chunks > 1 else None,
            out.sorted_token_ids,
            out.expert_ids,
            out.num_tokens_post_padded,
            out.histogram,
            num_ids,
            tokens,
            top_k,
            num_experts,
            blocks[0],
            out.expert_ids.numel(),
            split.chunks,
            split.experts_each,
            split.parts,
            BLOCKS=None if choice is None else blocks,
            **beside,
            **constants,
        )


class Split(NamedTuple):
    """The programs that sort: `parts` for each of `chunks` chunks of `chunk` ids. Each takes `experts_each` experts."""

    chunks: int
    chunk: int
    experts_each: int
    parts: int
    bins: int
    warps: int


@functools.lru_cache(maxsize=1024)
def _split(num_ids: int, num_experts: int) -> Split:
    chunks = _chunks(num_ids)
    chunk = MAX_CHUNK if chunks > 1 else max(MIN_CHUNK, triton.next_power_of_2(num_ids))
    experts_each = -(-num_experts * chunks // (PROGRAMS if chunks == 1 else PROGRAMS_IN_CHUNKS))
    return Split(chunks, chunk, experts_each, -(-num_experts // experts_each), _bins(num_experts), _warps(chunk))


def _chunks(num_ids: int) -> int:
    return max(1, -(-num_ids // MAX_CHUNK))


def _warps(chunk: int) -> int:
    return 4 if chunk <= 1024 else 8


def _bins(num_experts: int) -> int:
    """Counters of a histogram: a power of two, and at least one for each lane of the widest wave."""
    return int(max(64, triton.next_power_of_2(num_experts)))


def _check_out(out: Schedule, num_ids: int, num_experts: int, block: int, device: torch.device) -> None:
    for name, size in buffer_sizes(num_ids, num_experts, block).items():
        buffer: Tensor | None = getattr(out, name)
        has = 0 if buffer is None else buffer.numel()
        if has < size:
            raise KernelError(
                f"the schedule's {name} holds {has} of the {size} elements that {num_ids} ids of {num_experts} experts "
                f"in blocks of {block} can need: allocate more"
            )
        if buffer is not None:
            check_tensor(f"the schedule's {name}", buffer, tuple(buffer.shape), (torch.int32,), device)
