"""The router: scores, group selection, top-k, weights and their renormalisation, in one launch.

One warp owns a row, or several rows if there are few experts, so that no reduction leaves the warp:

    merit   int32 [rows, P]   by what experts are chosen, as an integer of the same order; P = padded groups x members
    pick    int32 [rows]      k times: the lowest expert of the best merit, which is then excluded
    weight  float32 [rows, K] scores of the chosen experts' logits, which are loaded again (a hit in L1)

Integers order NaN, infinities and excluded experts without a special case. On hardware that has it, their warp
reduction is one instruction.
"""
# Triton is untyped, and so is every function that it compiles.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ramp_moe.plugin import KernelError, ShapeError
from ramp_moe.spec.checks import check_device, check_dtype, check_gpu, check_tensor

from ..reference import WEIGHT_SUM_FLOOR, check_routing
from .launch import on_device_of
from .quantise import interpreted

MAX_EXPERTS = 1024
UNROLLED_TOP_K = 16
"""Largest top_k whose picks are unrolled. The code of more would take longer to fetch than to run."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW_ELEMENTS = 256
"""Least scores of a program: eight per lane, for wide loads, and for work to overlap with the reductions' latency."""

_OUT = tl.constexpr(-(2**31))  # below every merit, -inf's included
_NOBODY = tl.constexpr(2**31 - 1)  # above every index
_FLOOR = tl.constexpr(WEIGHT_SUM_FLOOR)
_UNROLLED = tl.constexpr(UNROLLED_TOP_K)


@triton.jit
def _ordered(x):
    """Convert float32 x to int32 of the same order. NaN counts as +inf, and the two zeros are equal."""
    x = tl.where(x != x, float("inf"), x)
    x = tl.where(x == 0, 0.0, x)
    return _flip(x.to(tl.int32, bitcast=True))


@triton.jit
def _flip(bits):
    """Convert a float's bits to an integer of the same order, or back: negative floats order in reverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _best(merit, index):
    """The best merit of each row of [rows, N], and its index, the lowest on a tie."""
    best = tl.max(merit, 1)
    return best, tl.min(tl.where(merit == best[:, None], index, _NOBODY), 1)


@triton.jit
def _take(merit, expert, ids, slot, k):
    """Put the best expert of each row into slot k of ids, and exclude it from merit. Returns both."""
    _, pick = _best(merit, expert)
    taken = tl.where(expert == pick[:, None], _OUT, merit)
    return taken, tl.where(slot == k, pick[:, None], ids)


@triton.jit
def _keep_groups(merit, G: tl.constexpr, TOPK_GROUPS: tl.constexpr, BIASED: tl.constexpr):
    """Exclude from `merit` [rows, P] the members of all but the best TOPK_GROUPS groups.

    P has G groups one after the other, padded to a power of two. Each is padded with excluded members.
    """
    GROUPS: tl.constexpr = triton.next_power_of_2(G)
    MEMBERS: tl.constexpr = merit.shape[1] // GROUPS
    members = tl.reshape(merit, (merit.shape[0], GROUPS, MEMBERS))
    worth = tl.max(members, 2)
    if BIASED and MEMBERS > 1:
        member = tl.arange(0, MEMBERS)[None, None, :]
        first = tl.min(tl.where(members == worth[:, :, None], member, MEMBERS), 2)
        second = tl.max(tl.where(member == first[:, :, None], _OUT, members), 2)
        both = _flip(worth).to(tl.float32, bitcast=True) + _flip(second).to(tl.float32, bitcast=True)
        worth = _ordered(both)
    group = tl.arange(0, GROUPS)[None, :]
    worth = tl.where(group < G, worth, _OUT)
    kept = tl.zeros_like(worth)
    for _ in range(TOPK_GROUPS):
        _, pick = _best(worth, group)
        kept = tl.where(group == pick[:, None], 1, kept)
        worth = tl.where(group == pick[:, None], _OUT, worth)
    members = tl.where(kept[:, :, None] != 0, members, _OUT)
    return tl.reshape(members, merit.shape)


@triton.jit(do_not_specialize=["num_tokens"])
def router_kernel(
    logits_ptr,  # [T, E], rows `stride` elements apart
    bias_ptr,  # [E] or None
    ids_ptr,  # int32 [T, K]
    weights_ptr,  # float32 [T, K]
    num_tokens,
    stride,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
):
    SIZE: tl.constexpr = E // G
    MEMBERS: tl.constexpr = triton.next_power_of_2(SIZE)
    P: tl.constexpr = MEMBERS * triton.next_power_of_2(G)
    SLOTS: tl.constexpr = triton.next_power_of_2(K)

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < num_tokens
    logits_ptrs = logits_ptr + row.to(tl.int64)[:, None] * stride
    place = tl.arange(0, P)
    expert = place // MEMBERS * SIZE + place % MEMBERS
    exists = (place % MEMBERS < SIZE) & (place // MEMBERS < G)
    logits = tl.load(logits_ptrs + expert, mask=real[:, None] & exists, other=-float("inf")).to(tl.float32)

    # A row of -inf has no softmax: NaN, as in torch.
    if not SIGMOID:
        top = tl.max(logits, 1)[:, None]
        total = tl.sum(tl.exp(logits - top), 1)[:, None]
    if bias_ptr is None and not SIGMOID:
        merit = _ordered(logits)  # softmax keeps the order of the logits, which is exact
    else:
        scores = tl.sigmoid(logits) if SIGMOID else tl.exp(logits - top) / total
        if bias_ptr is not None:
            scores += tl.load(bias_ptr + expert, mask=exists, other=0.0).to(tl.float32)
        merit = _ordered(scores)
    merit = tl.where(exists, merit, _OUT)
    if TOPK_GROUPS < G:
        merit = _keep_groups(merit, G, TOPK_GROUPS, bias_ptr is not None)

    slot = tl.arange(0, SLOTS)[None, :]
    ids = tl.zeros((ROWS, SLOTS), tl.int32)
    if K <= _UNROLLED:
        for k in tl.static_range(K):
            merit, ids = _take(merit, expert, ids, slot, k)
    else:
        for k in range(K):
            merit, ids = _take(merit, expert, ids, slot, k)

    store = real[:, None] & (slot < K)
    chosen = tl.load(logits_ptrs + ids, mask=store, other=-float("inf")).to(tl.float32)
    weights = tl.sigmoid(chosen) if SIGMOID else tl.exp(chosen - top) / total
    if RENORMALISE:
        weights = weights / (tl.sum(tl.where(slot < K, weights, 0.0), 1)[:, None] + _FLOOR)
    out = row.to(tl.int64)[:, None] * K + slot
    tl.store(ids_ptr + out, ids, mask=store)
    tl.store(weights_ptr + out, weights * scale, mask=store)


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalise: bool = True,
    scale: float = 1.0,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts as `reference.route` defines it. Returns ids int32 and weights float32, both `[T, top_k]`.

    logits: float32, bf16 or fp16 `[T, E]`, E up to 1024, with contiguous rows.
    bias: `[E]` in one of those dtypes.
    out: contiguous tensors for ids and weights. With them the call allocates nothing.

    One launch on the current stream, none for T = 0. The host does not wait. Raises ShapeError and UnknownNameError as
    `reference.route` does, and ShapeError for `out` of another shape. Raises KernelError for too many experts, and for
    wrong dtypes, strides and devices.
    """
    if logits.ndim != 2:
        raise ShapeError(f"router logits must be [tokens, experts], not {list(logits.shape)}")
    num_tokens, num_experts = logits.shape
    check_routing(num_experts, top_k, scoring, num_groups, topk_groups)
    if num_experts > MAX_EXPERTS:
        raise KernelError(f"the router kernel takes up to {MAX_EXPERTS} experts, not {num_experts}")
    if logits.stride(1) != 1 and num_tokens > 0 and num_experts > 1:
        raise KernelError("the router kernel reads contiguous rows; call .contiguous() on the logits")
    check_dtype("router logits", logits, DTYPES)
    if not interpreted(router_kernel):
        check_gpu("router logits", logits)
    if bias is not None:
        if bias.shape != (num_experts,):
            raise ShapeError(f"the router's bias must be [{num_experts}], not {list(bias.shape)}")
        check_dtype("the router's bias", bias, DTYPES)
        check_device("the router's bias", bias, logits.device)
        bias = bias.contiguous()
    ids, weights = _outputs(num_tokens, top_k, logits.device, out)
    if num_tokens == 0:
        return ids, weights

    if topk_groups == num_groups:  # every group is kept: no groups
        num_groups = topk_groups = 1
    rows, warps = _launch_shape(num_experts, num_groups)
    with on_device_of(logits):
        router_kernel[(-(-num_tokens // rows),)](
            logits,
            bias,
            ids,
            weights,
            num_tokens,
            logits.stride(0),
            float(scale),
            E=num_experts,
            K=top_k,
            G=num_groups,
            TOPK_GROUPS=topk_groups,
            SIGMOID=scoring == "sigmoid",
            RENORMALISE=renormalise,
            ROWS=rows,
            num_warps=warps,
        )
    return ids, weights


def _launch_shape(num_experts: int, num_groups: int) -> tuple[int, int]:
    """Rows and warps of a program. More than one warp only if a row does not fit into the registers of one."""
    padded = triton.next_power_of_2(num_groups) * triton.next_power_of_2(num_experts // num_groups)
    return max(1, min(32, ROW_ELEMENTS // padded)), 1 if padded <= MAX_EXPERTS else 4


def _outputs(
    num_tokens: int, top_k: int, device: torch.device, out: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (num_tokens, top_k)
    if out is None:
        ids = torch.empty(shape, dtype=torch.int32, device=device)
        return ids, torch.empty(shape, dtype=torch.float32, device=device)
    for what, tensor, dtype in (("ids", out[0], torch.int32), ("weights", out[1], torch.float32)):
        check_tensor(f"the router's {what}", tensor, shape, (dtype,), device)
    return out


@dataclass(frozen=True)
class LinearRouter:
    """A router for `LayerRuntime`: hidden states `[T, H]` to ids int32 and weights float32, both `[T, top_k]`.

    weight: `[E, H]`, the router's projection, in the dtype of the hidden states or float32. If it is float32, so are
        the products, as in DeepSeek-V3.

    The other fields are arguments of `route`.
    """

    weight: torch.Tensor
    top_k: int
    scoring: str = "softmax"
    bias: torch.Tensor | None = None
    num_groups: int = 1
    topk_groups: int = 1
    renormalise: bool = True
    scale: float = 1.0

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden_states.to(self.weight.dtype), self.weight)
        return route(
            logits,
            self.top_k,
            scoring=self.scoring,
            bias=self.bias,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            renormalise=self.renormalise,
            scale=self.scale,
        )
