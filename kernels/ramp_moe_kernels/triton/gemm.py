"""The two grouped GEMMs of a MoE layer: gate and up with the activation fused, and down with the routing weight.

Both launch one CTA for each (M-tile, row tile, split of the reduction). An M-tile is BM slots of one expert, as
`schedule` lays them out; CTAs past the last tile exit at once, so that the grid needs no count on the host.

    sorted_token_ids  routed id (token * top_k + slot) of each row, num_ids for padding
    expert_ids        the tile's expert, -1 past the last tile

A launch may be any of several configurations (VARIANTS), whichever an integer on the device says. Each is a branch of
the kernel, whose registers and shared memory are those of the branch that takes most.

For tiny batches there is a direct path without a schedule: each routed id is an M-tile of its own, with one live row.

Layout of one step along the reduction, for the plain and the swapped operands:

    plain    acc [BM, BN] += x [BM, BK] @ w [BN, BK].T      tokens are M: mma for BM < 64, wgmma from 64 on
    SWAP     acc [BN, BM] += w [BN, BK] @ x [BM, BK].T      weight rows are M: wgmma with few tokens as N

fp8: BK is the group of activations that share a scale, so that each step has one scale a token (xs) and one a weight
tile (ws), and acc += dot * xs * ws. Products of two fp8 values are summed in float32 within a step and promoted after
it. A weight tile lies in one [SCALE, SCALE] block; blocks of gate and of up each count from their first row. RAGGED:
the intermediate size is no multiple of SCALE, so that each half's last block of rows is short.
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from ramp_moe.plugin import ROW_CHUNK

from .quantise import _to_fp8

CHUNK = tl.constexpr(ROW_CHUNK)


@triton.jit
def _tile(tiles, rows, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """(M-tile, row tile) of this CTA. GROUP_M M-tiles are walked side by side before the next row tile, so that the
    weights of an expert with several tiles are read while they are still in L2."""
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BN)
    group = pid // (GROUP_M * row_tiles)
    first = group * GROUP_M
    size = min(tiles - first, GROUP_M)
    inside = pid % (GROUP_M * row_tiles)
    return first + inside % size, inside // size


@triton.jit
def _most_tiles(num_ids, num_experts, BM: tl.constexpr):
    """What `max_tiles` says on the host."""
    return tl.minimum(num_ids, num_experts + tl.maximum(num_ids - num_experts, 0) // BM)


@triton.jit
def _is_chosen(choice, rows, num_ids, num_experts, VARIANTS: tl.constexpr, V: tl.constexpr):
    """Whether this CTA is to run VARIANTS[V], whose own grid may end before that of another."""
    tiles = _most_tiles(num_ids, num_experts, VARIANTS[V][0])
    return (choice == V) & (tl.program_id(0) < tiles * tl.cdiv(rows, VARIANTS[V][1]))


@triton.jit
def _sorted_ids(m, sorted_token_ids_ptr, expert_ids_ptr, num_ids, num_experts, BM: tl.constexpr, DIRECT: tl.constexpr):
    """(expert, routed ids [BM]) of M-tile m; expert -1 where there is nothing to do.

    DIRECT: there is no schedule, each routed id is a tile of its own and expert_ids_ptr holds the top-k ids themselves.
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
    """Programmatic dependent launch (NVIDIA, sm_90 on): this kernel was started while the one before it still ran.
    Wait for its memory, then let the next one start. Without it the launch itself waits."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _product(x, w, SWAP: tl.constexpr, EMULATE: tl.constexpr):
    """x [BM, BK] by w [BN, BK]: [BM, BN], or [BN, BM] if SWAP. EMULATE is for the interpreter, whose dot of anything
    but float32 is wrong."""
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
    """Apply a token's and a weight tile's scale."""
    if SWAP:
        out = part * (xs * ws)[None, :]
    else:
        out = part * (xs * ws)[:, None]
    return out


@triton.jit
def _tanh(x):
    """tanh by exp, exact to float32 rounding for both signs (tl has none that is portable)."""
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr):
    """LIMIT: where swiglu_clamped cuts gate and up off; None for the others."""
    if ACTIVATION == "swiglu":
        out = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu_tanh":
        out = 0.5 * gate * (1 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))) * up
    elif ACTIVATION == "swiglu_clamped":
        # where() and not minimum(): a NaN must stay one.
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        out = gate * tl.sigmoid(gate) * up
    else:
        tl.static_assert(ACTIVATION == "swiglu_oai")
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        out = gate * tl.sigmoid(1.702 * gate) * (up + 1)
    return out


@triton.jit
def _quantise(v, EMULATE_FP8: tl.constexpr):
    """fp8 and scale a row of [BM, BK], as `quantise` computes them.

    Quotients are IEEE's: values of few bits, such as bf16 ones, over a scale of few bits are often exactly between two
    fp8 numbers, where an inexact quotient rounds to the wrong one. One division a row and Markstein's correction, two
    fused multiply-adds, give them for a third of the instructions of a division each.
    """
    amax = tl.maximum(tl.max(tl.abs(v), 1), 1e-10)
    scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    inverse = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None], v.shape)
    quotient = v * inverse
    rest = tl.fma(-quotient, tl.broadcast_to(scale[:, None], v.shape), v)
    return _to_fp8(tl.fma(rest, inverse, quotient), EMULATE_FP8), scale


@triton.jit
def _scale_blocks(I, SCALE: tl.constexpr, RAGGED: tl.constexpr):  # noqa: E741
    """How many blocks of SCALE rows or columns I takes."""
    if RAGGED:
        blocks = tl.cdiv(I, SCALE)
    else:
        blocks = I // SCALE
    return blocks


@triton.jit
def _weight_scale(ptr, step, BK: tl.constexpr, SCALE: tl.constexpr):
    """The weight tile's scale. ptr follows the steps if each has a scale of its own, else it stays at the first."""
    if BK == SCALE:
        scale = tl.load(ptr)
    else:
        scale = tl.load(ptr + step // SCALE)
    return scale


@triton.jit
def _gate_row(r, rows, CHUNK: tl.constexpr, LAYOUT: tl.constexpr):
    """(where row r of the gate lies, how far behind it the same row of up does), for `rows` rows of each. CHUNK is how
    many of each come in turn where they are interleaved."""
    if LAYOUT == "gate-first":
        gate = r
        up = rows
    elif LAYOUT == "up-first":
        gate = r + rows
        up = -rows
    else:
        tl.static_assert(LAYOUT == "gate-up-interleaved-8")
        gate = r // CHUNK * (2 * CHUNK) + r % CHUNK
        up = CHUNK
    return gate, up


@triton.jit
def _up(
    x_ptr,
    xs_ptr,
    w_ptr,
    ws_ptr,
    bias_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    out_ptr,
    outs_ptr,
    tiles,
    num_ids,
    num_experts,
    top_k,
    H,
    I,  # noqa: E741
    VARIANTS: tl.constexpr,
    V: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DIRECT: tl.constexpr,
    FP8: tl.constexpr,
    SCALE: tl.constexpr,
    RAGGED: tl.constexpr,
    QUANTISE_X: tl.constexpr,
    QUANTISE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """`up_kernel`, as the configuration VARIANTS[V]."""
    BM: tl.constexpr = VARIANTS[V][0]
    BN: tl.constexpr = VARIANTS[V][1]
    BK: tl.constexpr = VARIANTS[V][2]
    GROUP_M: tl.constexpr = VARIANTS[V][3]
    SWAP: tl.constexpr = VARIANTS[V][4]
    EVEN_K: tl.constexpr = VARIANTS[V][5]
    EVEN_N: tl.constexpr = VARIANTS[V][6]
    STAGES: tl.constexpr = VARIANTS[V][7] if VARIANTS[V][7] > 0 else None
    if tiles is None:
        tiles = _most_tiles(num_ids, num_experts, BM)
    m, n = _tile(tiles, I, BN, GROUP_M)
    expert, ids = _sorted_ids(m, sorted_token_ids_ptr, expert_ids_ptr, num_ids, num_experts, BM, DIRECT)
    if expert >= 0:
        split = tl.program_id(1)
        live = ids < num_ids
        token = (ids // top_k).to(tl.int64)
        row = n * BN + tl.arange(0, BN)
        k = split * BK + tl.arange(0, BK)
        x_ptrs = x_ptr + token[:, None] * H + k
        # A row past the last reads the last one instead of a mask on every load; its result is not stored.
        safe = row if EVEN_N else tl.minimum(row, I - 1)
        gate_row, to_up = _gate_row(safe, I, CHUNK, LAYOUT)
        gate_ptrs = w_ptr + expert * 2 * I * H + gate_row[:, None].to(tl.int64) * H + k
        up_ptrs = gate_ptrs + to_up * H.to(tl.int64)
        if FP8:
            if not QUANTISE_X:
                xs_ptrs = xs_ptr + token * (H // BK) + split
            gate_block, to_up_block = _gate_row(n * BN // SCALE, _scale_blocks(I, SCALE, RAGGED), 1, LAYOUT)
            if RAGGED:
                gate_block += expert * 2 * _scale_blocks(I, SCALE, RAGGED)
            else:
                gate_block += expert * 2 * I // SCALE
            gs_ptr = ws_ptr + gate_block * (H // SCALE)
            if BK == SCALE:
                gs_ptr += split
            us_ptr = gs_ptr + to_up_block * (H // SCALE)
        if SWAP:
            gate = tl.zeros((BN, BM), tl.float32)
            up = tl.zeros((BN, BM), tl.float32)
        else:
            gate = tl.zeros((BM, BN), tl.float32)
            up = tl.zeros((BM, BN), tl.float32)
        for step in tl.range(split * BK, H, BK * SPLIT_K, num_stages=STAGES):
            if EVEN_K:
                x = tl.load(x_ptrs, mask=live[:, None], other=0.0)
                wg = tl.load(gate_ptrs)
                wu = tl.load(up_ptrs)
            else:
                inside = tl.arange(0, BK) < H - step
                x = tl.load(x_ptrs, mask=live[:, None] & inside, other=0.0)
                wg = tl.load(gate_ptrs, mask=inside[None, :], other=0.0)
                wu = tl.load(up_ptrs, mask=inside[None, :], other=0.0)
            if FP8:
                if QUANTISE_X:
                    x, xs = _quantise(x.to(tl.float32), EMULATE)
                else:
                    xs = tl.load(xs_ptrs, mask=live, other=0.0)
                    xs_ptrs += SPLIT_K
                gate += _scaled(_product(x, wg, SWAP, EMULATE), xs, _weight_scale(gs_ptr, step, BK, SCALE), SWAP)
                up += _scaled(_product(x, wu, SWAP, EMULATE), xs, _weight_scale(us_ptr, step, BK, SCALE), SWAP)
                if BK == SCALE:
                    gs_ptr += SPLIT_K
                    us_ptr += SPLIT_K
            else:
                gate += _product(x, wg, SWAP, EMULATE)
                up += _product(x, wu, SWAP, EMULATE)
            x_ptrs += BK * SPLIT_K
            gate_ptrs += BK * SPLIT_K
            up_ptrs += BK * SPLIT_K
        if SWAP:
            gate = gate.T
            up = up.T
        store = live[:, None]
        if not EVEN_N:
            store = store & (row < I)[None, :]
        out_row = ids.to(tl.int64)[:, None]
        if SPLIT_K > 1:
            out_ptrs = out_ptr + (split.to(tl.int64) * num_ids + out_row) * 2 * I + row
            tl.store(out_ptrs, gate, mask=store)
            tl.store(out_ptrs + I, up, mask=store)
        else:
            if bias_ptr is not None:
                bias_ptrs = bias_ptr + expert * 2 * I + gate_row
                gate += tl.load(bias_ptrs).to(tl.float32)[None, :]
                up += tl.load(bias_ptrs + to_up).to(tl.float32)[None, :]
            act = _activate(gate, up, ACTIVATION, LIMIT)
            if QUANTISE:
                # Rows past the last are copies of it, so that they do not change the scale of a short group.
                tl.static_assert(BN == BK)
                q, scale = _quantise(act, EMULATE)
                tl.store(out_ptr + out_row * I + row, q, mask=store)
                tl.store(outs_ptr + ids.to(tl.int64) * _scale_blocks(I, BN, RAGGED) + n, scale, mask=live)
            else:
                tl.store(out_ptr + out_row * I + row, act.to(out_ptr.dtype.element_ty), mask=store)


# Counts that change with every batch must not each compile a kernel of their own.
@triton.jit(do_not_specialize=["tiles", "num_ids", "num_experts", "top_k"])
def up_kernel(
    choice_ptr,  # int32 [1]: index into VARIANTS; None: there is one
    x_ptr,  # [T, H]: bf16, fp16, or fp8 with xs
    xs_ptr,  # float32 [T, H / BK], fp8 x only
    w_ptr,  # [E, 2 I, H], rows in the order of LAYOUT
    ws_ptr,  # float32 [E, 2 ceil(I / SCALE), H / SCALE], fp8 only; likewise
    bias_ptr,  # [E, 2 I] or None; likewise
    sorted_token_ids_ptr,
    expert_ids_ptr,
    out_ptr,  # [num_ids, I], or float32 [SPLIT_K, num_ids, 2 I], gate first, before the activation
    outs_ptr,  # float32 [num_ids, ceil(I / BN)], QUANTISE only
    tiles,  # in all; None: as many as the choice has
    num_ids,
    num_experts,
    top_k,
    H,
    I,  # noqa: E741
    VARIANTS: tl.constexpr,  # BM, BN, BK, GROUP_M, SWAP, EVEN_K, EVEN_N, STAGES: see `ops`
    SPLIT_K: tl.constexpr,
    DIRECT: tl.constexpr,
    FP8: tl.constexpr,
    SCALE: tl.constexpr,  # rows and columns of a weight that share a scale, 0 without FP8
    RAGGED: tl.constexpr,
    QUANTISE_X: tl.constexpr,  # fp8 weights, x not yet quantised: done here, a step at a time
    QUANTISE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    PDL: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """act[id] = activation(x[token] @ gate.T, x[token] @ up.T) for BN intermediates of one M-tile."""
    _after_previous(PDL)
    choice = 0 if choice_ptr is None else tl.load(choice_ptr)
    for v in tl.static_range(len(VARIANTS)):
        if choice_ptr is None or _is_chosen(choice, I, num_ids, num_experts, VARIANTS, v):
            _up(
                x_ptr,
                xs_ptr,
                w_ptr,
                ws_ptr,
                bias_ptr,
                sorted_token_ids_ptr,
                expert_ids_ptr,
                out_ptr,
                outs_ptr,
                tiles,
                num_ids,
                num_experts,
                top_k,
                H,
                I,
                VARIANTS,
                v,
                SPLIT_K,
                DIRECT,
                FP8,
                SCALE,
                RAGGED,
                QUANTISE_X,
                QUANTISE,
                LAYOUT,
                ACTIVATION,
                LIMIT,
                EMULATE,
            )


@triton.jit
def _down(
    a_ptr,
    as_ptr,
    w_ptr,
    ws_ptr,
    bias_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    weight_ptr,
    out_ptr,
    tiles,
    num_ids,
    num_experts,
    top_k,
    H,
    I,  # noqa: E741
    VARIANTS: tl.constexpr,
    V: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DIRECT: tl.constexpr,
    FP8: tl.constexpr,
    SCALE: tl.constexpr,
    RAGGED: tl.constexpr,
    QUANTISE: tl.constexpr,
    ATOMIC: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """`down_kernel`, as the configuration VARIANTS[V]."""
    BM: tl.constexpr = VARIANTS[V][0]
    BN: tl.constexpr = VARIANTS[V][1]
    BK: tl.constexpr = VARIANTS[V][2]
    GROUP_M: tl.constexpr = VARIANTS[V][3]
    SWAP: tl.constexpr = VARIANTS[V][4]
    EVEN_K: tl.constexpr = VARIANTS[V][5]
    EVEN_N: tl.constexpr = VARIANTS[V][6]
    STAGES: tl.constexpr = VARIANTS[V][7] if VARIANTS[V][7] > 0 else None
    if tiles is None:
        tiles = _most_tiles(num_ids, num_experts, BM)
    m, n = _tile(tiles, H, BN, GROUP_M)
    expert, ids = _sorted_ids(m, sorted_token_ids_ptr, expert_ids_ptr, num_ids, num_experts, BM, DIRECT)
    if expert >= 0:
        split = tl.program_id(1)
        live = ids < num_ids
        wide = ids.to(tl.int64)
        row = n * BN + tl.arange(0, BN)
        k = split * BK + tl.arange(0, BK)
        a_ptrs = a_ptr + wide[:, None] * I + k
        safe = row if EVEN_N else tl.minimum(row, H - 1)
        w_ptrs = w_ptr + expert * H * I + safe[:, None].to(tl.int64) * I + k
        if FP8:
            if not QUANTISE:
                as_ptrs = as_ptr + wide * _scale_blocks(I, BK, RAGGED) + split
            s_ptr = ws_ptr + (expert * H // SCALE + n * BN // SCALE) * _scale_blocks(I, SCALE, RAGGED)
            if BK == SCALE:
                s_ptr += split
        if SWAP:
            acc = tl.zeros((BN, BM), tl.float32)
        else:
            acc = tl.zeros((BM, BN), tl.float32)
        for step in tl.range(split * BK, I, BK * SPLIT_K, num_stages=STAGES):
            if EVEN_K:
                a = tl.load(a_ptrs, mask=live[:, None], other=0.0)
                w = tl.load(w_ptrs)
            else:
                inside = tl.arange(0, BK) < I - step
                a = tl.load(a_ptrs, mask=live[:, None] & inside, other=0.0)
                w = tl.load(w_ptrs, mask=inside[None, :], other=0.0)
            if FP8:
                if QUANTISE:
                    a, scale = _quantise(a.to(tl.float32), EMULATE)
                else:
                    scale = tl.load(as_ptrs, mask=live, other=0.0)
                    as_ptrs += SPLIT_K
                acc += _scaled(_product(a, w, SWAP, EMULATE), scale, _weight_scale(s_ptr, step, BK, SCALE), SWAP)
                if BK == SCALE:
                    s_ptr += SPLIT_K
            else:
                acc += _product(a, w, SWAP, EMULATE)
            a_ptrs += BK * SPLIT_K
            w_ptrs += BK * SPLIT_K
        if SWAP:
            acc = acc.T
        if bias_ptr is not None and split == 0:
            acc += tl.load(bias_ptr + expert * H + safe).to(tl.float32)[None, :]
        acc *= tl.load(weight_ptr + ids, mask=live, other=0.0)[:, None]
        store = live[:, None]
        if not EVEN_N:
            store = store & (row < H)[None, :]
        if ATOMIC:
            token = (ids // top_k).to(tl.int64)
            tl.atomic_add(out_ptr + token[:, None] * H + row, acc, mask=store, sem="relaxed")
        else:
            out_ptrs = out_ptr + (split.to(tl.int64) * num_ids + wide[:, None]) * H + row
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=store)


@triton.jit(do_not_specialize=["tiles", "num_ids", "num_experts", "top_k"])
def down_kernel(
    choice_ptr,  # int32 [1]: index into VARIANTS; None: there is one
    a_ptr,  # [num_ids, I]: bf16, fp16, or fp8 with as
    as_ptr,  # float32 [num_ids, ceil(I / BK)], fp8 activations only
    w_ptr,  # [E, H, I]
    ws_ptr,  # float32 [E, H / SCALE, ceil(I / SCALE)], fp8 weights only
    bias_ptr,  # [E, H] or None
    sorted_token_ids_ptr,
    expert_ids_ptr,
    weight_ptr,  # float32 [num_ids], the routing weights
    out_ptr,  # ATOMIC: float32 [T, H], zeroed; else [SPLIT_K, num_ids, H]
    tiles,  # in all; None: as many as the choice has
    num_ids,
    num_experts,
    top_k,
    H,
    I,  # noqa: E741
    VARIANTS: tl.constexpr,  # BM, BN, BK, GROUP_M, SWAP, EVEN_K, EVEN_N, STAGES: see `ops`
    SPLIT_K: tl.constexpr,
    DIRECT: tl.constexpr,
    FP8: tl.constexpr,
    SCALE: tl.constexpr,  # rows and columns of a weight that share a scale, 0 without FP8
    RAGGED: tl.constexpr,
    QUANTISE: tl.constexpr,  # fp8 weights, activations not yet quantised: done here, a step at a time
    ATOMIC: tl.constexpr,
    PDL: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """out[id] (or += out[token]) = routing weight * (act[id] @ down.T) for BN rows of one M-tile."""
    _after_previous(PDL)
    choice = 0 if choice_ptr is None else tl.load(choice_ptr)
    for v in tl.static_range(len(VARIANTS)):
        if choice_ptr is None or _is_chosen(choice, H, num_ids, num_experts, VARIANTS, v):
            _down(
                a_ptr,
                as_ptr,
                w_ptr,
                ws_ptr,
                bias_ptr,
                sorted_token_ids_ptr,
                expert_ids_ptr,
                weight_ptr,
                out_ptr,
                tiles,
                num_ids,
                num_experts,
                top_k,
                H,
                I,
                VARIANTS,
                v,
                SPLIT_K,
                DIRECT,
                FP8,
                SCALE,
                RAGGED,
                QUANTISE,
                ATOMIC,
                EMULATE,
            )


@triton.jit(do_not_specialize=["num_ids", "num_experts"])
def activate_kernel(
    part_ptr,  # float32 [SPLIT_K, num_ids, 2 I], gate first
    bias_ptr,  # [E, 2 I] or None, in the order of LAYOUT
    ids_ptr,  # [num_ids], expert of each routed id; an id outside [0, E) is skipped
    out_ptr,  # [num_ids, I]
    num_ids,
    num_experts,
    I,  # noqa: E741
    SPLIT_K: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up the splits of the up projection, in order, and activate: one CTA for each routed id and BLOCK columns."""
    _after_previous(PDL)
    i = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + i).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        part = part_ptr + (split * num_ids.to(tl.int64) + i) * 2 * I + column
        gate += tl.load(part, mask=inside, other=0.0)
        up += tl.load(part + I, mask=inside, other=0.0)
    if bias_ptr is not None:
        gate_row, to_up = _gate_row(column, I, CHUNK, LAYOUT)
        bias_ptrs = bias_ptr + expert * 2 * I + gate_row
        gate += tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(bias_ptrs + to_up, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i * I + column, _activate(gate, up, ACTIVATION, LIMIT).to(out_ptr.dtype.element_ty), mask=inside)
