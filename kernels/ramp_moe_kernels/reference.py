"""What our kernels compute, in plain torch: quantisation, the router, and the layer with its intermediate roundings.

The layer itself is `ramp_moe.runtime.reference`. T tokens, k experts per token, E experts, hidden size H, intermediate
size I. Nothing here is meant to be fast. On a GPU the products follow `torch.get_float32_matmul_precision()`; leave it
at its default, "highest", for an oracle.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from ramp_moe.plugin import (
    FORMATS,
    Format,
    KernelError,
    RoutingError,
    ShapeError,
    UnknownNameError,
    check_layout,
)
from ramp_moe.runtime import reference as layer
from ramp_moe.runtime.formats import (
    FP8,
    FP8_MAX,
    TINY,
    expand,
    plain,
    quantise_activations,
    scale_to_fp8,
    through_fp8,
    to_fp8,
)
from ramp_moe.spec.shapes import SCALE_BLOCK, scale_block, scale_blocks
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "FP8",
    "FP8_MAX",
    "GROUP",
    "SCORINGS",
    "TINY",
    "WEIGHT_SUM_FLOOR",
    "check_routing",
    "experts",
    "quantise_activations",
    "quantise_weights",
    "route",
    "shared",
]

GROUP = 128
"""Columns of an activation, and rows and columns of a weight, that share one fp8 scale."""
WEIGHT_SUM_FLOOR = 1e-20
"""Added to the sum that renormalised weights are divided by: sigmoid scores can all underflow to zero."""

SCORINGS = ("softmax", "sigmoid")


# --- fp8 -------------------------------------------------------------------------------------------------------------


def quantise_weights(w: Tensor, block: int = GROUP) -> tuple[Tensor, Tensor]:
    """Quantise float `w [..., R, C]` by blocks of B = `block` rows and columns. The last blocks may be short.

    Returns fp8 e4m3 `[..., R, C]` and the float32 scale `[..., ceil(R/B), ceil(C/B)]`. Gate and up have separate
    blocks, so give them as `[E, 2, I, H]`.
    """
    rows, columns = w.shape[-2:]
    padded = pad(w.float(), (0, -columns % block, 0, -rows % block))
    deep, wide = (size // block for size in padded.shape[-2:])
    blocks = padded.reshape(*w.shape[:-2], deep, block, wide, block)
    scale = scale_to_fp8(blocks.abs().amax((-3, -1)))
    return to_fp8(w.float() / expand(scale, rows, columns, block, block)), scale


# --- Routing ---------------------------------------------------------------------------------------------------------


def check_routing(num_experts: int, top_k: int, scoring: str, num_groups: int, topk_groups: int) -> None:
    """Raises UnknownNameError or ShapeError for a routing that no kernel could compute."""
    if scoring not in SCORINGS:
        raise UnknownNameError("scoring", scoring, SCORINGS)
    if not 1 <= top_k <= num_experts:
        raise ShapeError(f"top_k must lie in [1, {num_experts}], the number of experts, not {top_k}")
    if num_groups < 1 or num_experts % num_groups:
        raise ShapeError(f"{num_experts} experts do not divide into {num_groups} groups")
    if not 1 <= topk_groups <= num_groups:
        raise ShapeError(f"topk_groups must lie in [1, {num_groups}], the number of groups, not {topk_groups}")
    if top_k > topk_groups * (num_experts // num_groups):
        raise ShapeError(
            f"top_k {top_k} exceeds the {topk_groups * (num_experts // num_groups)} experts of {topk_groups} groups"
        )


def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose experts by router `logits [T, E]`. Returns ids int32 and weights float32, both `[T, k]`, best first.

    1. An expert's score is the softmax or the sigmoid of its logit.
    2. Experts are chosen by score, or by score + `bias [E]` (DeepSeek-V3's correction bias).
    3. With groups of E / num_groups neighbouring experts, only those of the best `topk_groups` groups can be chosen. A
       group is worth its best expert (DeepSeek-V2), or with a bias the sum of its two best (V3).
    4. The weight is the score without the bias. `renormalise` makes the weights of a token sum to one. `scale`
       multiplies them last. (gpt-oss' softmax over the chosen logits is softmax scoring, renormalised.)

    Ties go to the lowest index of a group or an expert. Sigmoid scores are compared as float32, and all are 1.0 above a
    logit of 17. DeepSeek-V3, GLM-4.5, MiniMax-M2 and LFM2 compare theirs likewise; Llama 4 compares logits. Softmax
    without a bias compares logits, whose order is that of the exact scores. A NaN counts as the best, so that it shows
    in its token's weights. The ids are distinct experts even then.

    Raises UnknownNameError for the scoring, ShapeError for counts that do not fit each other or the tensors.
    """
    if logits.ndim != 2:
        raise ShapeError(f"router logits must be [tokens, experts], not {list(logits.shape)}")
    num_tokens, num_experts = logits.shape
    check_routing(num_experts, top_k, scoring, num_groups, topk_groups)
    if bias is not None and bias.shape != (num_experts,):
        raise ShapeError(f"the router's bias must be [{num_experts}], not {list(bias.shape)}")
    logits = logits.float()
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    merit = logits if scoring == "softmax" and bias is None else scores
    merit = _nan_first(merit if bias is None else merit + bias.float())

    if topk_groups < num_groups:
        members = merit.reshape(num_tokens, num_groups, num_experts // num_groups)
        best_two = members.sort(dim=-1, descending=True).values[..., : 1 if bias is None else 2]
        groups = _best(_nan_first(best_two.sum(-1)), topk_groups)
        chosen = torch.zeros(num_tokens, num_groups, dtype=torch.bool, device=logits.device).scatter(1, groups, True)
        ids = _best(merit, top_k, among=chosen.repeat_interleave(num_experts // num_groups, -1))
    else:
        ids = _best(merit, top_k)

    weights = scores.gather(-1, ids)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + WEIGHT_SUM_FLOOR)
    return ids.int(), weights * scale


def _nan_first(values: Tensor) -> Tensor:
    return values.where(~values.isnan(), torch.inf)


def _best(values: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """Indices `[T, count]` of the largest of `values [T, N]` in descending order, the lower index first on a tie.

    among: bool `[T, N]`, the values that may be chosen; None: all.
    """
    order = values.sort(stable=True, dim=-1, descending=True).indices
    if among is not None:  # those outside come last, even after an -inf inside
        order = order.gather(-1, (~among).gather(-1, order).sort(stable=True, dim=-1).indices)
    return order[:, :count]


# --- Experts ---------------------------------------------------------------------------------------------------------


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "swiglu",
    limit: float | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    quantise: bool = False,
    stored_as: torch.dtype = torch.float32,
    layout: str = "gate-first",
) -> Tensor:
    """float32 `[T, H]`: the sum over each token's experts of weight * (down @ activation(gate_up @ x)).

    `x [T, H]`, `down [E, H, I]` and `topk_weights [T, k]`. `gate_up [E, 2I, H]` has its rows, scales and bias in the
    order of `layout`, as `MoEWeights` has it. Ids -1 and E of `topk_ids [T, k]` are skipped.

    fp8 weights have `gate_up_scale [E, 2 ceil(I/B), H/B]` and `down_scale [E, H/B, ceil(I/B)]`, in blocks as
    `MoEWeights` has them. Biases `[E, 2I]` and `[E, H]` are added to each expert's products, the second before the
    weight.

    `quantise` rounds the operands x and activated intermediate to fp8 as a W8A8 kernel does. A group has as many
    columns as the smallest of `scale_blocks`. `stored_as` is the dtype in which the intermediate is stored before that.

    Raises RoutingError for ids that are not integers or lie outside [-1, E], ShapeError for tensors that do not fit
    each other, KernelError for fp8 weights without scales, UnknownNameError for the activation and the layout.
    """
    num_experts, rows, hidden = _check_weights(x, gate_up, down)
    check_layout(layout, rows // 2)
    block = _block(gate_up_scale, rows // 2, hidden)
    deep = -(-rows // 2 // block)
    shapes = {
        "topk_weights": (topk_weights, tuple(topk_ids.shape)),
        "gate_up_scale": (gate_up_scale, (num_experts, 2 * deep, hidden // block)),
        "down_scale": (down_scale, (num_experts, hidden // block, deep)),
        "gate_up_bias": (gate_up_bias, (num_experts, rows)),
        "down_bias": (down_bias, (num_experts, hidden)),
    }
    for name, (tensor, expected) in shapes.items():
        if tensor is not None and tensor.shape != expected:
            raise ShapeError(f"{name} must be {list(expected)}, not {list(tensor.shape)}")
    if topk_ids.ndim != 2 or len(topk_ids) != len(x):
        raise ShapeError(f"topk_ids must be [{len(x)}, top_k], not {list(topk_ids.shape)}")
    if topk_ids.is_floating_point() or topk_ids.is_complex() or topk_ids.dtype == torch.bool:
        raise RoutingError(f"topk_ids must be integers, not {topk_ids.dtype}")
    outside = topk_ids[(topk_ids < -1) | (topk_ids > num_experts)]
    if len(outside):
        raise RoutingError(
            f"expert id {int(outside[0])} is outside [0, {num_experts}); only -1 and {num_experts} are skipped"
        )

    for name, weight, scale in (("gate_up", gate_up, gate_up_scale), ("down", down, down_scale)):
        _check_scaled(name, weight, scale)
    group = scale_blocks(rows // 2)[-1] if quantise else None
    return layer.experts(
        x.float() if group is None else through_fp8(x, group),
        gate_up,
        down,
        topk_ids,
        topk_weights,
        activation=activation,
        limit=limit,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        layout=layout,
        stored=_stored(gate_up_scale, block),
        rounding=_rounding(group, stored_as),
    )


def shared(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str = "swiglu",
    *,
    limit: float | None = None,
    gate_weight: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    quantise: bool = False,
) -> Tensor:
    """float32 `[T, H]` of the expert that every token visits.

    `gate_up [2I, H]` has gate rows first, and `down` is `[H, I]`. With `gate_weight [H]` or `[1, H]` the result is
    multiplied by sigmoid(x @ gate_weight), as in Qwen2-MoE. Scales, `quantise` and errors are those of `experts`.
    """
    _, rows, hidden = _check_weights(x, gate_up[None], down[None])
    for name, weight, scale, matrices in (("gate_up", gate_up, gate_up_scale, 2), ("down", down, down_scale, 1)):
        _check_scaled(name, weight, scale)
        if scale is not None and (scale.ndim != 2 or len(scale) % matrices):
            raise ShapeError(f"{name}_scale must have as many rows for each of {matrices}, not {list(scale.shape)}")
    block, group = _block(gate_up_scale, rows // 2, hidden), scale_blocks(rows // 2)[-1] if quantise else None
    y = layer.mlp(
        x.float() if group is None else through_fp8(x, group),
        plain(gate_up, gate_up_scale, _stored(gate_up_scale, block), matrices=2),
        plain(down, down_scale, _stored(down_scale, block)),
        activation,
        limit,
        rounding=_rounding(group),
    )
    if gate_weight is None:
        return y
    if gate_weight.numel() != x.shape[1]:
        raise ShapeError(f"gate_weight must be [{x.shape[1]}], not {list(gate_weight.shape)}")
    return torch.sigmoid(x.float() @ gate_weight.float().reshape(-1, 1)) * y


def _rounding(group: int | None, stored_as: torch.dtype = torch.float32) -> layer.Rounding:
    """The function that rounds the intermediate: to `stored_as`, and through fp8 if there is a `group`."""

    def rounded(intermediate: Tensor) -> Tensor:
        h = intermediate.to(stored_as).float()
        return h if group is None else through_fp8(h, group)

    return rounded


def _block(gate_up_scale: Tensor | None, inter: int, hidden: int) -> int:
    """Rows or columns that share a scale; SCALE_BLOCK without scales."""
    return SCALE_BLOCK if gate_up_scale is None else scale_block(gate_up_scale.shape[-1], hidden, inter)


def _stored(scale: Tensor | None, block: int) -> Format:
    return FORMATS["bf16"] if scale is None else replace(FORMATS["fp8"], scale_rows=block, scale_columns=block)


def _check_scaled(name: str, weight: Tensor, scale: Tensor | None) -> None:
    if scale is None and weight.dtype == FP8:
        raise KernelError(f"{name} is fp8: pass {name}_scale")


def _check_weights(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[int, int, int]:
    """Returns (E, 2I, H). Raises ShapeError if weights and x do not fit each other."""
    if x.ndim != 2 or gate_up.ndim != 3 or down.ndim != 3:
        raise ShapeError("x must be [T, H], gate_up [E, 2I, H] and down [E, H, I] (no E for a shared expert)")
    num_experts, rows, hidden = gate_up.shape
    if x.shape[1] != hidden or rows % 2 or down.shape != (num_experts, hidden, rows // 2):
        raise ShapeError(
            f"x {list(x.shape)}, gate_up {list(gate_up.shape)} and down {list(down.shape)} do not fit each other"
        )
    return num_experts, rows, hidden
