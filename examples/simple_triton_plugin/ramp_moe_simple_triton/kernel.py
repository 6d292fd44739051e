"""Two launches: up projection with SwiGLU, down projection with the weighted combine. Written to be read, not to win.

Activations are bf16, weights fp8 e4m3 with [128, 128] block scales, dequantised on their way into the dot. A tile is
`BM` slots of one expert: `slots[tile * BM + i]` is a routed id (token * top_k + k), or `num_ids` for padding;
`expert_of_tile` is -1 past the last tile, where CTAs exit, so that the grid needs no count on the host.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _dot_scaled(x, rows, live, w, scales, row, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] float32: x[rows] (K columns) times BN weight rows from `row` on, whose matrix starts at `w`."""
    k = tl.arange(0, 128)
    n = row + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(K // 128):
        a = tl.load(x + rows[:, None] * K + step * 128 + k, mask=live[:, None], other=0.0)
        b = tl.load(w + n[:, None] * K + step * 128 + k).to(tl.bfloat16)
        acc += tl.dot(a, b.T) * tl.load(scales + (row // 128) * (K // 128) + step)
    return acc


@triton.jit
def up_kernel(
    x,
    w,
    scales,
    slots,
    expert_of_tile,
    act,
    num_ids,
    top_k,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """act[id, :] = silu(x[token] @ gate.T) * (x[token] @ up.T), bf16 [num_ids, INTER]."""
    expert = tl.load(expert_of_tile + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    ids = tl.load(slots + tl.program_id(0) * BM + tl.arange(0, BM))
    live = ids < num_ids
    w += expert * 2 * INTER * HIDDEN
    scales += expert * (2 * INTER // 128) * (HIDDEN // 128)
    row = tl.program_id(1) * BN
    gate = _dot_scaled(x, ids // top_k, live, w, scales, row, HIDDEN, BM, BN)
    up = _dot_scaled(x, ids // top_k, live, w, scales, INTER + row, HIDDEN, BM, BN)
    out = gate * tl.sigmoid(gate) * up
    tl.store(act + ids[:, None] * INTER + row + tl.arange(0, BN), out.to(tl.bfloat16), mask=live[:, None])


@triton.jit
def down_kernel(
    act,
    w,
    scales,
    slots,
    expert_of_tile,
    topk_weights,
    out,
    num_ids,
    top_k,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out[token] += topk_weight * act[id] @ down.T, float32 [tokens, HIDDEN], zeroed before."""
    expert = tl.load(expert_of_tile + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    ids = tl.load(slots + tl.program_id(0) * BM + tl.arange(0, BM))
    live = ids < num_ids
    w += expert * HIDDEN * INTER
    scales += expert * (HIDDEN // 128) * (INTER // 128)
    row = tl.program_id(1) * BN
    part = _dot_scaled(act, ids, live, w, scales, row, INTER, BM, BN)
    part *= tl.load(topk_weights + ids, mask=live, other=0.0)[:, None]
    tl.atomic_add(
        out + (ids // top_k)[:, None] * HIDDEN + row + tl.arange(0, BN), part, mask=live[:, None], sem="relaxed"
    )


def schedule(topk_ids: torch.Tensor, num_experts: int, block: int, max_tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots, expert_of_tile), int32, for `max_tiles` tiles of `block` slots, from ids [tokens, top_k]."""
    ids = topk_ids.flatten()
    order = ids.argsort(stable=True).int()
    counts = torch.bincount(ids, minlength=num_experts)
    tiles = (counts + block - 1) // block
    first_slot = (tiles.cumsum(0) - tiles) * block
    position = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[ids[order.long()]]
    slots = torch.full((max_tiles * block,), len(ids), dtype=torch.int32, device=ids.device)
    slots[first_slot[ids[order.long()]] + position] = order
    expert_of_tile = torch.full((max_tiles,), -1, dtype=torch.int32, device=ids.device)
    live = torch.repeat_interleave(torch.arange(num_experts, device=ids.device), tiles)
    expert_of_tile[: len(live)] = live.int()
    return slots, expert_of_tile
