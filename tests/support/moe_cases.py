"""Layers and batches, shared by tests of kernels."""

from __future__ import annotations

import torch
from ramp_moe import get_registry
from ramp_moe.spec.launchable import Batch, MoEWeights
from ramp_moe_kernels import reference

H200 = get_registry().device("h200")
LIMITS = {"swiglu_clamped": 0.5}
"""Limits of the activations that have one, low enough to clamp values in these layers."""
ROUTINGS = ("uniform", "skewed", "one-expert", "few-experts", "padded", "duplicates", "garbage")


def weights(
    experts: int,
    hidden: int,
    inter: int,
    dtype: str,
    device: str,
    activation: str = "swiglu",
    bias: bool = False,
    block: int = 128,
) -> MoEWeights:
    """Random weights, scaled like a trained layer's by the square root of the reduction. In fp8 they have scale blocks
    of `block`."""
    generator = torch.Generator().manual_seed(experts * hidden + inter)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    gate_up, down = draw(experts, 2 * inter, hidden), draw(experts, hidden, inter)
    biases = (draw(experts, 2 * inter), draw(experts, hidden)) if bias else (None, None)
    moved = [None if b is None else b.to(device) for b in biases]
    how = {"activation": activation, "limit": LIMITS.get(activation)}
    if dtype == "fp8":
        g, gs = (t.flatten(1, 2) for t in reference.quantise_weights(gate_up.unflatten(1, (2, -1)), block))
        d, ds = reference.quantise_weights(down, block)
        return MoEWeights(g.to(device), d.to(device), gs.to(device), ds.to(device), *moved, **how)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    return MoEWeights(gate_up.to(kind).to(device), down.to(kind).to(device), None, None, *moved, **how)


def batch(
    tokens: int, top_k: int, experts: int, hidden: int, routing: str, device: str, dtype: torch.dtype, seed: int = 0
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    p = torch.ones(experts)
    if routing == "skewed":
        p = torch.arange(1, experts + 1).float() ** -1.5
    elif routing == "few-experts":
        p[max(top_k, experts // 4) :] = 0
    ids = torch.multinomial(p.expand(tokens, -1), top_k, generator=generator)
    if routing == "one-expert":
        ids[:] = experts // 2
    elif routing == "duplicates":
        ids[:, -1] = ids[:, 0]
    elif routing == "padded":
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
        ids[torch.rand(ids.shape, generator=generator) < 0.2] = experts
        ids[tokens // 2] = -1
    elif routing == "garbage":
        ids[0, 0], ids[-1, -1] = 2**31 - 1, -(2**31)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weights = torch.softmax(torch.randn(tokens, top_k, generator=generator), -1)
    return Batch(x.to(device), ids.int().to(device), weights.to(device))


def expected(layer: MoEWeights, given: Batch, quantise: bool, stored_as: torch.dtype = torch.float32) -> torch.Tensor:
    """The reference's float32 output. Ids out of range are skipped, as the kernels skip them."""
    experts = layer.gate_up.shape[0]
    ids = given.topk_ids.masked_fill((given.topk_ids < 0) | (given.topk_ids > experts), -1)
    return reference.experts(
        given.hidden_states,
        layer.gate_up,
        layer.down,
        ids,
        given.topk_weights,
        activation=layer.activation,
        limit=layer.limit,
        gate_up_scale=layer.gate_up_scale,
        down_scale=layer.down_scale,
        gate_up_bias=layer.gate_up_bias,
        down_bias=layer.down_bias,
        quantise=quantise,
        stored_as=stored_as,
        layout=layer.layout,
    )


def error(out: torch.Tensor, reference_out: torch.Tensor) -> float:
    difference, size = (out.float() - reference_out).norm(), reference_out.norm()
    return float(difference / size) if size > 0 else float(difference)
