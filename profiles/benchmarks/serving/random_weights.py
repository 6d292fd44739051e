"""Random weights of a sensible size, the same in every engine that has the same names of parameters.

The engines' own random weights are within 1e-3 of zero, so that rounding decides the routing. Here activations keep
their size from layer to layer. The first channel of the hidden states is a constant. So the first column of a router is
a bias by expert, which `skew` sets.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from ramp_moe.runtime import formats
from ramp_moe.spec.formats import FORMATS
from torch import Tensor

CONSTANT = 6.0
"""Value of the first channel of every embedding."""
FP8 = torch.float8_e4m3fn
BLOCK = 128
SPREAD = 0.022
"""Standard deviation of a weight."""
DOWN_SPREAD = 0.03
FILLED = ("scale_inv", "_scale", "_shape", "_zero_point")
"""Endings of parameters that are drawn with others, or that experts do not read."""
COMPRESSED = ("fp8-channel", "int4-g32")
"""Formats in which the experts alone are quantised."""


def fill(parameters: Mapping[str, Tensor], rounded: str | None = None) -> None:
    """Draw a model's parameters in place.

    rounded: `bf16`, `fp8` or one of COMPRESSED, for a float32 model that must have exactly the values of the model in
        that dtype. None: the model has its own dtype.
    """
    for name, parameter in parameters.items():
        p = parameter.data
        if name.endswith(FILLED):
            continue
        if p.dim() == 1 or "norm" in name:
            p.fill_(1.0)
        elif p.dim() == 3:  # experts, one at a time
            scales = parameters.get(f"{name}_scale_inv", parameters.get(f"{name.removesuffix('_packed')}_scale"))
            for e in range(len(p)):
                _put(f"{name.removesuffix('_packed')}.{e}", p[e], None if scales is None else scales.data[e], rounded)
        else:
            scales = parameters.get(f"{name}_scale_inv")
            _put(name, p, None if scales is None else scales.data, rounded)


def skew(parameters: Mapping[str, Tensor], strength: float) -> int:
    """Bias each router by `strength` times a normal draw per expert; 0: no bias. Returns the number of routers."""
    routers = {name: p for name, p in parameters.items() if _is_router(name) and p.dim() == 2}
    for name, p in routers.items():
        drawn = torch.randn(len(p), dtype=torch.float32, device="cpu", generator=_generator(f"{name}.skew", "cpu"))
        p.data[:, 0] = (strength / CONSTANT * drawn).to(p.device, p.dtype)
    return len(routers)


def quantise(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise w float32 `[N, K]` to e4m3. Returns it, and the scales float32 `[N / 128, K / 128]` of its blocks."""
    n, k = w.shape
    blocks = w.view(n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448.0
    return (blocks / scales).to(FP8).view(n, k), scales.view(n // BLOCK, k // BLOCK)


def _put(name: str, p: Tensor, scales: Tensor | None, rounded: str | None) -> None:
    if p.dtype == torch.int32:
        assert scales is not None
        packed, s = formats.quantise(_drawn(name, p, columns=8 * p.shape[1]), "int4-g32")
        p.copy_(packed.view(torch.int32))
        scales.copy_(s)
        return
    w = _drawn(name, p)
    if p.dtype == FP8 and scales is not None and scales.shape == (len(p), 1):
        q, s = formats.quantise(w, "fp8-channel")
        p.copy_(q)
        scales.copy_(s)
        return
    if p.dtype == FP8:
        q, s = quantise(w)
        p.copy_(q)
        assert scales is not None
        scales.copy_(s)
        return
    if rounded == "fp8" and not _is_plain(name):
        q, s = quantise(w)
        w = q.float() * s.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    elif rounded in COMPRESSED and "experts" in name:
        w = formats.plain(*formats.quantise(w, rounded), FORMATS[rounded])
    elif rounded is not None:
        w = w.bfloat16()
    p.copy_(w)


def _drawn(name: str, p: Tensor, columns: int | None = None) -> Tensor:
    """Weights float32 of the parameter's shape. columns: of the weights, if the parameter packs them."""
    spread = DOWN_SPREAD if "down" in name or "w2_" in name else SPREAD
    if "embed_tokens" in name:
        spread = 1.0
    elif _is_router(name):
        spread = 1 / math.sqrt(p.shape[1])
    w = torch.empty((len(p), columns or p.shape[1]), device=p.device, dtype=torch.float32)
    w.normal_(0, spread, generator=_generator(name, p.device))
    if _is_plain(name):
        w[:, 0] = CONSTANT if "embed_tokens" in name else 0.0
    return w


def _is_router(name: str) -> bool:
    return name.endswith("gate.weight") and "shared" not in name


def _is_plain(name: str) -> bool:
    """Whether a parameter stays in bf16 if the model is in fp8."""
    return _is_router(name) or "embed_tokens" in name or "lm_head" in name


def _generator(name: str, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
