"""The launches of one forward pass, in order, over buffers of a workspace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from ramp_moe.plugin import Batch, MoEWeights, RouterLogits, Workspace
from ramp_moe.spec.checks import check_batch, check_dtype
from torch import Tensor

from . import ops
from .combine import launch_combine
from .config import Path, quantises_itself
from .routed_schedule import launch_routed_schedule
from .schedule import Schedule, buffer_sizes, launch_schedule


@dataclass(frozen=True, slots=True)
class Plan:
    """The buffers and launches of a batch, which follow from its size.

    schedule: None on the direct path.
    x, x_scale: the quantised hidden states; None if they are not quantised beforehand.
    partial: the up projection's sums by split; None with a single split.
    act, act_scale: the intermediate. Without a scale it stays in the dtype of the hidden states, and the down
        projection of fp8 weights quantises what it loads.
    rows: what the down projection writes; if atomic, a float32 total of each token.
    """

    blocks: tuple[int, ...]
    schedule: Schedule | None
    x: Tensor | None
    x_scale: Tensor | None
    up: ops.Gemm
    partial: Tensor | None
    act: Tensor
    act_scale: Tensor | None
    down: ops.Gemm
    rows: Tensor


def forward_steps(
    paths: Sequence[Path],
    weights: MoEWeights,
    batch: Batch,
    out: Tensor,
    workspace: Workspace,
    choice: Tensor | None = None,
    router: RouterLogits | None = None,
) -> Iterator[None]:
    """Launch [prepare], up, [activate], down and combine. Yields after each stage of the path's description.

    paths: one, or several of one `inline_key`. choice: int32 `[1]`, index of the one to run; None with one path.
    router: with one path, the preparation writes the batch's ids and weights by it; on the direct path, a launch
    before the others. Raises KernelError for a batch or an output that does not fit the weights.
    """
    x, ids = batch.hidden_states, batch.topk_ids
    experts, hidden, _ = weights.sizes
    check_batch("triton", batch, out, hidden, weights.down.device)
    if weights.gate_up_scale is None:
        check_dtype("triton: hidden_states", x, (weights.gate_up.dtype,))
    plan = _plan(paths, weights, batch, workspace, choice is not None)
    atomic, n, top_k = paths[0].atomic, ids.numel(), ids.shape[1]
    tiling = ops.Tiling(None, ids)
    given, scale = x, plan.x_scale
    if plan.schedule is not None:
        quantise = None
        if plan.x is not None and scale is not None:
            quantise, given = (x, plan.x, scale), plan.x
        zero = plan.rows if atomic else None
        if router is None:
            launch_schedule(ids, experts, plan.blocks, plan.schedule, choice, quantise=quantise, zero=zero)
        else:
            (block,) = plan.blocks
            launch_routed_schedule(router, ids, batch.topk_weights, block, plan.schedule, quantise, zero)
        tiling = ops.Tiling(plan.schedule.sorted_token_ids, plan.schedule.expert_ids, choice)
        yield
    elif router is not None:
        launch_routed_schedule(router, ids, batch.topk_weights)

    if plan.partial is not None:
        ops.up(plan.up, given, scale, weights, tiling, n, top_k, plan.partial, None)
        yield
        ops.activate(plan.partial, weights, ids, plan.act)
    else:
        ops.up(plan.up, given, scale, weights, tiling, n, top_k, plan.act, plan.act_scale)
    yield

    ops.down(plan.down, plan.act, plan.act_scale, weights, tiling, batch.topk_weights, n, top_k, plan.rows)
    yield
    if atomic:
        out.copy_(plan.rows)
    else:
        launch_combine(plan.rows, ids, out, top_k, experts)
    yield


def _plan(paths: Sequence[Path], weights: MoEWeights, batch: Batch, workspace: Workspace, choosing: bool) -> Plan:
    """The plan for a batch. That of the last batch is reused if size and weights are alike."""
    x, ids, scale = batch.hidden_states, batch.topk_ids, weights.gate_up_scale
    device = x.device
    key = (
        *paths, choosing, ids.shape, x.dtype, weights.down.shape, weights.stored.name, device,
        None if scale is None else scale.shape, weights.layout, weights.activation, weights.limit,
    )  # fmt: skip
    return workspace.plan("triton", key, device, lambda: _planned(paths, weights, batch, workspace, choosing))


def _planned(paths: Sequence[Path], weights: MoEWeights, batch: Batch, workspace: Workspace, choosing: bool) -> Plan:
    device, dtype, fp8 = batch.hidden_states.device, batch.hidden_states.dtype, ops.is_fp8(weights)
    tokens, n = batch.num_tokens, batch.topk_ids.numel()
    experts, hidden, inter = weights.sizes
    ups, downs, path = [p.up for p in paths], [p.down for p in paths], paths[0]  # what follows of `path`, all share
    up, down = path.up, path.down
    blocks = tuple(c.block_m for c in ups)

    schedule, x, x_scale, tiles = None, None, None, [n]
    if not path.direct:
        sizes = [buffer_sizes(n, experts, block) for block in blocks]
        tiles = [size["expert_ids"] for size in sizes]
        largest = {name: max(size[name] for size in sizes) for name in sizes[0]}
        schedule = Schedule(
            **{name: workspace.get(name, (size,), torch.int32, device) for name, size in largest.items()}
        )
        if fp8:
            x = workspace.get("x", (tokens, hidden), torch.float8_e4m3fn, device)
            x_scale = workspace.get("x_scale", (tokens, hidden // up.block_k), torch.float32, device)
    partial, act_scale, act_dtype = None, None, dtype
    if up.split_k > 1:
        partial = workspace.get("partial_sums", (up.split_k, n, 2 * inter), torch.float32, device)
    if fp8 and quantises_itself(up):
        act_scale = workspace.get("act_scale", (n, -(-inter // up.block_k)), torch.float32, device)
        act_dtype = torch.float8_e4m3fn
    act = workspace.get("act", (n, inter), act_dtype, device)
    if path.atomic:
        rows = workspace.get("total", (tokens, hidden), torch.float32, device)
    else:
        rows = workspace.get("rows", (down.split_k, n, hidden), dtype, device)
    quantised = act_scale is not None
    return Plan(
        blocks,
        schedule,
        x,
        x_scale,
        ops.up_gemm(ups, tiles, weights, choosing, path.direct, quantised),
        partial,
        act,
        act_scale,
        ops.down_gemm(downs, tiles, weights, choosing, path.direct, quantised, path.atomic),
        rows,
    )
