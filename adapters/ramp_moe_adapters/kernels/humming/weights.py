"""Repacks our weights into Humming's layout, expert by expert.

INT4 is stored with 8 added, as Humming has its integers. vLLM turns it into sign and magnitude if no weight is -8. With
bf16 activations that takes 1.2 to 1.4 times as long on an H200.

MXFP4 weights that meet fp8 activations become fp8 themselves: a scale's exponent is added to those of its weights. That
works for scales within 2^11 of the largest one of an expert, or else of each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from ramp_moe.plugin import SCALE_BLOCK, KernelError, MoEShape, MoEWeights
from ramp_moe.runtime.formats import per_row
from ramp_moe.spec.checks import check_hopper
from torch import Tensor

from . import package
from .formats import KINDS, Kind, Which

FUSED_RANGE = 11
"""Largest difference between the exponents of scales that can be added to those of fp8 weights."""
MAX_EXPONENT = 230
"""Greatest e8m0 scale that is taken, 2^103. Beyond, products of weights and activations leave the range of bf16."""


@dataclass(frozen=True, slots=True)
class Side:
    """One GEMM's weights in Humming's layout.

    layer: Humming's LayerConfig, as a string.
    weight, scale: `[E, ...]`. scale_2: a second scale for each expert or row; None if there is none.
    """

    layer: str
    weight: Tensor
    scale: Tensor
    scale_2: Tensor | None


def repack(weights: MoEWeights) -> tuple[Side, Side]:
    """The up and the down projection of gate-first weights in Humming's layout.

    One expert is repacked after the other, so that besides the result at most one is copied.

    Raises KernelError for weights, a device or a package that cannot be used.
    """
    if weights.stored.name not in KINDS:
        raise KernelError(f"humming takes weights in {' or '.join(KINDS)}, not in {weights.stored.name}")
    if weights.scale_block not in (None, SCALE_BLOCK):
        raise KernelError(f"humming takes fp8 scale blocks of {SCALE_BLOCK}, not of {weights.scale_block}")
    check_hopper("humming", weights.gate_up.device)
    shape = weights.shape(top_k=1)
    weights = per_row(weights)
    assert weights.gate_up_scale is not None
    assert weights.down_scale is not None
    with torch.cuda.device(weights.gate_up.device):
        return (
            _side(shape, "up", weights.gate_up, weights.gate_up_scale),
            _side(shape, "down", weights.down, weights.down_scale),
        )


def _side(shape: MoEShape, which: Which, weight: Tensor, scale: Tensor) -> Side:
    kind = KINDS[shape.dtype]
    row_exponents = False
    if kind.scale_dtype == "float8e8m0":
        check_exponents(scale)
        row_exponents = kind.fused_exponents and needs_row_exponents(weight, scale)
    layer = package.layer_config(shape, which, row_exponents=row_exponents).to_str()
    single = package.layer_config(shape, which, experts=1, row_exponents=row_exponents)
    transform = package.package().transform.transform_humming_tensors
    parts: dict[str, Tensor] = {}
    for e, tensors in enumerate(_experts(kind, weight, scale)):
        try:
            made: dict[str, Tensor] = transform(single, tensors)
        except Exception as error:  # its assertions, and its compiler
            raise KernelError(f"humming cannot repack these weights ({type(error).__name__}: {error})") from error
        for name, part in made.items():
            if name not in parts:
                parts[name] = part.new_empty((shape.num_experts, *part.shape[1:]))
            parts[name][e].copy_(part[0])
    return Side(layer, parts["weight"], parts["weight_scale"], parts.get("weight_scale_2"))


def _experts(kind: Kind, weight: Tensor, scale: Tensor) -> Iterator[dict[str, Tensor]]:
    """Each expert's tensors as Humming's schema has them, `[1, ...]`."""
    for e in range(len(weight)):
        one = slice(e, e + 1)
        yield {"weight": weight[one].view(torch.int32), "weight_scale": _scales(kind, scale[one])}


def _scales(kind: Kind, scale: Tensor) -> Tensor:
    if kind.scale_dtype == "float8e8m0":
        return scale.view(torch.float8_e8m0fnu)
    return scale.to(getattr(torch, kind.scale_dtype))


def check_exponents(scale: Tensor) -> None:
    """Raises KernelError for e8m0 scales, uint8, that are NaN or too large for Humming's products."""
    if (greatest := int(scale.max())) > MAX_EXPONENT:
        raise KernelError(
            f"humming: MXFP4 scales must be at most 2^{MAX_EXPONENT - 127}, and one is 2^{greatest - 127} (2^128 is "
            "NaN); correct the checkpoint, or leave the layer to another kernel"
        )


def needs_row_exponents(packed: Tensor, scale: Tensor) -> bool:
    """Whether an expert's e8m0 scales differ by more than FUSED_RANGE, so that each row needs a range of its own.

    packed: MXFP4 `[E, N, K / 2]`. scale: uint8 `[E, N, K / 32]`. Groups of zeros do not count. Raises KernelError if
    the scales of a row differ by more.
    """
    wide = False
    for e, (w, s) in enumerate(zip(packed, scale, strict=True)):
        used = ((w & 0x77) != 0).unflatten(-1, (s.shape[-1], -1)).any(-1)
        codes = s.short()
        if bool((used & (codes < codes.amax(-1, keepdim=True) - FUSED_RANGE)).any()):
            raise KernelError(
                f"humming: scales in a row of expert {e} differ by more than 2^{FUSED_RANGE}, which fp8 cannot hold; "
                "forbid rounded activations with activations='bf16'"
            )
        wide |= bool((used & (codes < codes.amax() - FUSED_RANGE)).any())
    return wide
