"""Weights and batches as Alpha-MoE's operator wants them, and its call.

The operator checks no dtype, no device and little else, and ends the process where it has no code for the device; so
everything that it relies on is checked here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ramp_moe.plugin import SCALE_BLOCK, Batch, KernelConfig, KernelError, MoEShape, MoEWeights, Workspace
from ramp_moe.runtime.parts import overlap
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.checks import check_aligned, check_batch, check_bf16, check_hopper
from ramp_moe_kernels.limits import check_tokens
from torch import Tensor

from .config import CTA_HIDDEN, LAYOUT, most_tokens

Operator = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class PreparedAlphaMoE:
    """Weights in Alpha-MoE's layout: w fp8 [E, 2 I, H] and its scales float32 [E, 2 I / 128, H / 128] interleaved, w2
    [E, H, I] and its scales [E, H / 128, I / 128] as they were; and the operator that takes them."""

    w: Tensor
    w_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    operator: Operator


def operator(device: torch.device) -> Operator:
    """The operator, for weights on `device`. Raises KernelError where it is absent, was built for another torch, or
    has no code for the device."""
    check_hopper("alpha_moe", device)
    try:
        importlib.import_module("alpha_moe")  # registers it; finds libtorch through torch, imported before
        return torch.ops.alpha_moe.fused_moe_w8a8_up_down
    except (ImportError, AttributeError, OSError) as e:
        raise KernelError(f"alpha_moe cannot be loaded ({e}); build it with the torch that is installed") from e


def prepare(weights: MoEWeights) -> PreparedAlphaMoE:
    if weights.gate_up_scale is None or weights.down_scale is None:
        raise KernelError(f"alpha_moe takes fp8 block-scaled weights, not {weights.gate_up.dtype}")
    if weights.activation != "swiglu":
        raise KernelError(f"alpha_moe computes swiglu only, not {weights.activation}")
    if weights.gate_up_bias is not None or weights.down_bias is not None:
        raise KernelError("alpha_moe adds no biases; the weights have some")
    if weights.gate_up.shape[2] % CTA_HIDDEN:
        raise KernelError(f"alpha_moe: hidden_size {weights.gate_up.shape[2]} is not a multiple of {CTA_HIDDEN}")
    launchable = operator(weights.gate_up.device)
    check_aligned("alpha_moe", "down", weights.down)
    interleaved = relayout(weights, LAYOUT)
    check_aligned("alpha_moe", "gate_up", interleaved.gate_up)
    assert interleaved.gate_up_scale is not None
    return PreparedAlphaMoE(
        interleaved.gate_up, interleaved.gate_up_scale, weights.down, weights.down_scale, launchable
    )


def launch_steps(
    config: KernelConfig, prepared: PreparedAlphaMoE, batch: Batch, out: Tensor, workspace: Workspace
) -> Iterator[None]:
    """The launches of a layer, stopping after the preparation and after the operator."""
    from ramp_moe_kernels.triton.schedule import Schedule, buffer_sizes, schedule

    p: dict[str, Any] = dict(config.params)
    x, block, device = batch.hidden_states, p["block_m"], out.device
    experts, _, hidden = prepared.w.shape
    check_bf16("alpha_moe", batch, out)
    check_batch("alpha_moe", batch, out, hidden, prepared.w.device)
    check_aligned("alpha_moe", "out", out)
    shape = MoEShape(experts, batch.top_k, hidden, prepared.w2.shape[2])
    check_tokens("alpha_moe", config.name, batch.num_tokens, most_tokens(block, shape))
    sizes = buffer_sizes(batch.topk_ids.numel(), experts, block)

    # Exact sizes: the length of sorted_token_ids sets the operator's grid, and -1 fills expert_ids to its end.
    plan = Schedule(**{name: workspace.get(name, (size,), torch.int32, device) for name, size in sizes.items()})
    x_fp8 = workspace.get("x", (batch.num_tokens, hidden), torch.float8_e4m3fn, device)
    x_scale = workspace.get("x_scale", (batch.num_tokens, hidden // SCALE_BLOCK), torch.float32, device)
    apart = not overlap(x, out)  # in place, x must be read before out is zeroed
    schedule(batch.topk_ids, experts, block, plan, quantise=(x, x_fp8, x_scale), zero=out if apart else None)
    if not apart:
        out.zero_()
    yield
    with torch.cuda.device(x.get_device()):  # the operator takes the current device's stream, whichever device x is on
        prepared.operator(
            x_fp8,
            x_scale,
            prepared.w,
            prepared.w_scale,
            prepared.w2,
            prepared.w2_scale,
            plan.sorted_token_ids,
            plan.expert_ids,
            plan.num_tokens_post_padded,
            batch.topk_weights,
            out,
            batch.top_k,
            block,
            p["block_n"],
            p["warp_n"],
            p["stages"],
            1.0,  # scaling_factor of all routing weights
        )
    yield
