"""What weights and activations of each format are worth, in plain torch: packing, scales, rounding.

`spec.formats` says what formats there are, `MoEWeights` how their tensors are laid out. Nothing here is meant to be
fast.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ShapeError
from ..spec.formats import FORMATS, Format
from ..spec.launchable import MoEWeights
from ..spec.shapes import SCALE_BLOCK
from .relayout import copy_rows

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
TINY = 1e-10
"""Smallest amax that a scale is made of, so that a group of zeros has a scale."""
INT4 = tuple(float(code - 8) for code in range(16))
"""Value of each code: 8 is zero."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each code: sign, two bits of exponent (bias 1), one of mantissa."""
CODES = {"int4": INT4, "e2m1": E2M1}
E8M0_BIAS, E8M0_NAN = 127, 255


def pack(codes: Tensor) -> Tensor:
    """Pack integers from 0 to 15 `[..., C]` into uint8 `[..., C / 2]`, the first of two in the low four bits.

    Raises ShapeError for an odd C, and for codes out of range.
    """
    if codes.shape[-1] % 2 or codes.is_floating_point():
        raise ShapeError(f"packed are integers of an even number of columns, not {codes.dtype} {list(codes.shape)}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= 15:
        raise ShapeError(f"codes lie in [0, 15], not in [{int(codes.min())}, {int(codes.max())}]; add 8 to INT4 values")
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Unpack uint8 `[..., C / 2]` into uint8 codes `[..., C]`, the inverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def powers_of_two(scale: Tensor) -> Tensor:
    """Convert e8m0, stored as uint8, to float32: 2 to the power of the byte less 127. 255 is NaN."""
    exponents = scale.int() - E8M0_BIAS
    # 2^-127 is subnormal in float32, so that a power computed in float32 may lose it.
    values = torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents).float()
    return values.where(scale != E8M0_NAN, torch.nan)


def plain(w: Tensor, scale: Tensor | None, stored: Format, matrices: int = 1) -> Tensor:
    """Compute float32 `[R, C]` of stored weights: `matrices` of them, one above the other, each with its own scales.

    w: as MoEWeights has one expert's, rows of gate first.
    scale: of the shape that `stored.scale_shape` says; None if the weights have none.

    Raises ShapeError for scales of another shape.
    """
    if stored.packed:
        w = torch.tensor(CODES[stored.element], dtype=torch.float32, device=w.device)[unpack(w).int()]
    if scale is None:
        return w.float()
    factors = powers_of_two(scale) if stored.scale == "e8m0" else scale
    each = stored.scale_rows or len(w) // matrices, stored.scale_columns or w.shape[1]
    pairs = zip(w.chunk(matrices), factors.chunk(matrices), strict=True)
    return torch.cat([dequantise(part, factor, *each) for part, factor in pairs])


def dequantise(w: Tensor, scale: Tensor, rows_each: int = SCALE_BLOCK, columns_each: int | None = None) -> Tensor:
    """Compute float32 `[..., R, C]` = `w [..., R, C]` * its scales `[..., ceil(R / r), ceil(C / c)]`.

    r and c are `rows_each` and `columns_each`, rows and columns that share a scale; c is r if None. The last may be
    fewer. Raises ShapeError for a scale of another shape.
    """
    rows, columns = w.shape[-2:]
    columns_each = columns_each or rows_each
    expected = (*w.shape[:-2], -(-rows // rows_each), -(-columns // columns_each))
    if scale.shape != expected:
        raise ShapeError(f"the scale of a weight {list(w.shape)} must be {list(expected)}, not {list(scale.shape)}")
    return w.float() * expand(scale.float(), rows, columns, rows_each, columns_each)


def expand(scale: Tensor, rows: int, columns: int, rows_each: int, columns_each: int) -> Tensor:
    """Repeat each scale for the rows and columns that share it: `[..., rows, columns]`, the last ones cut."""
    deep = scale.repeat_interleave(rows_each, -2)[..., :rows, :]
    return deep.repeat_interleave(columns_each, -1)[..., :columns]


def format_of(weights: MoEWeights) -> Format:
    """The weights' format with the side of the scale blocks that they really have."""
    side = weights.scale_block
    return weights.stored if side is None else replace(weights.stored, scale_rows=side, scale_columns=side)


def quantise_activations(x: Tensor, group: int | None = 128) -> tuple[Tensor, Tensor]:
    """(fp8 e4m3 `[T, C]`, float32 scale `[T, ceil(C/G)]`) of float `x [T, C]`, one scale a token and G columns.

    G is `group`, and all columns if that is None; the last group may be short. scale = max(amax, 1e-10) / 448; values
    are divided by it, rounded to nearest even, and never exceed 448. A NaN or an infinity spoils its own group only.
    """
    columns = x.shape[1]
    group = columns if group is None else group
    groups = pad(x.float(), (0, -columns % group)).reshape(len(x), -(-columns // group), group)
    scale = scale_to_fp8(groups.abs().amax(-1))
    return to_fp8(x.float() / scale.repeat_interleave(group, 1)[:, :columns]), scale


def through_fp8(x: Tensor, group: int | None) -> Tensor:
    """float32 `x [T, C]` after a round trip through fp8 with a scale a group: what an fp8 GEMM is fed."""
    values, scale = quantise_activations(x, group)
    return values.float() * scale.repeat_interleave(x.shape[1] if group is None else group, -1)[:, : x.shape[1]]


def scale_to_fp8(amax: Tensor) -> Tensor:
    """The scale that brings the largest of a group to 448."""
    # By a tensor: on a GPU torch divides by a number through its reciprocal, which rounds differently.
    return amax.clamp(min=TINY) / torch.full_like(amax, FP8_MAX)


def to_fp8(values: Tensor) -> Tensor:
    """Round to e4m3, to nearest even."""
    # 448 is exceeded by a rounding error of the division at most, but beyond it e4m3 knows only NaN.
    return values.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def quantise(w: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Round float weights `[..., R, C]`, of one matrix each, to a format with scales, as MoEWeights wants them.

    Scales follow the largest weight that shares them: to 448 for e4m3, to 7 for INT4, to at least 4 and less than 8
    for MXFP4, whose largest value is 6 (OCP MX). Weights are rounded to the nearest value.

    Raises ShapeError if the format has no scales, or its groups do not divide the columns.
    """
    stored = FORMATS[format]
    if stored.scale is None:
        raise ShapeError(f"{format} has no scales; convert the weights with .to()")
    rows, columns = w.shape[-2:]
    if reason := stored.misfit(columns, columns):
        raise ShapeError(reason.replace("hidden_size", "the number of columns"))
    each = stored.scale_rows or rows, stored.scale_columns or columns
    padded = pad(w.float(), (0, -columns % each[1], 0, -rows % each[0]))
    deep, wide = (size // n for size, n in zip(padded.shape[-2:], each, strict=True))
    amax = padded.reshape(*w.shape[:-2], deep, each[0], wide, each[1]).abs().amax((-3, -1))
    if stored.element == "e4m3":
        scale = scale_to_fp8(amax)
        return to_fp8(w.float() / expand(scale, rows, columns, *each)), scale
    if stored.element == "int4":
        scale = (amax.clamp(min=TINY) / 7).bfloat16()
        factors = expand(scale.float(), rows, columns, *each)
        return pack(((w.float() / factors).round().clamp(-8, 7) + 8).to(torch.uint8)), scale
    exponents = (torch.frexp(amax.clamp(min=2.0**-100)).exponent - 1 - 2).clamp(-E8M0_BIAS, E8M0_BIAS)
    stored_exponents = (exponents + E8M0_BIAS).to(torch.uint8)
    ratio = w.float() / expand(powers_of_two(stored_exponents), rows, columns, *each)
    table = torch.tensor(E2M1[:8], dtype=torch.float32, device=w.device)
    code = torch.bucketize(ratio.abs(), (table[1:] + table[:-1]) / 2)
    return pack((code + 8 * (ratio < 0)).to(torch.uint8)), stored_exponents


def per_row(weights: MoEWeights) -> MoEWeights:
    """The same weights with a scale for each row instead of each matrix: fp8-tensor as fp8-channel.

    The weights themselves are shared. Other formats are returned as they are.
    """
    if weights.stored.weights != "fp8-tensor" or weights.gate_up_scale is None or weights.down_scale is None:
        return weights
    _, hidden, inter = weights.sizes
    gate, up = (s[:, None] for s in weights.gate_up_scale.unbind(1))
    if weights.layout == "up-first":
        gate, up = up, gate
    rows = torch.cat((gate.expand(-1, inter, 1), up.expand(-1, inter, 1)), 1).contiguous()
    if weights.layout != "gate-first":
        rows = copy_rows(rows, "gate-first", torch.empty_like(rows), weights.layout, inter)
    down = weights.down_scale.expand(-1, hidden, 1).contiguous()
    named = FORMATS["fp8-channel"] if weights.stored.rounds else FORMATS["fp8-channel-a16"]
    return replace(weights, gate_up_scale=rows, down_scale=down, format=named.name)


def check_symmetric(name: str, group: int, zero_points: Tensor | None = None, g_idx: Tensor | None = None) -> None:
    """Check that INT4 weights of a checkpoint are what MoEWeights can hold: zero points of 8, columns in order.

    name: of the weights, for the error.
    group: columns that share a scale.
    zero_points: packed as the weights, 8 added; None if the checkpoint has none.
    g_idx: the group of each column, `[..., C]`; None or empty if the checkpoint has none.

    Raises ShapeError if a zero point is another, or a column belongs to another group (act-order).
    """
    if zero_points is not None and zero_points.numel():
        codes = zero_points.contiguous().view(torch.uint8)
        if bool((codes != 0x88).any()):
            raise ShapeError(
                f"{name} has zero points other than 8 (asymmetric INT4), which no format here has; quantise the "
                "checkpoint symmetrically, or leave the layer to the engine"
            )
    if g_idx is not None and g_idx.numel():
        in_order = torch.arange(g_idx.shape[-1], dtype=torch.int64, device=g_idx.device) // group
        if bool((g_idx != in_order).any()):
            raise ShapeError(
                f"{name} has its columns reordered (act-order, g_idx), which no format here has; quantise the "
                "checkpoint without it, or leave the layer to the engine"
            )
