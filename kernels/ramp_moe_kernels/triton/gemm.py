"""The common part of a MoE layer's grouped GEMMs `up_kernel` (gate and up, then the activation) and `down_kernel`.

Both launch one CTA for each (M-tile, row tile, split of the reduction). An M-tile is BM slots of one expert, as
`schedule` lays them out. CTAs past the last tile exit at once, so that the host need not count tiles for the grid.

    sorted_token_ids  routed id (token * top_k + slot) of each row, num_ids for padding
    expert_ids        the tile's expert, -1 past the last tile

A launch may have several configurations (`config.Variant`), of which an integer on the device chooses one. Each is a
branch of the kernel. Registers and shared memory are those of the branch that takes most.

For tiny batches there is a direct path without a schedule: each routed id is an M-tile of its own, with one live row.

Layout of one step along the reduction, for the plain and the swapped operands:

    plain    acc [BM, BN] += x [BM, BK] @ w [BN, BK].T      tokens are M: mma for BM < 64, wgmma from 64 on
    SWAP     acc [BN, BM] += w [BN, BK] @ x [BM, BK].T      weight rows are M: wgmma with few tokens as N

fp8: BK is the group of activations that share a scale. So each step has one scale per token (xs) and one per weight
tile (ws), and acc += dot * xs * ws. Products of two fp8 values are summed in float32 within a step and promoted after
it. A weight tile lies in one [SCALE, SCALE] block; blocks of gate and of up each count from their first row. RAGGED:
the intermediate size is no multiple of SCALE, so the last block of rows of gate, and of up, is short.
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(tiles, rows, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """The M-tile and row tile of this CTA.

    GROUP_M M-tiles run side by side before the next row tile. So the weights of an expert with several tiles are read
    while they are still in L2.
    """
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BN)
    group = pid // (GROUP_M * row_tiles)
    first = group * GROUP_M
    size = min(tiles - first, GROUP_M)
    inside = pid % (GROUP_M * row_tiles)
    return first + inside % size, inside // size


@triton.jit
def _most_tiles(num_ids, num_experts, BM: tl.constexpr):
    """Compute what `max_tiles` computes on the host."""
    return tl.minimum(num_ids, num_experts + tl.maximum(num_ids - num_experts, 0) // BM)


@triton.jit
def _is_chosen(choice, rows, num_ids, num_experts, VARIANTS: tl.constexpr, V: tl.constexpr):
    """Whether this CTA runs VARIANTS[V]: it is chosen, and its grid, which may be smaller than another's, has this
    CTA."""
    C: tl.constexpr = VARIANTS[V]
    tiles = _most_tiles(num_ids, num_experts, C.BM)
    return (choice == V) & (tl.program_id(0) < tiles * tl.cdiv(rows, C.BN))


@triton.jit
def _sorted_ids(m, sorted_token_ids_ptr, expert_ids_ptr, num_ids, num_experts, BM: tl.constexpr, DIRECT: tl.constexpr):
    """The expert and the routed ids [BM] of M-tile m. The expert is -1 if there is nothing to do.

    DIRECT: there is no schedule. Each routed id is a tile of its own, and expert_ids_ptr has the top-k ids themselves.
    """
    expert = tl.load(expert_ids_ptr + m).to(tl.int64)
    if DIRECT:
        expert = tl.where(expert < num_experts, expert, -1)
        ids = tl.where(tl.arange(0, BM) == 0, m, num_ids)
    else:
        ids = tl.load(sorted_token_ids_ptr + m * BM + tl.arange(0, BM))
    return expert, ids


@triton.jit
def _after_previous(PDL: tl.constexpr):
    """Wait for the writes of the kernel before, then let the next one start.

    With programmatic dependent launch (PDL; NVIDIA, sm_90 on), this kernel was started while the one before still ran.
    Without it the launch itself waits.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _zeros(C: tl.constexpr):
    """A zero accumulator, float32 [BM, BN], or [BN, BM] if SWAP."""
    if C.SWAP:
        acc = tl.full((C.BN, C.BM), 0, tl.float32)
    else:
        acc = tl.full((C.BM, C.BN), 0, tl.float32)
    return acc


@triton.jit
def _load_x(ptrs, live, left, C: tl.constexpr):
    """Load activations [BM, BK] of the live rows. left: columns left in the reduction."""
    if C.EVEN_K:
        x = tl.load(ptrs, mask=live[:, None], other=0.0)
    else:
        x = tl.load(ptrs, mask=live[:, None] & (tl.arange(0, C.BK) < left), other=0.0)
    return x


@triton.jit
def _load_w(ptrs, left, C: tl.constexpr):
    """Load weights [BN, BK]. left: columns left in the reduction."""
    if C.EVEN_K:
        w = tl.load(ptrs)
    else:
        w = tl.load(ptrs, mask=(tl.arange(0, C.BK) < left)[None, :], other=0.0)
    return w


@triton.jit
def _product(x, w, SWAP: tl.constexpr, EMULATE: tl.constexpr):
    """Multiply x [BM, BK] and w [BN, BK]: [BM, BN], or [BN, BM] if SWAP.

    EMULATE is for the interpreter, whose dot is wrong for anything but float32.
    """
    if EMULATE:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    if SWAP:
        out = tl.dot(w, x.T)
    else:
        out = tl.dot(x, w.T)
    return out


@triton.jit
def _scaled(part, xs, ws, SWAP: tl.constexpr):
    """Apply the tokens' scales and the weight tile's."""
    if SWAP:
        out = part * (xs * ws)[None, :]
    else:
        out = part * (xs * ws)[:, None]
    return out


@triton.jit
def _scale_blocks(I, SCALE: tl.constexpr, RAGGED: tl.constexpr):  # noqa: E741
    """The number of blocks of SCALE rows or columns in I."""
    if RAGGED:
        blocks = tl.cdiv(I, SCALE)
    else:
        blocks = I // SCALE
    return blocks


@triton.jit
def _weight_scale(ptr, step, BK: tl.constexpr, SCALE: tl.constexpr):
    """The weight tile's scale. If each step has a scale of its own, ptr has moved to it; else ptr is at the first."""
    if BK == SCALE:
        scale = tl.load(ptr)
    else:
        scale = tl.load(ptr + step // SCALE)
    return scale
