"""A MoE layer in two launches: up projection with SwiGLU, and down projection with the weighted combine.

It is written for clarity, not for speed. Activations are bf16 or fp16. Weights are fp8 e4m3 with [128, 128] block
scales, and are dequantised before the dot.

A tile is `BM` sorted ids of one expert. `sorted_token_ids[tile * BM + i]` is a routed id (token * top_k + k), or
`num_ids` for padding. `expert_ids` is -1 past the last tile, and CTAs there exit. The grid thus needs no count on the
host. The library's schedule fills both arrays on the device.
"""

import torch
import triton
import triton.language as tl
from ramp_moe_kernels.triton.schedule import Schedule, buffer_sizes, schedule


@triton.jit
def _dot_scaled(
    x, rows, live, w, scales, row, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EMULATE: tl.constexpr
):
    """[BM, BN] float32: x[rows] (K columns) times BN weight rows from `row` on, of the matrix that starts at `w`."""
    k = tl.arange(0, 128)
    n = row + tl.arange(0, BN)
    x += rows.to(tl.int64)[:, None] * K
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(K // 128):
        a = tl.load(x + step * 128 + k, mask=live[:, None], other=0.0)
        b = tl.load(w + n[:, None] * K + step * 128 + k).to(a.dtype)
        if EMULATE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc += tl.dot(a, b.T) * tl.load(scales + (row // 128) * (K // 128) + step)
    return acc


@triton.jit
def up_kernel(
    x,
    w,
    scales,
    sorted_token_ids,
    expert_ids,
    act,
    num_ids,
    top_k,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Compute act[id, :] = silu(x[token] @ gate.T) * (x[token] @ up.T), [num_ids, INTER] in x's dtype."""
    expert = tl.load(expert_ids + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    ids = tl.load(sorted_token_ids + tl.program_id(0) * BM + tl.arange(0, BM))
    live = ids < num_ids
    w += expert * 2 * INTER * HIDDEN
    scales += expert * (2 * INTER // 128) * (HIDDEN // 128)
    row = tl.program_id(1) * BN
    gate = _dot_scaled(x, ids // top_k, live, w, scales, row, HIDDEN, BM, BN, EMULATE)
    up = _dot_scaled(x, ids // top_k, live, w, scales, INTER + row, HIDDEN, BM, BN, EMULATE)
    out = gate * tl.sigmoid(gate) * up
    act += ids.to(tl.int64)[:, None] * INTER + row + tl.arange(0, BN)
    tl.store(act, out.to(act.dtype.element_ty), mask=live[:, None])


@triton.jit
def down_kernel(
    act,
    w,
    scales,
    sorted_token_ids,
    expert_ids,
    topk_weights,
    out,
    num_ids,
    top_k,
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add topk_weight * act[id] @ down.T to out[token], float32 [tokens, HIDDEN], zeroed before."""
    expert = tl.load(expert_ids + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    ids = tl.load(sorted_token_ids + tl.program_id(0) * BM + tl.arange(0, BM))
    live = ids < num_ids
    w += expert * HIDDEN * INTER
    scales += expert * (HIDDEN // 128) * (INTER // 128)
    row = tl.program_id(1) * BN
    part = _dot_scaled(act, ids, live, w, scales, row, INTER, BM, BN, EMULATE)
    part *= tl.load(topk_weights + ids, mask=live, other=0.0)[:, None]
    out += (ids // top_k).to(tl.int64)[:, None] * HIDDEN + row + tl.arange(0, BN)
    tl.atomic_add(out, part, mask=live[:, None], sem="relaxed")


def stages(bm, bn, weights, batch, out, workspace):
    """Compute a whole layer into out [T, H] on the current stream. Yields after each stage: the schedule, which also
    zeroes the sums; up; down; the cast to out."""
    x, (experts, hidden, inter), ids = batch.hidden_states, weights.down.shape, batch.topk_ids.numel()
    sizes = buffer_sizes(ids, experts, bm)
    plan = Schedule(**{name: workspace.get(name, (size,), torch.int32, x.device) for name, size in sizes.items()})
    act = workspace.get("act", (ids, inter), x.dtype, x.device)
    total = workspace.get("total", x.shape, torch.float32, x.device)
    schedule(batch.topk_ids, experts, bm, plan, zero=total)
    yield
    tiles, tiling = plan.expert_ids.numel(), (plan.sorted_token_ids, plan.expert_ids)
    const = {"HIDDEN": hidden, "INTER": inter, "BM": bm, "BN": bn}
    # Triton's interpreter, for where there is no GPU, multiplies float32 only.
    const["EMULATE"] = not isinstance(up_kernel, triton.JITFunction)
    gate_up, down = (weights.gate_up, weights.gate_up_scale), (weights.down, weights.down_scale)
    up_kernel[tiles, inter // bn](x, *gate_up, *tiling, act, ids, batch.top_k, **const)
    yield
    down_kernel[tiles, hidden // bn](act, *down, *tiling, batch.topk_weights, total, ids, batch.top_k, **const)
    yield
    out.copy_(total)
    yield
