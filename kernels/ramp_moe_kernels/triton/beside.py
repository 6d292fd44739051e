"""What programs of a launch do beside its own work: quantise activations, and zero an output."""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..reference import GROUP
from .quantise import _quantise_rows, groups_per_program, interpreted

ZERO_BLOCK = 4096
WARPS = 4
"""Fewest warps of a program that quantises `groups_per_program` groups, or zeroes ZERO_BLOCK elements."""


@triton.jit
def _zero_rows(program, zero, zero_size, BLOCK: tl.constexpr):
    """Zero BLOCK elements of a contiguous tensor."""
    first = program.to(tl.int64) * BLOCK  # elements can exceed 2^31
    at = tl.arange(0, BLOCK)
    tl.store(zero + first + at, tl.zeros((BLOCK,), zero.dtype.element_ty), mask=at < zero_size - first)


@triton.jit
def _beside(
    program,
    x,
    x_fp8,
    x_scale,
    num_groups,
    x_programs,
    zero,
    zero_size,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    EMULATE_FP8: tl.constexpr,
):
    """Do the work of a program past the sorting ones: quantise a part of x, or zero a part of `zero`."""
    if x is not None:  # noqa: SIM102 - known when compiling, unlike the next
        if program < x_programs:
            _quantise_rows(program, x, x_fp8, x_scale, num_groups, GROUPS, GROUP, EMULATE_FP8)
    if zero is not None:  # noqa: SIM102
        if program >= x_programs:
            _zero_rows(program - x_programs, zero, zero_size, ZERO)


def beside_of(
    quantise: tuple[Tensor, Tensor, Tensor] | None, zero: Tensor | None, warps: int = WARPS
) -> tuple[dict[str, Any], int]:
    """The arguments of a kernel whose last programs do `_beside`, by name, and the number of those programs.

    warps: of a program. With fewer than WARPS it takes less work.
    """
    x, x_fp8, x_scale = quantise or (None, None, None)
    groups = groups_each = group = x_programs = 0
    if x is not None and x_scale is not None:
        groups = x_scale.numel()
        group = x.numel() // groups if groups else GROUP
        groups_each = groups_per_program(groups) * min(warps, WARPS) // WARPS
        x_programs = -(-groups // groups_each)
    zero_size = 0 if zero is None else zero.numel()
    zeroed = ZERO_BLOCK * min(warps, WARPS) // WARPS
    arguments = {
        "x": x,
        "x_fp8": x_fp8,
        "x_scale": x_scale,
        "num_groups": groups,
        "x_programs": x_programs,
        "zero": zero,
        "zero_size": zero_size,
        "GROUPS": groups_each,
        "GROUP": group,
        "ZERO": zeroed,
        "EMULATE_FP8": interpreted(_beside),
    }
    return arguments, x_programs + -(-zero_size // zeroed)
