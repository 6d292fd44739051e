"""The launches of one forward pass, in order, over buffers of a workspace."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from ramp_moe.device import Batch, MoEWeights, Scheduled, Workspace
from ramp_moe.device.contract import Schedule as GivenSchedule
from torch import Tensor

from . import ops
from .combine import combine
from .config import GemmConfig, Path, quantises_itself
from .quantise import quantise
from .schedule import Schedule, buffer_sizes, schedule

QUANTISE = "quantise/group128"
"""Key of the launch that makes `quantised`."""


def forward(path: Path, weights: MoEWeights, batch: Batch, out: Tensor, workspace: Workspace) -> None:
    """[prepare], up, [activate], down, combine."""
    for _ in forward_steps(path, weights, batch, out, workspace):
        pass


def forward_steps(path: Path, weights: MoEWeights, batch: Batch, out: Tensor, workspace: Workspace) -> Iterator[None]:
    """`forward`, stopping after each stage of the path's description."""
    device, n = out.device, batch.topk_ids.numel()
    hidden, up = weights.down.shape[1], path.up
    total = workspace.get("total", (batch.num_tokens, hidden), torch.float32, device) if path.atomic else None
    if path.direct:
        x, x_scale, tiling = batch.hidden_states, None, ops.Tiling(None, batch.topk_ids, n)
    else:
        x, x_scale, tiling = _prepare(up.block, weights, batch, total, workspace)
        yield
    yield from _gemms(path, weights, batch, out, total, x, x_scale, tiling, workspace)


def scheduled(path: Path, weights: MoEWeights, batch: Batch, out: Tensor, workspace: Workspace) -> Scheduled | None:
    """`forward` over a schedule that is given; None for a path that has none, or that zeroes something beside it."""
    if path.direct or path.atomic:
        return None
    experts, hidden, _ = weights.down.shape
    tiles = buffer_sizes(batch.topk_ids.numel(), experts, path.up.block)["expert_of_tile"]
    x, x_scale, before = batch.hidden_states, None, {}
    if ops.is_fp8(weights):
        x, x_scale = quantised(batch, hidden, workspace)
        before = {QUANTISE: partial(quantise, batch.hidden_states, x, x_scale)}

    def launch(given: GivenSchedule) -> None:
        tiling = ops.Tiling(given.slots, given.expert_of_tile, tiles)
        for _ in _gemms(path, weights, batch, out, None, x, x_scale, tiling, workspace):
            pass

    return Scheduled(path.up.block, tiles, before, launch)


def quantised(batch: Batch, hidden: int, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Where a workspace has the fp8 hidden states `[T, H]` and their scales float32 `[T, H / 128]`."""
    device = batch.hidden_states.device
    x = workspace.get("x", (batch.num_tokens, hidden), torch.float8_e4m3fn, device)
    return x, workspace.get("x_scale", (batch.num_tokens, hidden // 128), torch.float32, device)


def _gemms(
    path: Path,
    weights: MoEWeights,
    batch: Batch,
    out: Tensor,
    total: Tensor | None,
    x: Tensor,
    x_scale: Tensor | None,
    tiling: ops.Tiling,
    workspace: Workspace,
) -> Iterator[None]:
    """Up to combine, stopping after each stage."""
    device, n = out.device, batch.topk_ids.numel()
    experts, hidden, inter = weights.down.shape
    up, down = path.up, path.down
    act, act_scale = _activations(up, weights, n, batch.hidden_states.dtype, workspace, device)
    if up.split_k > 1:
        partial = workspace.get("partial_sums", (up.split_k, n, 2 * inter), torch.float32, device)
        ops.up(up, x, x_scale, weights, tiling, n, batch.top_k, partial, None)
        yield
        ops.activate(partial, weights, batch.topk_ids, act)
    else:
        ops.up(up, x, x_scale, weights, tiling, n, batch.top_k, act, act_scale)
    yield

    if total is not None:
        ops.down(down, act, act_scale, weights, tiling, batch.topk_weights, total, atomic=True)
        yield
        out.copy_(total)
    else:
        rows = workspace.get("rows", (down.split_k, n, hidden), out.dtype, device)
        ops.down(down, act, act_scale, weights, tiling, batch.topk_weights, rows, atomic=False)
        yield
        combine(rows, batch.topk_ids, out, num_experts=experts)
    yield


def _prepare(
    block: int, weights: MoEWeights, batch: Batch, total: Tensor | None, workspace: Workspace
) -> tuple[Tensor, Tensor | None, ops.Tiling]:
    """(x, x_scale, tiling): one launch schedules, quantises x for fp8 weights and zeroes `total`."""
    device, n = batch.hidden_states.device, batch.topk_ids.numel()
    experts, hidden, _ = weights.down.shape
    sizes = buffer_sizes(n, experts, block)
    plan = Schedule(**{name: workspace.get(name, (size,), torch.int32, device) for name, size in sizes.items()})
    x, x_scale, beside = batch.hidden_states, None, None
    if ops.is_fp8(weights):
        q, x_scale = quantised(batch, hidden, workspace)
        beside, x = (x, q, x_scale), q
    schedule(batch.topk_ids, experts, block, plan, quantise=beside, zero=total)
    return x, x_scale, ops.Tiling(plan.slots, plan.expert_of_tile, sizes["expert_of_tile"])


def _activations(
    up: GemmConfig, weights: MoEWeights, n: int, dtype: torch.dtype, workspace: Workspace, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The intermediate buffer and its scales; None for scales where it stays in the dtype of x, in which case the down
    projection of fp8 weights quantises what it loads."""
    inter = weights.down.shape[2]
    if ops.is_fp8(weights) and quantises_itself(up):
        scale = workspace.get("act_scale", (n, inter // 128), torch.float32, device)
        return workspace.get("act", (n, inter), torch.float8_e4m3fn, device), scale
    return workspace.get("act", (n, inter), dtype, device), None
