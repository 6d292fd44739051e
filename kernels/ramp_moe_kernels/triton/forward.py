"""The launches of one forward pass, in order, over buffers of a workspace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from ramp_moe.plugin import Batch, MoEWeights, Workspace
from torch import Tensor

from . import ops
from .combine import combine
from .config import GemmConfig, Path, quantises_itself
from .schedule import Schedule, buffer_sizes, schedule


def forward_steps(
    paths: Sequence[Path],
    weights: MoEWeights,
    batch: Batch,
    out: Tensor,
    workspace: Workspace,
    choice: Tensor | None = None,
) -> Iterator[None]:
    """[prepare], up, [activate], down, combine, stopping after each stage of the path's description: of one path, or of
    that of several (of one `inline_key`) whose index choice int32 `[1]` holds."""
    device, n = out.device, batch.topk_ids.numel()
    experts, hidden, inter = weights.down.shape
    path, ups, downs = paths[0], [p.up for p in paths], [p.down for p in paths]  # what follows of `path`, all share
    up, down = path.up, path.down
    total = workspace.get("total", (batch.num_tokens, hidden), torch.float32, device) if path.atomic else None
    if path.direct:
        x, x_scale, tiling = batch.hidden_states, None, ops.Tiling(None, batch.topk_ids, (n,))
    else:
        x, x_scale, tiling = _prepare([c.block_m for c in ups], up.block_k, choice, weights, batch, total, workspace)
        yield

    act, act_scale = _activations(up, weights, n, batch.hidden_states.dtype, workspace, device)
    if up.split_k > 1:
        partial = workspace.get("partial_sums", (up.split_k, n, 2 * inter), torch.float32, device)
        ops.up(ups, x, x_scale, weights, tiling, n, batch.top_k, partial, None)
        yield
        ops.activate(partial, weights, batch.topk_ids, act)
    else:
        ops.up(ups, x, x_scale, weights, tiling, n, batch.top_k, act, act_scale)
    yield

    if total is not None:
        ops.down(downs, act, act_scale, weights, tiling, batch.topk_weights, total, atomic=True)
        yield
        out.copy_(total)
    else:
        rows = workspace.get("rows", (down.split_k, n, hidden), out.dtype, device)
        ops.down(downs, act, act_scale, weights, tiling, batch.topk_weights, rows, atomic=False)
        yield
        combine(rows, batch.topk_ids, out, num_experts=experts)
    yield


def _prepare(
    blocks: Sequence[int],
    group: int,
    choice: Tensor | None,
    weights: MoEWeights,
    batch: Batch,
    total: Tensor | None,
    workspace: Workspace,
) -> tuple[Tensor, Tensor | None, ops.Tiling]:
    """(x, x_scale, tiling): one launch schedules, quantises x for fp8 weights by groups of so many columns, and zeroes
    `total`."""
    device, n = batch.hidden_states.device, batch.topk_ids.numel()
    experts, hidden, _ = weights.down.shape
    sizes = [buffer_sizes(n, experts, block) for block in blocks]
    largest = {name: max(size[name] for size in sizes) for name in sizes[0]}
    plan = Schedule(**{name: workspace.get(name, (size,), torch.int32, device) for name, size in largest.items()})
    x, x_scale, quantise = batch.hidden_states, None, None
    if ops.is_fp8(weights):
        q = workspace.get("x", (batch.num_tokens, hidden), torch.float8_e4m3fn, device)
        x_scale = workspace.get("x_scale", (batch.num_tokens, hidden // group), torch.float32, device)
        quantise, x = (x, q, x_scale), q
    schedule(batch.topk_ids, experts, blocks, plan, choice=choice, quantise=quantise, zero=total)
    tiles = tuple(size["expert_ids"] for size in sizes)
    return x, x_scale, ops.Tiling(plan.sorted_token_ids, plan.expert_ids, tiles, choice)


def _activations(
    up: GemmConfig, weights: MoEWeights, n: int, dtype: torch.dtype, workspace: Workspace, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The intermediate buffer and its scales; None for scales where it stays in the dtype of x, in which case the down
    projection of fp8 weights quantises what it loads."""
    inter = weights.down.shape[2]
    if ops.is_fp8(weights) and quantises_itself(up):
        scale = workspace.get("act_scale", (n, -(-inter // up.block_k)), torch.float32, device)
        return workspace.get("act", (n, inter), torch.float8_e4m3fn, device), scale
    return workspace.get("act", (n, inter), dtype, device), None
