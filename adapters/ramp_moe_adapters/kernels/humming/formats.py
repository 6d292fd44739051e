"""The formats of weights that Humming's GEMMs take, and the sizes of each GEMM as Humming pads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ramp_moe.plugin import FORMATS, GridGeometry, MoEShape

Which = Literal["up", "down"]
PAD_N, PAD_K = 256, 128
"""Multiples to which weight rows and columns are padded, as vLLM pads them: every tile then divides them."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How Humming stores and multiplies one format.

    element: Humming's name of a weight's dtype.
    bits: of a weight.
    scales: what shares a scale: a "group" of columns in a row, a "block", or a row ("channel").
    scale_dtype: Humming's name.
    group: columns that share a scale; 0 if all of a row do.
    a_bits: of an activation, 16 or 8.
    a_group: columns of an 8-bit activation that share a scale; 0 if all of a token do.
    """

    element: str
    bits: int
    scales: Literal["group", "block", "channel"]
    scale_dtype: str
    group: int
    a_bits: int = 16
    a_group: int = 0

    @property
    def scale_bits(self) -> int:
        return {"float32": 32, "bfloat16": 16, "float8e8m0": 8}[self.scale_dtype]

    @property
    def fused_exponents(self) -> bool:
        """Whether exponents of scales are added to those of the weights, as MXFP4 becomes fp8."""
        return self.a_bits == 8 and self.scale_dtype == "float8e8m0"

    @property
    def packed_k(self) -> bool:
        """Whether the weights are stored in Humming's packed-K layout, which wants warps as deep as 128 columns."""
        return self.bits < self.a_bits == 8 and (self.fused_exponents or self.group == PAD_K)

    @property
    def flat(self) -> bool:
        """Whether weights are multiplied as they are stored, without being widened."""
        return self.bits == self.a_bits


def _int4(group: int, a_bits: int = 16) -> Kind:
    return Kind("uint4", 4, "group", "bfloat16", group, a_bits)


KINDS: Mapping[str, Kind] = {
    "fp8": Kind("float8e4m3", 8, "block", "float32", 128, 8, 128),
    "fp8-channel": Kind("float8e4m3", 8, "channel", "bfloat16", 0, 8),
    "fp8-tensor": Kind("float8e4m3", 8, "channel", "bfloat16", 0, 8),
    "int4-g32": _int4(32),
    "int4-g128": _int4(128),
    "int4-g32-a8": _int4(32, 8),
    "int4-g128-a8": _int4(128, 8),
    "mxfp4": Kind("float4e2m1", 4, "group", "float8e8m0", 32),
    "mxfp4-a8": Kind("float4e2m1", 4, "group", "float8e8m0", 32, 8, 128),
}
"""By our formats' names. Humming's integers have 8 added, as ours."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """One GEMM: `n` weight rows and `k` columns of a projection, and what they are padded to."""

    n: int
    k: int
    padded_n: int
    padded_k: int
    expert_bytes: int

    def grid(self, **fields: Any) -> GridGeometry:
        """The grid of a launch. Humming computes the padded rows, too."""
        return GridGeometry(n=self.padded_n, k=self.padded_k, expert_bytes=self.expert_bytes, **fields)


def sizes(shape: MoEShape, which: Which) -> Sizes:
    """The sizes of a shape's up projection (gate and up), or of its down projection."""
    hidden, inter = shape.hidden_size, shape.intermediate_size
    n, k = (shape.gate_up_rows, hidden) if which == "up" else (hidden, inter)
    stored = FORMATS[shape.dtype]
    padded_n, padded_k = (-(-size // to) * to for size, to in ((n, PAD_N), (k, PAD_K)))
    return Sizes(n, k, padded_n, padded_k, stored.matrix_bytes(padded_n, padded_k))


def misfit(shape: MoEShape) -> str | None:
    """Why the sizes of a shape cannot be computed; None if they can."""
    kind = KINDS[shape.dtype]
    if reason := shape.format.misfit(shape.hidden_size, shape.intermediate_size):
        return reason
    # A group of 128 activations shares a scale; else rows of operands are loaded 16 bytes at a time.
    step = kind.a_group or (16 if kind.a_bits == 8 else 8)
    for what in ("hidden_size", "intermediate_size"):
        if getattr(shape, what) % step:
            return f"{what} {getattr(shape, what)} is not a multiple of {step}"
    return None
