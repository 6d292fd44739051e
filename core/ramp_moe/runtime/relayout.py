"""Converts weights from one order of the gate and up projections' rows to another, byte by byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..spec.kernel import LAYOUTS
from ..spec.launchable import ROW_CHUNK, MoEWeights, check_layout

if TYPE_CHECKING:
    from torch import Tensor

ROWS = ("gate_up", "gate_up_scale", "gate_up_bias")
"""Tensors of MoEWeights whose order of rows depends on the layout."""


def relayout(weights: MoEWeights, layout: str) -> MoEWeights:
    """Convert the weights to another of LAYOUTS. Returns the same object if they are in it already.

    gate_up, its scale and its bias are copied bit by bit; everything else is shared. Until the caller drops the
    original, both copies of gate_up exist. Raises UnknownNameError for an unknown layout, and ShapeError for
    gate-up-interleaved-8 if I is not a multiple of 8.
    """
    inter = weights.sizes[2]
    check_layout(layout, inter)
    if layout == weights.layout:
        return weights

    def rows(name: str) -> Tensor | None:
        t: Tensor | None = getattr(weights, name)
        if t is None:
            return None
        return copy_rows(t, weights.layout, _like(t), layout, inter)

    return replace(weights, layout=layout, **{name: rows(name) for name in ROWS})  # type: ignore[arg-type]


def copy_rows(source: Tensor, given: str, out: Tensor, wanted: str, intermediate_size: int) -> Tensor:
    """Copy `source` `[E, 2 R, ...]`, with rows in the order `given`, into `out` in the order `wanted`; return `out`.

    If R is the intermediate size I, they are rows of weights, or what belongs to one each: interleaved by ROW_CHUNK.
    Otherwise they are scales of several rows, which are interleaved one by one.
    """
    import torch

    # Less than ROW_CHUNK only if neither layout is interleaved, when chunks do not matter.
    chunk = math.gcd(ROW_CHUNK, intermediate_size) if source.shape[1] == 2 * intermediate_size else 1
    # Copied as uint8: exact for every bit pattern, on every device.
    fp8 = source.dtype == out.dtype == torch.float8_e4m3fn
    a, b = (source.view(torch.uint8), out.view(torch.uint8)) if fp8 else (source, out)
    for up in (0, 1):
        _half(b, wanted, chunk, up).copy_(_half(a, given, chunk, up))
    return out


def to_give(layouts: Sequence[str]) -> str:
    """The layout in which a kernel that reads `layouts` is given the weights: the first of them that is in LAYOUTS.

    If there is none, it is gate-first, from which the kernel makes its own format.
    """
    return next((key for key in layouts if key in LAYOUTS), "gate-first")


def _like(t: Tensor) -> Tensor:
    import torch

    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _half(t: Tensor, layout: str, chunk: int, up: int) -> Tensor:
    """View the gate rows, or the up rows if `up` is 1, as `[E, R / chunk, chunk, ...]` in their order."""
    experts, _, *rest = t.shape
    if layout == "gate-up-interleaved-8":
        return t.view(experts, -1, 2, chunk, *rest)[:, :, up]
    return t.view(experts, 2, -1, chunk, *rest)[:, up if layout == "gate-first" else 1 - up]
