"""Weights from one order of the gate and up projections' rows into another, byte by byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..kernel import LAYOUTS
from .contract import ROW_CHUNK, MoEWeights, check_layout

if TYPE_CHECKING:
    from torch import Tensor


def relayout(weights: MoEWeights, layout: str) -> MoEWeights:
    """The same weights in another of LAYOUTS; the same object where they are in it already.

    gate_up, its scale and its bias are copied, exactly whatever their bits are; everything else is shared. Until the
    caller drops the weights given, both copies of gate_up exist. Raises UnknownNameError for a layout that does not
    exist, ShapeError for gate-up-interleaved-8 where I is not a multiple of 8.
    """
    inter = weights.gate_up.shape[1] // 2
    check_layout(layout, inter)
    if layout == weights.layout:
        return weights

    def rows(t: Tensor, chunk: int) -> Tensor:
        return _reordered(t, weights.layout, layout, chunk)

    # Less than ROW_CHUNK only where neither layout is interleaved, and chunks do not matter.
    chunk = math.gcd(ROW_CHUNK, inter)
    return replace(
        weights,
        gate_up=rows(weights.gate_up, chunk),
        gate_up_scale=None if weights.gate_up_scale is None else rows(weights.gate_up_scale, 1),
        gate_up_bias=None if weights.gate_up_bias is None else rows(weights.gate_up_bias, chunk),
        layout=layout,
    )


def to_give(layouts: Sequence[str]) -> str:
    """The layout in which a kernel that reads these is given the weights: the first that is in LAYOUTS, or gate-first
    for it to make a format of its own of."""
    return next((key for key in layouts if key in LAYOUTS), "gate-first")


def _reordered(t: Tensor, given: str, wanted: str, chunk: int) -> Tensor:
    """`[E, 2 R, ...]` copied from one order into another, interleaved by so many rows."""
    import torch

    # uint8: a copy of bytes, exact for every bit pattern and on every device.
    source = t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t
    out = torch.empty_like(source)
    for up in (0, 1):
        _half(out, wanted, chunk, up).copy_(_half(source, given, chunk, up))
    return out.view(t.dtype)


def _half(t: Tensor, layout: str, chunk: int, up: int) -> Tensor:
    """View `[E, R / chunk, chunk, ...]` of the gate rows, or with `up` 1 of the up rows, in their order."""
    experts, _, *rest = t.shape
    if layout == "gate-up-interleaved-8":
        return t.view(experts, -1, 2, chunk, *rest)[:, :, up]
    return t.view(experts, 2, -1, chunk, *rest)[:, up if layout == "gate-first" else 1 - up]
