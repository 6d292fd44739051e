"""Computes a batch with Humming: [round], sort, up, activation, down, weighted sum.

Humming's indexed GEMMs read the tokens' rows where they are, and write a row for each routed id. Our schedule sorts the
ids, once if both GEMMs have the same token block. It also rounds activations that share a scale by groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from ramp_moe.plugin import Batch, KernelConfig, MoEShape, MoEWeights, Workspace
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.checks import check_aligned, check_batch, check_bf16
from ramp_moe.spec.launchable import allocate
from ramp_moe_kernels.limits import check_tokens
from ramp_moe_kernels.permute.routed import activate, quantise_tokens, weighted_sum
from ramp_moe_kernels.triton.launch import on_device_of
from ramp_moe_kernels.triton.schedule import Schedule, buffer_sizes, launch_schedule
from torch import Tensor

from . import package
from .config import WarpTile, most_tokens, tiles_of
from .formats import KINDS, Kind
from .weights import Side, repack

LOCKS = 1 << 14
"""Locks of stream-K, which no launch needs more of: a few for each CTA that shares a tile. They are zero between
launches."""


@dataclass(frozen=True, slots=True)
class PreparedHumming:
    """The weights in Humming's layout, and what remains of ours. shape: without its top_k, which is 1."""

    shape: MoEShape
    kind: Kind
    up: Side
    down: Side
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    limit: float | None


@dataclass(frozen=True, slots=True)
class HummingPlan:
    """The tiles and buffers of a batch, which follow from its size.

    schedules: of the up and of the down projection, the same if they share one.
    x, x_scale, act_scale: None if activations are not rounded.
    """

    up: WarpTile
    down: WarpTile
    schedules: tuple[Schedule, Schedule]
    x: Tensor | None
    x_scale: Tensor | None
    gate_up: Tensor
    act: Tensor
    act_scale: Tensor | None
    rows: Tensor


def prepare(weights: MoEWeights) -> PreparedHumming:
    weights = relayout(weights, "gate-first")
    up, down = repack(weights)
    shape = weights.shape(top_k=1)
    return PreparedHumming(
        shape,
        KINDS[shape.dtype],
        up,
        down,
        weights.gate_up_bias,
        weights.down_bias,
        weights.activation,
        weights.limit,
    )


def launch_steps(
    config: KernelConfig, prepared: PreparedHumming, batch: Batch, out: Tensor, workspace: Workspace
) -> Iterator[None]:
    """Launch a layer. Yields after each stage."""
    p, x, ids = prepared, batch.hidden_states, batch.topk_ids
    shape, kind, device = p.shape, p.kind, p.up.weight.device
    check_bf16("humming", batch, out)
    check_batch("humming", batch, out, shape.hidden_size, device)
    check_aligned("humming", "hidden_states", x)
    key = (config, ids.shape, shape, device)
    plan = workspace.plan("humming", key, device, lambda: _planned(config, p, batch, workspace))
    locks = workspace.plan("humming_locks", (device,), device, lambda: allocate(4 * LOCKS, device).zero_())
    given = x
    if plan.x is not None and plan.x_scale is not None:
        given = plan.x
        if not kind.a_group:
            quantise_tokens(x, plan.x, plan.x_scale)
            yield
    for i, (tile, schedule) in enumerate(zip((plan.up, plan.down), plan.schedules, strict=True)):
        if i and schedule is plan.schedules[0]:
            continue
        quantise = None
        if kind.a_group and not i and plan.x is not None and plan.x_scale is not None:
            quantise = (x, plan.x, plan.x_scale)
        launch_schedule(ids, shape.num_experts, (tile.block_m,), schedule, quantise=quantise)
    yield
    with on_device_of(x):
        gemm(p, "up", plan.up, given, plan.x_scale, plan.gate_up, plan.schedules[0], locks, batch.top_k)
    yield
    activate(plan.gate_up, p.gate_up_bias, ids, shape.num_experts, plan.act, plan.act_scale, p.activation, p.limit)
    yield
    with on_device_of(x):
        gemm(p, "down", plan.down, plan.act, plan.act_scale, plan.rows, plan.schedules[1], locks, 1)
    yield
    weighted_sum(plan.rows, p.down_bias, batch, shape.num_experts, out)
    yield


def gemm(
    prepared: PreparedHumming,
    which: str,
    tile: WarpTile,
    a: Tensor,
    a_scale: Tensor | None,
    out: Tensor,
    schedule: Schedule,
    locks: Tensor,
    top_k: int,
) -> None:
    """Write the rows of `out [n, N]` whose ids the schedule has: row i is row i / top_k of `a`, times its expert's
    weights.

    a: `[n / top_k, K]`, bf16 or fp8 with its scale. The current device must be the weights'.
    """
    side = prepared.up if which == "up" else prepared.down
    kernel = package.loaded(side.layer, tile, a.get_device())
    package.package().operators.launch_kernel.out(
        kernel, a, side.weight, side.scale, side.scale_2, a_scale, None, None, None, out,
        schedule.sorted_token_ids, schedule.expert_ids, schedule.num_tokens_post_padded, None, locks.view(torch.int32),
        top_k, len(out), True,
    )  # fmt: skip


def _planned(config: KernelConfig, prepared: PreparedHumming, batch: Batch, workspace: Workspace) -> HummingPlan:
    shape, kind, device = prepared.shape, prepared.kind, prepared.up.weight.device
    tokens, n, fp8, bf16 = batch.num_tokens, batch.topk_ids.numel(), torch.float8_e4m3fn, torch.bfloat16
    check_tokens("humming", config.name, tokens, most_tokens(shape, batch.top_k))
    up, down = tiles_of(config.params)
    schedule = _schedule(n, shape.num_experts, up.block_m, "", workspace, device)
    schedules = (schedule, schedule)
    if up.block_m != down.block_m:
        schedules = (schedule, _schedule(n, shape.num_experts, down.block_m, "_down", workspace, device))

    def rounded(name: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        groups = columns // kind.a_group if kind.a_group else 1
        values = workspace.get(name, (rows, columns), fp8, device)
        return values, workspace.get(f"{name}_scale", (rows, groups), torch.float32, device)

    x: Tensor | None = None
    x_scale: Tensor | None = None
    act_scale: Tensor | None = None
    if kind.a_bits == 8:
        x, x_scale = rounded("x", tokens, shape.hidden_size)
        act, act_scale = rounded("act", n, shape.intermediate_size)
    else:
        act = workspace.get("act", (n, shape.intermediate_size), bf16, device)
    gate_up = workspace.get("rows_gate_up", (n, shape.gate_up_rows), bf16, device)
    rows = workspace.get("rows_out", (n, shape.hidden_size), bf16, device)
    return HummingPlan(up, down, schedules, x, x_scale, gate_up, act, act_scale, rows)


def _schedule(n: int, experts: int, block: int, ending: str, workspace: Workspace, device: torch.device) -> Schedule:
    sizes = buffer_sizes(n, experts, block)
    return Schedule(**{k: workspace.get(k + ending, (size,), torch.int32, device) for k, size in sizes.items()})
