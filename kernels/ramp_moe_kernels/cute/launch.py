"""Converts weights and batches to what the fused CuTe kernel takes, and launches it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from ramp_moe.plugin import SCALE_BLOCK, Batch, KernelError, MoEShape, MoEWeights, RouterLogits, Workspace
from ramp_moe.runtime.parts import overlap
from ramp_moe.spec.checks import check_aligned, check_batch, check_bf16, check_hopper
from torch import Tensor

from ..limits import check_tokens
from ..triton.combine import launch_combine
from ..triton.routed_schedule import launch_routed_schedule
from ..triton.schedule import Schedule, buffer_sizes, launch_schedule
from .aot import load
from .config import INTERMEDIATES, UP_ROWS, Config
from .space import invalid, most_tokens, one_of

ROW_CHUNK = 8
"""Rows of gate, then of up, that the kernel's tensor map reads in turn."""
BITS = 4
"""Bits for each choice's block in the argument `blocks` of the kernel."""


@dataclass(frozen=True, slots=True)
class PreparedCute:
    """Views of a layer's weights.

    gate_up: `[8, 2, I / 8, H, E]`: row in eight, gate or up, eight.
    gate_up_scale: `[2, I / 128, H / 128, E]`.
    down: `[H, I, E]`.
    down_scale: `[H / 128, I / 128, E]`.
    up_first: 1 if index 0 of gate_up's second dimension is up, else 0.

    The scales of bf16 weights have these dimensions, too, but only a few elements, which are not read.
    """

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor
    up_first: int
    dtype: str


def prepare(weights: MoEWeights) -> PreparedCute:
    device = weights.gate_up.device
    check_hopper("cute", device)
    if weights.activation != "swiglu":
        raise KernelError(f"cute computes swiglu only, not {weights.activation}")
    if weights.gate_up_bias is not None or weights.down_bias is not None:
        raise KernelError("cute adds no biases; the weights have some")
    experts, hidden, inter = weights.down.shape
    if hidden % UP_ROWS or inter % INTERMEDIATES:
        raise KernelError(
            f"cute: hidden_size {hidden} and intermediate_size {inter} must be multiples of {UP_ROWS} and "
            f"{INTERMEDIATES}"
        )
    for name, tensor in (("gate_up", weights.gate_up), ("down", weights.down)):
        check_aligned("cute", name, tensor)
    eights, blocks = inter // ROW_CHUNK, inter // SCALE_BLOCK
    scale = weights.gate_up_scale
    if weights.layout == "gate-up-interleaved-8":
        rows = weights.gate_up.view(experts, eights, 2, ROW_CHUNK, hidden).permute(3, 2, 1, 4, 0)
        scale = None if scale is None else scale.view(experts, blocks, 2, -1).permute(2, 1, 3, 0)
    else:
        rows = weights.gate_up.view(experts, 2, eights, ROW_CHUNK, hidden).permute(3, 1, 2, 4, 0)
        scale = None if scale is None else scale.view(experts, 2, blocks, -1).permute(1, 2, 3, 0)
    up_first, down = int(weights.layout == "up-first"), weights.down.permute(1, 2, 0)
    if scale is not None and weights.down_scale is not None:
        return PreparedCute(rows, scale, down, weights.down_scale.permute(1, 2, 0), up_first, "fp8")
    if weights.gate_up.dtype != torch.bfloat16:
        raise KernelError(f"cute computes with fp8 and bf16 weights, not {weights.gate_up.dtype}")
    unread = torch.ones(2, 1, 1, 1, dtype=torch.float32, device=device).expand(2, 1, 1, experts)
    return PreparedCute(rows, unread, down, unread[0], up_first, "bf16")


def launch_steps(
    configs: Sequence[Config],
    prepared: PreparedCute,
    batch: Batch,
    out: Tensor,
    workspace: Workspace,
    choice: Tensor | None = None,
    router: RouterLogits | None = None,
) -> Iterator[None]:
    """Launch a layer. Yields after the preparation, after the kernel, and after the combine if there is one.

    configs: one, or several that a polymorphic configuration can compute. choice: int32 `[1]`, index of the one to run;
    None with one. router: with one configuration, the preparation writes the batch's ids and weights by it.
    """
    x, config, experts = batch.hidden_states, configs[0], prepared.down.shape[2]
    _check_batch(config, prepared, batch, out)
    in_place = config.combine == "bf16" and overlap(x, out)  # x is read while out is added to
    plan = _plan(configs, prepared, batch, workspace, choice is not None, in_place)
    schedule, n = plan.schedule, batch.topk_ids.numel()
    summed = out if plan.summed is None else plan.summed
    quantise = None if plan.x is None else (x, plan.x, plan.x_scale)
    zero = None if plan.partial is not None else summed
    if router is None:
        launch_schedule(batch.topk_ids, experts, plan.blocks, schedule, choice, quantise=quantise, zero=zero)
    else:
        ids, weights, (block,) = batch.topk_ids, batch.topk_weights, plan.blocks
        launch_routed_schedule(router, ids, weights, block, schedule, quantise, zero)
    yield
    if n:
        plan.function(
            x if plan.x is None else plan.x,
            plan.x_scale,
            prepared.gate_up,
            prepared.gate_up_scale,
            prepared.down,
            prepared.down_scale,
            summed,
            schedule.sorted_token_ids,
            schedule.expert_ids,
            schedule.num_tokens_post_padded,
            batch.topk_weights.view(-1),
            batch.top_k,
            plan.tiles,
            prepared.up_first,
            schedule.num_tokens_post_padded if choice is None else choice,
            plan.codes,
        )
    if in_place:
        out.copy_(summed)
    yield
    if config.combine == "f32":
        out.copy_(summed)
    if plan.partial is not None:
        launch_combine(plan.partial, batch.topk_ids, out, batch.top_k, experts)
    if config.combine != "bf16":
        yield


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """What launches of one size share: the function, and buffers of a workspace.

    blocks and tiles: of the schedule. codes: the kernel's argument `blocks`.
    x: the quantised hidden states; None for bf16 weights, whose x_scale is not read.
    summed: what the kernel writes or adds to; None if that is the output. partial: its rows as the combine takes them.
    """

    function: Callable[..., None]
    blocks: tuple[int, ...]
    schedule: Schedule
    tiles: int
    codes: int
    x: Tensor | None
    x_scale: Tensor
    summed: Tensor | None
    partial: Tensor | None


def _plan(
    configs: Sequence[Config], prepared: PreparedCute, batch: Batch, workspace: Workspace, choosing: bool, aside: bool
) -> FusedPlan:
    """The plan for a batch. That of the last batch is reused if size and weights are alike.

    aside: the kernel does not add to the output itself.
    """
    ids, down = batch.topk_ids, prepared.down
    key = (*configs, choosing, aside, ids.shape, down.shape, prepared.dtype, ids.device)
    make = functools.partial(_planned, configs, prepared, batch, workspace, choosing, aside)
    return workspace.plan("cute", key, ids.device, make)


def _planned(
    configs: Sequence[Config], prepared: PreparedCute, batch: Batch, workspace: Workspace, choosing: bool, aside: bool
) -> FusedPlan:
    config, device, n = configs[0], batch.topk_ids.device, batch.topk_ids.numel()
    (tokens, hidden), (_, inter, experts) = batch.hidden_states.shape, prepared.down.shape
    whole, codes = config, 0
    if choosing:
        whole = one_of(configs)
        codes = sum(whole.blocks.index(c.block_m) << BITS * i for i, c in enumerate(configs))
    shape = MoEShape(experts, batch.top_k, hidden, inter, prepared.dtype)
    check_tokens("cute", whole.name, tokens, most_tokens(whole, shape))
    each = [buffer_sizes(n, experts, c.block_m) for c in configs]
    sizes = {name: max(size[name] for size in each) for name in each[0]}
    function = compiled(whole, shape)

    schedule = Schedule(**{name: workspace.get(name, (size,), torch.int32, device) for name, size in sizes.items()})
    x, x_scale = None, prepared.gate_up_scale[0, :1, :, 0].expand(tokens, -1)
    if prepared.dtype == "fp8":
        x = workspace.get("x", (tokens, hidden), torch.float8_e4m3fn, device)
        x_scale = workspace.get("x_scale", (tokens, hidden // SCALE_BLOCK), torch.float32, device)
    summed, partial = None, None
    if config.combine == "f32":
        summed = workspace.get("total", (tokens, hidden), torch.float32, device)
    if config.combine == "rows":
        parts = inter // (INTERMEDIATES * config.wide)
        summed = workspace.get("rows", (parts * n, hidden), torch.bfloat16, device)
        partial = summed.view(parts, n, hidden)
    if aside:
        summed = workspace.get("summed", (tokens, hidden), torch.bfloat16, device)
    blocks = tuple(c.block_m for c in configs)
    return FusedPlan(function, blocks, schedule, sizes["expert_ids"], codes, x, x_scale, summed, partial)


@functools.cache
def compiled(config: Config, shape: MoEShape) -> Callable[..., None]:
    """The function of a configuration, loaded once, since loading takes longer than launching.

    Raises KernelError if the configuration is not valid for the shape.
    """
    for block in config.blocks:
        if reason := invalid(config.of(block), shape):
            raise KernelError(f"cute: {config.name} cannot run: {reason}")
    return load(config)


def _check_batch(config: Config, prepared: PreparedCute, batch: Batch, out: Tensor) -> None:
    if config.dtype != prepared.dtype:
        raise KernelError(f"{config.name} computes {config.dtype}; the weights are {prepared.dtype}")
    check_bf16("cute", batch, out)
    check_batch("cute", batch, out, prepared.down.shape[0], prepared.down.device)
    for name, tensor in (("hidden_states", batch.hidden_states), ("out", out)):
        check_aligned("cute", name, tensor)
