"""Random weights of a sensible size, the same in every engine that names its parameters alike.

The engines' own random weights are within 1e-3 of zero, so that rounding decides who is routed where. Here activations
keep their size from layer to layer. The first channel of the hidden states is a constant, so the first column of a
router is a bias by expert: `skew` sets it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

CONSTANT = 6.0
"""The first channel of every embedding."""
FP8 = torch.float8_e4m3fn
BLOCK = 128
SPREAD = 0.022
"""Standard deviation of a weight."""
DOWN_SPREAD = 0.03
SCALES = ("scale_inv", "_scale")


def fill(parameters: Mapping[str, Tensor], rounded: str | None = None) -> None:
    """Draw a model's parameters in place.

    rounded: `bf16` or `fp8` for a model in float32 that is to have exactly the values that the model has in that dtype.
    """
    for name, parameter in parameters.items():
        p = parameter.data
        if name.endswith(SCALES):
            continue
        if p.dim() == 1 or "norm" in name:
            p.fill_(1.0)
        elif p.dim() == 3:  # experts, one at a time
            scales = parameters.get(f"{name}_scale_inv")
            for e in range(len(p)):
                _put(f"{name}.{e}", p[e], None if scales is None else scales.data[e], rounded)
        else:
            scales = parameters.get(f"{name}_scale_inv")
            _put(name, p, None if scales is None else scales.data, rounded)


def skew(parameters: Mapping[str, Tensor], strength: float) -> int:
    """Bias each router by `strength` times a normal draw an expert; 0 for none. Returns how many routers there are."""
    routers = {name: p for name, p in parameters.items() if _is_router(name) and p.dim() == 2}
    for name, p in routers.items():
        drawn = torch.randn(len(p), dtype=torch.float32, device="cpu", generator=_generator(f"{name}.skew", "cpu"))
        p.data[:, 0] = (strength / CONSTANT * drawn).to(p.device, p.dtype)
    return len(routers)


def quantise(w: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 of w float32 `[N, K]`, and the scales float32 `[N / 128, K / 128]` of its blocks."""
    n, k = w.shape
    blocks = w.view(n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448.0
    return (blocks / scales).to(FP8).view(n, k), scales.view(n // BLOCK, k // BLOCK)


def _put(name: str, p: Tensor, scales: Tensor | None, rounded: str | None) -> None:
    w = _drawn(name, p)
    if p.dtype == FP8:
        q, s = quantise(w)
        p.copy_(q)
        assert scales is not None
        scales.copy_(s)
        return
    if rounded == "fp8" and not _is_plain(name):
        q, s = quantise(w)
        w = q.float() * s.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    elif rounded is not None:
        w = w.bfloat16()
    p.copy_(w)


def _drawn(name: str, p: Tensor) -> Tensor:
    spread = DOWN_SPREAD if "down" in name or "w2_" in name else SPREAD
    if "embed_tokens" in name:
        spread = 1.0
    elif _is_router(name):
        spread = 1 / math.sqrt(p.shape[1])
    w = torch.empty(p.shape, device=p.device, dtype=torch.float32)
    w.normal_(0, spread, generator=_generator(name, p.device))
    if _is_plain(name):
        w[:, 0] = CONSTANT if "embed_tokens" in name else 0.0
    return w


def _is_router(name: str) -> bool:
    return name.endswith("gate.weight") and "shared" not in name


def _is_plain(name: str) -> bool:
    """Whether it stays in bf16 where the model is in fp8."""
    return _is_router(name) or "embed_tokens" in name or "lm_head" in name


def _generator(name: str, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
