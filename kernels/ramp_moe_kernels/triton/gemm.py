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
the intermediate size is no multiple of SCALE, so that each half's last block of rows is short. SCALE = 0: each weight
row has one scale, which its sums are multiplied with at the end.

PACKED: weights of 4 bits, two in a byte, the first in the low half. SCALE columns of a row share a scale. A tile is
loaded as bytes, and becomes the activations' dtype in registers, multiplied with its scales in float32.
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
def _int4(code):
    """code - 8 as float32, for int32 codes of 0 to 15: put into the mantissa of 2^23, where a step is 1."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def _e2m1(code):
    """float32 of int32 codes: sign, two bits of exponent, one of mantissa. Exponent 0 has no leading one: 0 and 0.5."""
    size = code & 7
    value = ((size << 22) + 0x3F000000).to(tl.float32, bitcast=True)
    value = tl.where(size < 2, 2 * value - 1, value)
    return tl.where(code < 8, value, -value)


@triton.jit
def _e8m0(byte):
    """float32 2^(byte - 127), of which the smallest is subnormal; 255 is NaN."""
    bits = byte.to(tl.int32) << 23
    bits = tl.where(bits == 0, 0x00400000, tl.where(byte == 255, 0x7FC00000, bits))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _row_bytes(columns):
    """Bytes of a row of 4-bit weights, of whole groups of 32: what is said of them decides how wide loads are."""
    return tl.multiple_of(columns // 2, 16)


@triton.jit
def _load_packed(ptrs, s_ptrs, step, left, dtype: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
                 SCALE: tl.constexpr):  # fmt: skip
    """Weights [BN, BK] of 4 bits as `dtype`, of which `left` columns are left in the reduction.

    ptrs [BN, BK / 2] point at the step's bytes, s_ptrs [BN] at the rows' first scales.
    """
    HALF: tl.constexpr = C.BK // 2
    GROUPS: tl.constexpr = C.BK // SCALE if C.BK > SCALE else 1
    group = tl.arange(0, GROUPS)
    s_ptrs = s_ptrs[:, None] + (step // SCALE + group)[None, :]
    if C.EVEN_K:
        packed = tl.load(ptrs)
        scale = tl.load(s_ptrs)
    else:
        packed = tl.load(ptrs, mask=(tl.arange(0, HALF) < left // 2)[None, :], other=0)
        scale = tl.load(s_ptrs, mask=(group * SCALE < left)[None, :], other=0)
    low = (packed & 15).to(tl.int32)
    high = (packed >> 4).to(tl.int32)
    if PACKED == "int4":
        low = _int4(low)
        high = _int4(high)
        scale = scale.to(tl.float32)
    else:
        tl.static_assert(PACKED == "e2m1")
        low = _e2m1(low)
        high = _e2m1(high)
        scale = _e8m0(scale)
    scale = tl.broadcast_to(scale[:, :, None], (C.BN, GROUPS, HALF // GROUPS)).reshape(C.BN, HALF)
    return tl.interleave((low * scale).to(dtype), (high * scale).to(dtype))


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
    """The weight tile's scale. ptr follows the steps if each has a scale of its own, else it stays at the first.
    1 if rows have scales, which are applied at the end."""
    if SCALE == 0:
        scale = 1.0
    elif BK == SCALE:
        scale = tl.load(ptr)
    else:
        scale = tl.load(ptr + step // SCALE)
    return scale
