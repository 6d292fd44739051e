"""Weights from one order of the gate and up projections' rows into another, byte by byte."""

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
"""Tensors of MoEWeights whose rows a layout orders."""


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

    def rows(name: str) -> Tensor | None:
        t: Tensor | None = getattr(weights, name)
        if t is None:
            return None
        return copy_rows(t, weights.layout, _like(t), layout, inter, scale=name == "gate_up_scale")

    return replace(weights, layout=layout, **{name: rows(name) for name in ROWS})  # type: ignore[arg-type]


def copy_rows(source: Tensor, given: str, out: Tensor, wanted: str, intermediate_size: int, scale: bool) -> Tensor:
    """`source` `[E, 2 R, ...]`, whose rows are in the order `given`, copied into `out`, whose rows are in the order
    `wanted`. scale: whether rows are those of block scales, which are interleaved one by one. Returns `out`."""
    import torch

    # Less than ROW_CHUNK only where neither layout is interleaved, and chunks do not matter.
    chunk = 1 if scale else math.gcd(ROW_CHUNK, intermediate_size)
    # uint8: a copy of bytes, exact for every bit pattern and on every device.
    fp8 = source.dtype == out.dtype == torch.float8_e4m3fn
    a, b = (source.view(torch.uint8), out.view(torch.uint8)) if fp8 else (source, out)
    for up in (0, 1):
        _half(b, wanted, chunk, up).copy_(_half(a, given, chunk, up))
    return out


def to_give(layouts: Sequence[str]) -> str:
    """The layout in which a kernel that reads these is given the weights: the first that is in LAYOUTS, or gate-first
    for it to make a format of its own of."""
    return next((key for key in layouts if key in LAYOUTS), "gate-first")


def _like(t: Tensor) -> Tensor:
    import torch

    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _half(t: Tensor, layout: str, chunk: int, up: int) -> Tensor:
    """View `[E, R / chunk, chunk, ...]` of the gate rows, or with `up` 1 of the up rows, in their order."""
    experts, _, *rest = t.shape
    if layout == "gate-up-interleaved-8":
        return t.view(experts, -1, 2, chunk, *rest)[:, :, up]
    return t.view(experts, 2, -1, chunk, *rest)[:, up if layout == "gate-first" else 1 - up]
