"""Converts weights and batches to what Alpha-MoE's operator takes, and calls it.

The operator checks little, and neither dtypes nor devices. It ends the process if it has no code for the device. So
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
from ramp_moe_kernels.triton.schedule import Schedule, buffer_sizes, launch_schedule
from torch import Tensor

from .config import CTA_HIDDEN, LAYOUT, most_tokens

Operator = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class PreparedAlphaMoE:
    """Weights in Alpha-MoE's layout, and the operator that takes them.

    w: fp8 `[E, 2 I, H]`, gate and up interleaved.
    w_scale: float32 `[E, 2 I / 128, H / 128]`, interleaved likewise.
    w2, w2_scale: `[E, H, I]` and `[E, H / 128, I / 128]`, the tensors that were given.
    """

    w: Tensor
    w_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    operator: Operator


def operator(device: torch.device) -> Operator:
    """Alpha-MoE's operator. Raises KernelError if it is absent, was built for another torch, or has no code for
    `device`."""
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
    """Launch a layer. Yields after the preparation and after the operator."""
    x, device = batch.hidden_states, out.device
    experts, _, hidden = prepared.w.shape
    check_bf16("alpha_moe", batch, out)
    check_batch("alpha_moe", batch, out, hidden, prepared.w.device)
    check_aligned("alpha_moe", "out", out)
    key = config, batch.topk_ids.shape, prepared.w2.shape
    p, plan, x_fp8, x_scale = workspace.plan(
        "alpha_moe", key, device, lambda: _plan(config, prepared, batch, workspace)
    )
    block = p["block_m"]
    apart = not overlap(x, out)  # in place, x must be read before out is zeroed
    zero = out if apart else None
    launch_schedule(batch.topk_ids, experts, (block,), plan, quantise=(x, x_fp8, x_scale), zero=zero)
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


def _plan(
    config: KernelConfig, prepared: PreparedAlphaMoE, batch: Batch, workspace: Workspace
) -> tuple[dict[str, Any], Schedule, Tensor, Tensor]:
    """The configuration's parameters, and for one batch size the schedule's buffers, x in fp8 and its scale."""
    p: dict[str, Any] = dict(config.params)
    experts, hidden, inter = prepared.w2.shape
    device, tokens, block = batch.hidden_states.device, batch.num_tokens, p["block_m"]
    shape = MoEShape(experts, batch.top_k, hidden, inter)
    check_tokens("alpha_moe", config.name, tokens, most_tokens(block, shape))
    sizes = buffer_sizes(batch.topk_ids.numel(), experts, block)
    # Exact sizes: the length of sorted_token_ids sets the operator's grid, and -1 fills expert_ids to its end.
    plan = Schedule(**{name: workspace.get(name, (size,), torch.int32, device) for name, size in sizes.items()})
    x_fp8 = workspace.get("x", (tokens, hidden), torch.float8_e4m3fn, device)
    return p, plan, x_fp8, workspace.get("x_scale", (tokens, hidden // SCALE_BLOCK), torch.float32, device)
