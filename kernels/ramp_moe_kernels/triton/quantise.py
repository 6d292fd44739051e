"""Quantises activations to fp8 in one launch, with a float32 scale per token and group of 128, 64 or 32 columns.

A program takes GROUPS groups, which follow each other in memory whatever token they belong to. The result equals the
reference bit for bit, since every division is rounded correctly:

    amax    float32 [GROUPS]        compared as integers, which order magnitudes alike, with NaN above infinity
    scale   max(amax, 1e-10) / 448  correctly rounded
    fp8     x / scale               correctly rounded, then to nearest even; |x / scale| never rounds to more than 448
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ramp_moe.plugin import ShapeError
from ramp_moe.spec.checks import check_gpu, check_tensor
from torch import Tensor

from ..reference import FP8, FP8_MAX, GROUP, TINY
from .launch import on_device_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP_SIZES = (128, 64, 32)
"""Columns that can share a scale; a multiple of 128 has whole groups of any."""
MANY_GROUPS = 4096
"""Number of groups from which on a program takes more of them: it then has more loads in flight."""

_GROUP = tl.constexpr(GROUP)
_FP8_MAX = tl.constexpr(FP8_MAX)
_TINY = tl.constexpr(TINY)


@triton.jit
def _to_fp8(v, EMULATE_FP8: tl.constexpr):
    """Convert float32 v, |v| <= 448 or NaN, to e4m3 by rounding to nearest even.

    EMULATE_FP8 is for the interpreter. Its own conversion loses a carry into the exponent, and turns NaN into a number.
    """
    if EMULATE_FP8:
        known = tl.where(v == v, v, 0.0)
        exponent = tl.maximum(known.to(tl.int32, bitcast=True) >> 23 & 0xFF, 121)  # below 2^-6 e4m3 has fixed steps
        # Adding a large power of two and subtracting it again rounds to nearest even at a bit: 3 below the exponent.
        anchor = (exponent + 20 << 23).to(tl.float32, bitcast=True)
        size = (tl.abs(known) + anchor) - anchor
        normal = (size.to(tl.int32, bitcast=True) >> 20) - (120 << 3)
        code = tl.where(size < 0.015625, (size * 512).to(tl.int32), normal)
        code = tl.where(v == v, code, 0x7F) | (v.to(tl.int32, bitcast=True) >> 24 & 0x80)
        out = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        out = v.to(tl.float8e4nv)
    return out


@triton.jit
def _quantise_groups(values, GROUPS: tl.constexpr, EMULATE_FP8: tl.constexpr):
    """Quantise float32 values [GROUPS, GROUP]. Returns fp8 of that shape, and scales float32 [GROUPS]."""
    amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.where(amax < _TINY, _TINY, amax), tl.full((GROUPS,), _FP8_MAX, tl.float32))
    return _to_fp8(tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape)), EMULATE_FP8), scale


@triton.jit
def _quantise_rows(
    program, x, x_fp8, x_scale, num_groups, GROUPS: tl.constexpr, GROUP: tl.constexpr, EMULATE_FP8: tl.constexpr
):
    """Quantise GROUPS groups of GROUP columns, from group program * GROUPS on. There are `num_groups` in all."""
    first = program.to(tl.int64) * GROUPS  # elements can exceed 2^31
    x += first * GROUP
    x_fp8 += first * GROUP
    group = tl.arange(0, GROUPS)
    live = group < num_groups - first
    at = group[:, None] * GROUP + tl.arange(0, GROUP)
    values = tl.load(x + at, mask=live[:, None], other=0.0).to(tl.float32)
    q, scale = _quantise_groups(values, GROUPS, EMULATE_FP8)
    tl.store(x_scale + first + group, scale, mask=live)
    tl.store(x_fp8 + at, q, mask=live[:, None])


@triton.jit(do_not_specialize=["num_groups"])
def quantise_kernel(
    x, x_fp8, x_scale, num_groups, GROUPS: tl.constexpr, GROUP: tl.constexpr, EMULATE_FP8: tl.constexpr
):
    _quantise_rows(tl.program_id(0), x, x_fp8, x_scale, num_groups, GROUPS, GROUP, EMULATE_FP8)


def quantise(x: Tensor, out: Tensor, scale: Tensor) -> None:
    """Quantise x to fp8, with one scale per token and group of G columns. All tensors are contiguous.

    x: bf16, fp16 or float32 `[T, C]`, C a multiple of 128.
    out: float8_e4m3fn `[T, C]`, x / scale to nearest even.
    scale: float32 `[T, C/G]`, max(amax, 1e-10) / 448. Its shape tells G: 128, 64 or 32.

    A NaN or an infinity spoils its own group only. Without tokens nothing is launched. Needs hardware with fp8. On AMD
    hardware with another e4m3, software converts to OCP's. Raises ShapeError for shapes that do not fit, KernelError
    for wrong dtypes, strides and devices.
    """
    group = check_quantise(x, out, scale, x.device)
    if not interpreted(quantise_kernel):
        check_gpu("what is quantised", x)
    groups = scale.numel()
    if groups == 0:
        return
    size = groups_per_program(groups)
    with on_device_of(x):
        quantise_kernel[(-(-groups // size),)](
            x, out, scale, groups, GROUPS=size, GROUP=group, EMULATE_FP8=interpreted(quantise_kernel), num_warps=4
        )


def groups_per_program(num_groups: int) -> int:
    """Groups of one program: few, as long as there are few programs."""
    return 16 if num_groups <= MANY_GROUPS else 64


def interpreted(kernel: object) -> bool:
    """Whether a kernel runs in Triton's interpreter, without a GPU."""
    return not isinstance(kernel, triton.JITFunction)


def check_quantise(x: Tensor, out: Tensor, scale: Tensor, device: torch.device) -> int:
    """Check the arguments of `quantise`, and raise its errors. Returns the columns of a group."""
    if x.ndim != 2 or x.shape[1] % GROUP:
        raise ShapeError(f"what is quantised must be [T, C] with C a multiple of {GROUP}, not {list(x.shape)}")
    tokens, columns = x.shape
    check_tensor("what is quantised", x, (tokens, columns), DTYPES, device)
    check_tensor("the quantised activations", out, (tokens, columns), (FP8,), device)
    group = next((g for g in GROUP_SIZES if scale.shape == (tokens, columns // g)), GROUP)
    check_tensor("their scale", scale, (tokens, columns // group), (torch.float32,), device)
    return group
