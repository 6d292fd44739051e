"""The up projection: gate and up of every routed id, with the activation fused. `gemm` explains tiles and operands."""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import CHUNK, _activate, _gate_row, _quantise
from .gemm import (
    _after_previous,
    _is_chosen,
    _load_packed,
    _load_w,
    _load_x,
    _most_tiles,
    _product,
    _row_bytes,
    _scale_blocks,
    _scaled,
    _sorted_ids,
    _tile,
    _weight_scale,
    _zeros,
)


@triton.jit
def _gate_and_up(
    x_ptrs, xs_ptrs, gate_ptrs, up_ptrs, gs_ptr, us_ptr, live, split, H,
    C: tl.constexpr, SPLIT_K: tl.constexpr, FP8: tl.constexpr, PACKED: tl.constexpr, SCALE: tl.constexpr,
    QUANTISE_X: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """float32 [BM, BN] each: the products of x and gate and of x and up, over this split's steps of the reduction.

    x_ptrs [BM, BK], gate_ptrs and up_ptrs [BN, BK] point at the split's first step; so do the scales' pointers, None
    where nothing has scales. If PACKED, gate_ptrs and up_ptrs are [BN, BK / 2], gs_ptr and us_ptr [BN] are the rows'
    first scales.
    """
    STAGES: tl.constexpr = C.STAGES if C.STAGES > 0 else None
    gate = _zeros(C)
    up = _zeros(C)
    for step in tl.range(split * C.BK, H, C.BK * SPLIT_K, num_stages=STAGES):
        x = _load_x(x_ptrs, live, H - step, C)
        if PACKED is None:
            wg = _load_w(gate_ptrs, H - step, C)
            wu = _load_w(up_ptrs, H - step, C)
        else:
            wg = _load_packed(gate_ptrs, gs_ptr, step, H - step, x.dtype, C, PACKED, SCALE)
            wu = _load_packed(up_ptrs, us_ptr, step, H - step, x.dtype, C, PACKED, SCALE)
        if FP8:
            if QUANTISE_X:
                x, xs = _quantise(x.to(tl.float32), EMULATE)
            else:
                xs = tl.load(xs_ptrs, mask=live, other=0.0)
                xs_ptrs += SPLIT_K
            gate += _scaled(_product(x, wg, C.SWAP, EMULATE), xs, _weight_scale(gs_ptr, step, C.BK, SCALE), C.SWAP)
            up += _scaled(_product(x, wu, C.SWAP, EMULATE), xs, _weight_scale(us_ptr, step, C.BK, SCALE), C.SWAP)
            if C.BK == SCALE:
                gs_ptr += SPLIT_K
                us_ptr += SPLIT_K
        else:
            gate += _product(x, wg, C.SWAP, EMULATE)
            up += _product(x, wu, C.SWAP, EMULATE)
        x_ptrs += C.BK * SPLIT_K
        if PACKED is None:
            gate_ptrs += C.BK * SPLIT_K
            up_ptrs += C.BK * SPLIT_K
        else:
            gate_ptrs += C.BK // 2 * SPLIT_K
            up_ptrs += C.BK // 2 * SPLIT_K
    if C.SWAP:
        gate = gate.T
        up = up.T
    return gate, up


@triton.jit
def _store_activated(
    gate, up, bias_ptr, gate_row, to_up, out_ptr, outs_ptr, expert, ids, live, out_row, row, store, n, I,  # noqa: E741
    C: tl.constexpr, RAGGED: tl.constexpr, QUANTISE: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """out[out_row, row] = activation(gate, up), biases added; as fp8 with a scale for each row if QUANTISE."""
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * 2 * I + gate_row
        gate += tl.load(bias_ptrs).to(tl.float32)[None, :]
        up += tl.load(bias_ptrs + to_up).to(tl.float32)[None, :]
    act = _activate(gate, up, ACTIVATION, LIMIT)
    if QUANTISE:
        # Rows past the last are copies of it, so that they do not change the scale of a short group.
        tl.static_assert(C.BN == C.BK)
        q, scale = _quantise(act, EMULATE)
        tl.store(out_ptr + out_row * I + row, q, mask=store)
        tl.store(outs_ptr + ids.to(tl.int64) * _scale_blocks(I, C.BN, RAGGED) + n, scale, mask=live)
    else:
        tl.store(out_ptr + out_row * I + row, act.to(out_ptr.dtype.element_ty), mask=store)


@triton.jit
def _up(
    x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, sorted_token_ids_ptr, expert_ids_ptr, out_ptr, outs_ptr,
    tiles, num_ids, num_experts, top_k, H, I,  # noqa: E741
    VARIANTS: tl.constexpr, V: tl.constexpr, SPLIT_K: tl.constexpr, DIRECT: tl.constexpr, FP8: tl.constexpr,
    PACKED: tl.constexpr, SCALE: tl.constexpr, RAGGED: tl.constexpr, QUANTISE_X: tl.constexpr, QUANTISE: tl.constexpr,
    LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Do what `up_kernel` does, with the configuration VARIANTS[V]."""
    C: tl.constexpr = VARIANTS[V]
    if tiles is None:
        tiles = _most_tiles(num_ids, num_experts, C.BM)
    m, n = _tile(tiles, I, C.BN, C.GROUP_M)
    expert, ids = _sorted_ids(m, sorted_token_ids_ptr, expert_ids_ptr, num_ids, num_experts, C.BM, DIRECT)
    if expert >= 0:
        split = tl.program_id(1)
        live = ids < num_ids
        token = (ids // top_k).to(tl.int64)
        row = n * C.BN + tl.arange(0, C.BN)
        k = split * C.BK + tl.arange(0, C.BK)
        x_ptrs = x_ptr + token[:, None] * H + k
        # Rows past the last read the last one, which saves a mask on every load. Their results are not stored.
        safe = row if C.EVEN_N else tl.minimum(row, I - 1)
        gate_row, to_up = _gate_row(safe, I, CHUNK, LAYOUT)
        xs_ptrs = None
        gs_ptr = None
        us_ptr = None
        if PACKED is None:
            gate_ptrs = w_ptr + expert * 2 * I * H + gate_row[:, None].to(tl.int64) * H + k
            up_ptrs = gate_ptrs + to_up * H.to(tl.int64)
        else:
            first = expert * 2 * I + gate_row
            gate_ptrs = w_ptr + first[:, None] * _row_bytes(H) + split * (C.BK // 2) + tl.arange(0, C.BK // 2)
            up_ptrs = gate_ptrs + to_up * _row_bytes(H).to(tl.int64)
            gs_ptr = ws_ptr + first * (H // SCALE)
            us_ptr = gs_ptr + to_up * (H // SCALE).to(tl.int64)
        if FP8 and not QUANTISE_X:
            xs_ptrs = xs_ptr + token * (H // C.BK) + split
        if FP8 and SCALE > 0:
            gate_block, to_up_block = _gate_row(n * C.BN // SCALE, _scale_blocks(I, SCALE, RAGGED), 1, LAYOUT)
            if RAGGED:
                gate_block += expert * 2 * _scale_blocks(I, SCALE, RAGGED)
            else:
                gate_block += expert * 2 * I // SCALE
            gs_ptr = ws_ptr + gate_block * (H // SCALE)
            if C.BK == SCALE:
                gs_ptr += split
            us_ptr = gs_ptr + to_up_block * (H // SCALE)
        gate, up = _gate_and_up(
            x_ptrs, xs_ptrs, gate_ptrs, up_ptrs, gs_ptr, us_ptr, live, split, H,
            C, SPLIT_K, FP8, PACKED, SCALE, QUANTISE_X, EMULATE,
        )  # fmt: skip
        if FP8 and SCALE == 0:
            s_ptrs = ws_ptr + expert * 2 * I + gate_row
            gate *= tl.load(s_ptrs).to(tl.float32)[None, :]
            up *= tl.load(s_ptrs + to_up).to(tl.float32)[None, :]
        store = live[:, None]
        if not C.EVEN_N:
            store = store & (row < I)[None, :]
        out_row = ids.to(tl.int64)[:, None]
        if SPLIT_K > 1:
            out_ptrs = out_ptr + (split.to(tl.int64) * num_ids + out_row) * 2 * I + row
            tl.store(out_ptrs, gate, mask=store)
            tl.store(out_ptrs + I, up, mask=store)
        else:
            _store_activated(
                gate, up, bias_ptr, gate_row, to_up, out_ptr, outs_ptr, expert, ids, live, out_row, row, store, n, I,
                C, RAGGED, QUANTISE, ACTIVATION, LIMIT, EMULATE,
            )  # fmt: skip


# Counts that change with every batch must not compile a kernel each.
@triton.jit(do_not_specialize=["tiles", "num_ids", "num_experts", "top_k"])
def up_kernel(
    choice_ptr,  # int32 [1]: index into VARIANTS; None: there is one
    x_ptr,  # [T, H]: bf16, fp16, or fp8 with xs
    xs_ptr,  # float32 [T, H / BK], fp8 x only
    w_ptr,  # [E, 2 I, H], PACKED: bytes [E, 2 I, H / 2], rows in the order of LAYOUT
    ws_ptr,  # fp8: float32 [E, 2 ceil(I / SCALE), H / SCALE] or [E, 2 I, 1], PACKED: [E, 2 I, H / SCALE]; likewise
    bias_ptr,  # [E, 2 I] or None; likewise
    sorted_token_ids_ptr,
    expert_ids_ptr,
    out_ptr,  # [num_ids, I], or float32 [SPLIT_K, num_ids, 2 I], gate first, before the activation
    outs_ptr,  # float32 [num_ids, ceil(I / BN)], QUANTISE only
    tiles,  # M-tiles of the grid; None: as many as the chosen variant has
    num_ids,
    num_experts,
    top_k,
    H,
    I,  # noqa: E741
    VARIANTS: tl.constexpr,  # of `config.Variant`
    SPLIT_K: tl.constexpr,
    DIRECT: tl.constexpr,
    FP8: tl.constexpr,
    PACKED: tl.constexpr,  # "int4" or "e2m1", weights of 4 bits; None for others
    SCALE: tl.constexpr,  # rows and columns of fp8 weights that share a scale, or columns if PACKED; 0: a row, or none
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
                x_ptr, xs_ptr, w_ptr, ws_ptr, bias_ptr, sorted_token_ids_ptr, expert_ids_ptr, out_ptr, outs_ptr,
                tiles, num_ids, num_experts, top_k, H, I,
                VARIANTS, v, SPLIT_K, DIRECT, FP8, PACKED, SCALE, RAGGED, QUANTISE_X, QUANTISE, LAYOUT, ACTIVATION,
                LIMIT, EMULATE,
            )  # fmt: skip
