"""A layer's weights: the tensors, what they hold, and the checks that they fit each other."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import KernelError, ShapeError, UnknownNameError
from .dense import check_dense
from .formats import FORMATS, Format, find_format
from .kernel import LAYOUTS
from .shapes import SCALE_BLOCK, MoEShape, scale_block, scale_blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ACTIVATIONS = ("swiglu", "gelu_tanh", "swiglu_oai", "swiglu_clamped")
"""Activations of gated experts:

swiglu: silu(gate) * up.
gelu_tanh: gelu(gate) * up, with the tanh approximation.
swiglu_oai: gpt-oss's. Gate is clamped to at most 7 and up to [-7, 7], then gate * sigmoid(1.702 gate) * (up + 1).
swiglu_clamped: DeepSeek-V4's. The same clamps at the weights' `limit` in place of 7, then silu(gate) * up.
"""

_logger = logging.getLogger("ramp_moe")

ROW_CHUNK = 8
"""Consecutive rows of gate, and then of up, in the layout gate-up-interleaved-8."""


@dataclass(frozen=True)
class MoEWeights:
    """A layer's experts, contiguous on one device.

    gate_up: `[E, 2 I, H]` bf16, fp16 or float8_e4m3fn; packed, uint8 `[E, 2 I, H / 2]` or int32 `[E, 2 I, H / 8]`.
    down: `[E, H, I]` of the same dtype; packed, `[E, H, I / 2]` or `[E, H, I / 8]`.
    gate_up_scale, down_scale: `[E, 2 r, c]` and `[E, r, c]`, for the `r` by `c` scales of one matrix; None without.
        fp8: float32, a scale for each block `[B, B]`. Blocks count from a matrix's first row; the last may be short. B
            is 128, or another of `ramp_moe.spec.shapes.scale_blocks` for a shard that begins inside a block of 128. H
            must then be a multiple of 128.
        fp8-channel: r is the number of rows, c is 1. fp8-tensor: r and c are 1.
        int4-g32, int4-g128, mxfp4: r is the number of rows, c the number of columns / 32 or 128.
        mxfp4 has uint8 or float8_e8m0fnu; all but it and fp8 have float32, bf16 or fp16.
    gate_up_bias, down_bias: `[E, 2 I]` and `[E, H]`, float32, bf16 or fp16; None if there is none.
    activation: one of ACTIVATIONS.
    layout: one of LAYOUTS, the order of the rows of gate_up, its bias and its scale. If it is interleaved, block rows
        of gate and of up alternate in the scale.
    limit: bound at which swiglu_clamped clamps gate and up; None for the other activations.
    format: what the tensors hold, a name in `formats.FORMATS`. None for bf16, fp16 and fp8, whose dtype says it.
    activations: what kernels may at most round activations to, "bf16" (16 bits) or "fp8"; None for what the engines
        that serve the format do.

    Packed weights follow each other along a row. The first of two is in the low four bits of a byte, the first of eight
    in those of an int32, which is the same in memory: int32 becomes a view as uint8. INT4 is stored with 8 added, as in
    compressed-tensors' pack-quantized form. MXFP4 has the sign in bit 3, the exponent in bits 2 and 1 and the mantissa
    in bit 0, as in OCP MX. Zero points other than 8 and reordered columns (act-order) cannot be given.

    A tensor with other strides (padded rows, for one) is copied, and a warning is logged. Its memory is then taken
    twice until the caller drops it, and later writes to it have no effect.

    Raises ShapeError for tensors that do not fit together, UnknownNameError for an unknown activation, layout or
    format, and KernelError for a `limit` that is missing, not positive, or given to another activation.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "swiglu"
    layout: str = "gate-first"
    limit: float | None = None
    format: str | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        import torch

        optional = ("gate_up_scale", "down_scale", "gate_up_bias", "down_bias")
        check_dense(ShapeError, gate_up=self.gate_up, down=self.down)
        check_dense(ShapeError, **{name: t for name in optional if (t := getattr(self, name)) is not None})
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise UnknownNameError("activation", self.activation, ACTIVATIONS)
        if self.activation != "swiglu_clamped" and self.limit is not None:
            raise KernelError(f"{self.activation} takes no limit, here {self.limit}; swiglu_clamped does")
        if self.activation == "swiglu_clamped" and not (self.limit is not None and 0 < self.limit < math.inf):
            raise KernelError(f"swiglu_clamped needs a positive limit, as limit=10.0, not {self.limit}")
        if self.gate_up.ndim != 3 or self.gate_up.shape[1] % 2:
            raise ShapeError(f"gate_up must be [E, 2 I, H], not {list(self.gate_up.shape)}")
        stored, (experts, hidden, inter) = self.stored, self.sizes
        check_layout(self.layout, inter)
        if reason := stored.misfit(hidden, inter):
            raise ShapeError(f"{stored.weights} weights: {reason}; pad them, or leave the layer in 16 bits")
        if stored.weights == "fp8" and hidden % SCALE_BLOCK:
            raise ShapeError(f"fp8 weights need a hidden size in multiples of {SCALE_BLOCK}, not {hidden}")
        if self.down.dtype != self.gate_up.dtype and stored.packed:
            raise ShapeError(
                f"gate_up is {self.gate_up.dtype}, down {self.down.dtype}: a layer's weights are of one format; "
                "quantise or dequantise one of them"
            )
        per_element = 2 * self.gate_up.dtype.itemsize if stored.packed else 1
        if inter % per_element:
            raise ShapeError(f"{self.gate_up.dtype} holds {per_element} weights, which do not divide {inter} columns")
        self._check("down", (experts, hidden, inter // per_element), (self.gate_up.dtype,))
        if stored.scale is not None:
            self._check_scales(stored)
        elif self.gate_up_scale is not None or self.down_scale is not None:
            raise ShapeError(f"scales belong to quantised weights, these are {stored.weights}")
        for name, columns in (("gate_up_bias", 2 * inter), ("down_bias", hidden)):
            if getattr(self, name) is not None:
                self._check(name, (experts, columns), (torch.float32, torch.bfloat16, torch.float16))
        for name in ("gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if not tensor.is_contiguous():
                _note_copy(name, tuple(tensor.shape), tensor.stride(), tensor.dtype.itemsize * tensor.numel() / 2**30)
                object.__setattr__(self, name, tensor.contiguous())
            if tensor.device != self.gate_up.device:
                raise ShapeError(f"{name} is on {tensor.device}, gate_up on {self.gate_up.device}; move it there")
            if tensor.dtype in (torch.int32, torch.float8_e8m0fnu):
                object.__setattr__(self, name, getattr(self, name).view(torch.uint8))

    @functools.cached_property
    def stored(self) -> Format:
        """What the tensors hold, and what activations may be rounded to.

        Raises ShapeError for weights of another dtype than the format has, UnknownNameError for an unknown format.
        """
        import torch

        dtype = self.gate_up.dtype
        plain = {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.float16: "fp16"}
        packed = (torch.uint8, torch.int32)
        if self.format is None and dtype in packed:
            names = " or ".join(f.name for f in FORMATS.values() if f.packed and f.name == f.weights)
            raise ShapeError(f"gate_up is {dtype}, packed weights; say what they are: format={names}")
        if self.format is None and dtype not in plain:
            raise ShapeError(
                f"gate_up is {dtype}; weights must be bf16, fp16 or float8_e4m3fn, or uint8 or int32 with a format"
            )
        found = find_format(plain[dtype] if self.format is None else self.format, self.activations)
        if found.packed and dtype not in packed:
            raise ShapeError(
                f"{found.weights} weights are packed in uint8 or int32, gate_up is {dtype}; pack codes of 0 to 15 with "
                "ramp_moe.runtime.formats.pack"
            )
        element = "fp8" if found.element == "e4m3" else found.element
        if not found.packed and plain.get(dtype) != element:
            raise ShapeError(f"{found.weights} weights are {found.element}, gate_up is {dtype}; correct the format")
        return found

    @functools.cached_property
    def sizes(self) -> tuple[int, int, int]:
        """E, H and I, whatever shape packed tensors have."""
        experts, rows, columns = self.gate_up.shape
        return experts, columns * (2 * self.gate_up.dtype.itemsize if self.stored.packed else 1), rows // 2

    def _check_scales(self, stored: Format) -> None:
        """Raises ShapeError for scales that are missing, or do not fit the weights."""
        import torch

        (experts, hidden, inter), what = self.sizes, stored.weights
        dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
        if what == "fp8":
            block, dtypes = self.scale_block or SCALE_BLOCK, (torch.float32,)
            stored = replace(stored, scale_rows=block, scale_columns=block)
        elif stored.scale == "e8m0":
            dtypes = (torch.uint8, torch.float8_e8m0fnu)
        shapes = {
            "gate_up_scale": (experts, *stored.scale_shape(inter, hidden, matrices=2)),
            "down_scale": (experts, *stored.scale_shape(hidden, inter)),
        }
        for name, shape in shapes.items():
            if getattr(self, name) is None:
                raise ShapeError(f"{what} weights need {name}, {stored.scale} {list(shape)}")
            columns = hidden if name == "gate_up_scale" else inter
            self._check(name, shape, dtypes, _hint(self, name, stored, shape, columns))

    def _check(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], hint: str = "") -> None:
        tensor: Tensor = getattr(self, name)
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} must be {list(shape)}, not {list(tensor.shape)}{hint}")
        if tensor.dtype not in dtypes:
            several = [str(dtype).removeprefix("torch.") for dtype in dtypes]
            short = [{"bfloat16": "bf16", "float16": "fp16"}.get(s, s) for s in several]
            wanted = dtypes[0] if len(dtypes) == 1 else f"{', '.join(short[:-1])} or {short[-1]}"
            raise ShapeError(f"{name} must be {wanted}, not {tensor.dtype}")

    @functools.cached_property
    def scale_block(self) -> int | None:
        """Side of the blocks that share an fp8 scale, from the columns of gate_up_scale; None without such blocks."""
        if self.gate_up_scale is None or self.stored.weights != "fp8":
            return None
        return scale_block(self.gate_up_scale.shape[-1], *self.sizes[1:])

    def shape(self, top_k: int, name: str | None = None) -> MoEShape:
        """The layer's shape, for a router that names `top_k` experts per token."""
        experts, hidden, inter = self.sizes
        return MoEShape(experts, top_k, hidden, inter, self.stored.name, name)


def _hint(weights: MoEWeights, name: str, stored: Format, shape: tuple[int, ...], columns: int) -> str:
    """What scales of another shape than `shape` may be, with the remedy; empty if nothing is known of it."""
    given, (experts, _, inter) = tuple(getattr(weights, name).shape), weights.sizes
    if stored.weights == "fp8":
        if inter % SCALE_BLOCK == 0 or name != "gate_up_scale":
            return ""
        blocks = " or ".join(map(str, scale_blocks(inter)))
        return f"; gate and up have scale blocks of their own, of {blocks}"
    if given == shape[:-1] and shape[-1] == 1:
        return "; call .unsqueeze(-1) on it"
    if len(given) == 3 and (given[0], given[2], given[1]) == shape:
        return "; call .transpose(1, 2) on it"
    if given in ((experts, 1, 1), (experts,)):
        return "; gate and up have a scale each: repeat it" if name == "gate_up_scale" else "; view it so"
    if given[:2] == shape[:2] and len(given) == 3 and stored.scale_columns and columns % given[2] == 0:
        group = columns // given[2]
        other = f"int4-g{group}"
        remedy = f"give format={other!r}" if stored.element == "int4" and other in FORMATS else "no format has them"
        return f"; these scales are of {group} columns each: {remedy}"
    return ""


@functools.cache  # once for all the layers of a model
def _note_copy(name: str, shape: tuple[int, ...], stride: tuple[int, ...], gib: float) -> None:
    _logger.warning(
        "ramp_moe: %s %s has the strides %s and is copied: %.3g GiB more per layer until you drop the original",
        name, list(shape), list(stride), gib,
    )  # fmt: skip


def check_layout(layout: str, intermediate_size: int) -> None:
    """Raises UnknownNameError for a layout that is not in LAYOUTS, ShapeError if the size rules it out."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise UnknownNameError("weight layout", layout, LAYOUTS)
    if layout == "gate-up-interleaved-8" and intermediate_size % ROW_CHUNK:
        raise ShapeError(f"{layout} needs an intermediate size in multiples of {ROW_CHUNK}, not {intermediate_size}")
