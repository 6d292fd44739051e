"""What follows the up projection's sums: order of gate and up, activation, fp8, and the sum of splits."""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from ramp_moe.plugin import ROW_CHUNK

from .gemm import _after_previous
from .quantise import _to_fp8

CHUNK = tl.constexpr(ROW_CHUNK)


@triton.jit
def _gate_row(r, rows, CHUNK: tl.constexpr, LAYOUT: tl.constexpr):
    """Returns the position of the gate's row r, and the distance from there to the same row of up.

    rows: rows of gate, and of up. CHUNK: rows of each that alternate if gate and up are interleaved.
    """
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
def _tanh(x):
    """Compute tanh by exp, to float32 rounding for both signs. (tl has no portable tanh.)"""
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr):
    """Apply the activation to gate and up. LIMIT: at which swiglu_clamped clamps them; None for the others."""
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
    """Quantise v [BM, BK] with one scale per row, as `quantise` does. Returns fp8 and the scales.

    Quotients must be correctly rounded. bf16 values over a scale of few bits often lie exactly between two fp8 numbers,
    and an inexact quotient then rounds to the wrong one. One division per row and Markstein's correction, two fused
    multiply-adds, give them for a third of the instructions of a division each.
    """
    amax = tl.maximum(tl.max(tl.abs(v), 1), 1e-10)
    scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    inverse = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None], v.shape)
    quotient = v * inverse
    rest = tl.fma(-quotient, tl.broadcast_to(scale[:, None], v.shape), v)
    return _to_fp8(tl.fma(rest, inverse, quotient), EMULATE_FP8), scale


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
    """Add up the splits of the up projection in order, and activate. One CTA takes a routed id and BLOCK columns."""
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
