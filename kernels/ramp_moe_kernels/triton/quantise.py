"""Activations to fp8: one float32 scale a token and group of columns, 128 or 64 or 32, in one launch.

A program takes GROUPS groups, which follow each other in memory whatever token they belong to. Nothing but the
division's rounding happens between the load and the store, so that the result is the reference's, bit for bit:

    amax    float32 [GROUPS]        as integers, of the same order for magnitudes, and NaN above infinity: it stays
    scale   max(amax, 1e-10) / 448  divided as IEEE says
    fp8     x / scale               likewise, then to nearest even; |x / scale| never rounds to more than 448
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
"""Groups from which on a program takes more of them: there are programs enough, and more loads in flight pay."""

_GROUP = tl.constexpr(GROUP)
_FP8_MAX = tl.constexpr(FP8_MAX)
_TINY = tl.constexpr(TINY)


@triton.jit
def _to_fp8(v, EMULATE_FP8: tl.constexpr):
    """e4m3 of float32 v, |v| <= 448 or NaN, to nearest even. EMULATE_FP8 is for the interpreter, whose own conversion
    loses a carry into the exponent and turns NaN into a number."""
    if EMULATE_FP8:
        known = tl.where(v == v, v, 0.0)
        exponent = tl.maximum(known.to(tl.int32, bitcast=True) >> 23 & 0xFF, 121)  # below 2^-6 e4m3 has fixed steps
        # An addition rounds to nearest even; what is added says at which bit: 3 below the exponent.
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
    """fp8 [GROUPS, GROUP] and scale float32 [GROUPS] of float32 values of that shape."""
    amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.where(amax < _TINY, _TINY, amax), tl.full((GROUPS,), _FP8_MAX, tl.float32))
    return _to_fp8(tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape)), EMULATE_FP8), scale


@triton.jit
def _quantise_rows(
    program, x, x_fp8, x_scale, num_groups, GROUPS: tl.constexpr, GROUP: tl.constexpr, EMULATE_FP8: tl.constexpr
):
    """GROUPS groups of GROUP columns, from group program * GROUPS on, of `num_groups`."""
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
    """out float8_e4m3fn `[T, C]` and scale float32 `[T, C/G]` of x bf16, fp16 or float32 `[T, C]`, all contiguous.

    The scale's columns say what G is, 128 or 64 or 32; C is a multiple of 128. scale = max(amax, 1e-10) / 448 of a
    token's group of G columns; out = x / scale to nearest even. A NaN or an infinity spoils its own group only. Without
    tokens nothing is launched. Needs hardware with fp8 or, on AMD, converts to OCP e4m3 in software where the hardware
    knows another e4m3. Raises ShapeError for shapes that do not fit, KernelError for dtypes, strides and devices.
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
    """Few, while programs are scarce."""
    return 16 if num_groups <= MANY_GROUPS else 64


def interpreted(kernel: object) -> bool:
    """Whether a kernel runs in Triton's interpreter, where there is no GPU."""
    return not isinstance(kernel, triton.JITFunction)


def check_quantise(x: Tensor, out: Tensor, scale: Tensor, device: torch.device) -> int:
    """Columns of a group, by the scale's shape. Raises what `quantise` says."""
    if x.ndim != 2 or x.shape[1] % GROUP:
        raise ShapeError(f"what is quantised must be [T, C] with C a multiple of {GROUP}, not {list(x.shape)}")
    tokens, columns = x.shape
    check_tensor("what is quantised", x, (tokens, columns), DTYPES, device)
    check_tensor("the quantised activations", out, (tokens, columns), (FP8,), device)
    group = next((g for g in GROUP_SIZES if scale.shape == (tokens, columns // g)), GROUP)
    check_tensor("their scale", scale, (tokens, columns // group), (torch.float32,), device)
    return group
