"""The down projection, with the routing weight applied. `gemm` explains tiles and operands."""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import _quantise
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
def _products(
    a_ptrs, as_ptrs, w_ptrs, s_ptr, live, split, I,  # noqa: E741
    C: tl.constexpr, SPLIT_K: tl.constexpr, FP8: tl.constexpr, PACKED: tl.constexpr, SCALE: tl.constexpr,
    QUANTISE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """float32 [BM, BN]: the product of a and w over this split's steps of the reduction.

    a_ptrs [BM, BK] and w_ptrs [BN, BK] point at the split's first step; so do the scales' pointers, which are None
    if there are no scales. If PACKED, w_ptrs are [BN, BK / 2], and s_ptr [BN] are the rows' first scales.
    """
    STAGES: tl.constexpr = C.STAGES if C.STAGES > 0 else None
    acc = _zeros(C)
    for step in tl.range(split * C.BK, I, C.BK * SPLIT_K, num_stages=STAGES):
        a = _load_x(a_ptrs, live, I - step, C)
        if PACKED is None:
            w = _load_w(w_ptrs, I - step, C)
        else:
            w = _load_packed(w_ptrs, s_ptr, step, I - step, a.dtype, C, PACKED, SCALE)
        if FP8:
            if QUANTISE:
                a, scale = _quantise(a.to(tl.float32), EMULATE)
            else:
                scale = tl.load(as_ptrs, mask=live, other=0.0)
                as_ptrs += SPLIT_K
            acc += _scaled(_product(a, w, C.SWAP, EMULATE), scale, _weight_scale(s_ptr, step, C.BK, SCALE), C.SWAP)
            if C.BK == SCALE:
                s_ptr += SPLIT_K
        else:
            acc += _product(a, w, C.SWAP, EMULATE)
        a_ptrs += C.BK * SPLIT_K
        if PACKED is None:
            w_ptrs += C.BK * SPLIT_K
        else:
            w_ptrs += C.BK // 2 * SPLIT_K
    if C.SWAP:
        acc = acc.T
    return acc


@triton.jit
def _down(
    a_ptr, as_ptr, w_ptr, ws_ptr, bias_ptr, sorted_token_ids_ptr, expert_ids_ptr, weight_ptr, out_ptr,
    tiles, num_ids, num_experts, top_k, H, I,  # noqa: E741
    VARIANTS: tl.constexpr, V: tl.constexpr, SPLIT_K: tl.constexpr, DIRECT: tl.constexpr, FP8: tl.constexpr,
    PACKED: tl.constexpr, SCALE: tl.constexpr, RAGGED: tl.constexpr, QUANTISE: tl.constexpr, ATOMIC: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Do what `down_kernel` does, with the configuration VARIANTS[V]."""
    C: tl.constexpr = VARIANTS[V]
    if tiles is None:
        tiles = _most_tiles(num_ids, num_experts, C.BM)
    m, n = _tile(tiles, H, C.BN, C.GROUP_M)
    expert, ids = _sorted_ids(m, sorted_token_ids_ptr, expert_ids_ptr, num_ids, num_experts, C.BM, DIRECT)
    if expert >= 0:
        split = tl.program_id(1)
        live = ids < num_ids
        wide = ids.to(tl.int64)
        row = n * C.BN + tl.arange(0, C.BN)
        k = split * C.BK + tl.arange(0, C.BK)
        a_ptrs = a_ptr + wide[:, None] * I + k
        safe = row if C.EVEN_N else tl.minimum(row, H - 1)
        as_ptrs = None
        s_ptr = None
        if PACKED is None:
            w_ptrs = w_ptr + expert * H * I + safe[:, None].to(tl.int64) * I + k
        else:
            packed = split * (C.BK // 2) + tl.arange(0, C.BK // 2)
            w_ptrs = w_ptr + (expert * H + safe)[:, None] * _row_bytes(I) + packed
            s_ptr = ws_ptr + (expert * H + safe) * (I // SCALE)
        if FP8 and not QUANTISE:
            as_ptrs = as_ptr + wide * _scale_blocks(I, C.BK, RAGGED) + split
        if FP8 and SCALE > 0:
            s_ptr = ws_ptr + (expert * H // SCALE + n * C.BN // SCALE) * _scale_blocks(I, SCALE, RAGGED)
            if C.BK == SCALE:
                s_ptr += split
        acc = _products(
            a_ptrs, as_ptrs, w_ptrs, s_ptr, live, split, I, C, SPLIT_K, FP8, PACKED, SCALE, QUANTISE, EMULATE
        )
        if FP8 and SCALE == 0:
            acc *= tl.load(ws_ptr + expert * H + safe).to(tl.float32)[None, :]
        if bias_ptr is not None and split == 0:
            acc += tl.load(bias_ptr + expert * H + safe).to(tl.float32)[None, :]
        acc *= tl.load(weight_ptr + ids, mask=live, other=0.0)[:, None]
        store = live[:, None]
        if not C.EVEN_N:
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
    w_ptr,  # [E, H, I], PACKED: bytes [E, H, I / 2]
    ws_ptr,  # fp8: float32 [E, H / SCALE, ceil(I / SCALE)] or [E, H, 1], PACKED: [E, H, I / SCALE]
    bias_ptr,  # [E, H] or None
    sorted_token_ids_ptr,
    expert_ids_ptr,
    weight_ptr,  # float32 [num_ids], the routing weights
    out_ptr,  # ATOMIC: float32 [T, H], zeroed; else [SPLIT_K, num_ids, H]
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
                a_ptr, as_ptr, w_ptr, ws_ptr, bias_ptr, sorted_token_ids_ptr, expert_ids_ptr, weight_ptr, out_ptr,
                tiles, num_ids, num_experts, top_k, H, I,
                VARIANTS, v, SPLIT_K, DIRECT, FP8, PACKED, SCALE, RAGGED, QUANTISE, ATOMIC, EMULATE,
            )  # fmt: skip
