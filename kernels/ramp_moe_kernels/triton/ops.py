"""Launching the Triton kernels: sizes, flags and grids from shapes alone, nothing read from the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ramp_moe.plugin import MoEWeights
from torch import Tensor

from .config import GemmConfig
from .gemm import activate_kernel, down_kernel, up_kernel
from .launch import dependent_launch
from .quantise import interpreted


@dataclass(frozen=True, slots=True)
class Tiling:
    """The M-tiles of a launch: `sorted_token_ids` routed ids each and the expert of each, as `schedule` lays them out,
    at most `tiles[i]` of them for the configuration i. Which of several configurations it is, choice int32 `[1]` says.
    Without slots (the direct path) each routed id is a tile, and `experts` are the top-k ids."""

    sorted_token_ids: Tensor | None
    experts: Tensor
    tiles: tuple[int, ...]
    choice: Tensor | None = None


def up(
    configs: Sequence[GemmConfig],
    x: Tensor,
    x_scale: Tensor | None,
    weights: MoEWeights,
    tiling: Tiling,
    num_ids: int,
    top_k: int,
    act: Tensor,
    act_scale: Tensor | None,
) -> None:
    """act `[num_ids, I]` = activation(gate, up) of every routed id.

    x is quantised on its way where fp8 weights come without x_scale. With `split_k` > 1 act is the float32 partial sums
    `[split_k, num_ids, 2 I]` instead, for `activate`. With act_scale, act is fp8, quantised by groups of a step.

    configs: one, or several of the same warps and split_k where the tiling has a choice.
    """
    hidden, inter = weights.gate_up.shape[2], weights.gate_up.shape[1] // 2
    common = configs[0]
    up_kernel[_grid(configs, tiling, inter)](
        tiling.choice,
        x,
        x_scale,
        weights.gate_up,
        weights.gate_up_scale,
        weights.gate_up_bias if common.split_k == 1 else None,
        tiling.sorted_token_ids,
        tiling.experts,
        act,
        act_scale,
        tiling.tiles[0] if tiling.choice is None else None,
        num_ids,
        weights.gate_up.shape[0],
        top_k,
        hidden,
        inter,
        VARIANTS=variants(configs, inter, hidden),
        SPLIT_K=common.split_k,
        DIRECT=tiling.sorted_token_ids is None,
        FP8=weights.gate_up_scale is not None,
        SCALE=weights.scale_block or 0,
        RAGGED=_is_ragged(weights),
        QUANTISE_X=weights.gate_up_scale is not None and x_scale is None,
        QUANTISE=act_scale is not None,
        LAYOUT=weights.layout,
        ACTIVATION=weights.activation,
        LIMIT=weights.limit,
        EMULATE=interpreted(up_kernel),
        **dependent_launch(x.device),
        num_warps=common.warps,
        num_stages=common.stages,
    )


def activate(partial: Tensor, weights: MoEWeights, topk_ids: Tensor, act: Tensor) -> None:
    """act `[num_ids, I]` from the up projection's partial sums float32 `[split_k, num_ids, 2 I]`, gate first in any
    layout of the weights."""
    experts, inter = weights.gate_up.shape[0], weights.gate_up.shape[1] // 2
    block = 1024
    activate_kernel[(topk_ids.numel(), -(-inter // block))](
        partial,
        weights.gate_up_bias,
        topk_ids,
        act,
        topk_ids.numel(),
        experts,
        inter,
        SPLIT_K=partial.shape[0],
        LAYOUT=weights.layout,
        ACTIVATION=weights.activation,
        LIMIT=weights.limit,
        BLOCK=block,
        **dependent_launch(act.device),
    )


def down(
    configs: Sequence[GemmConfig],
    act: Tensor,
    act_scale: Tensor | None,
    weights: MoEWeights,
    tiling: Tiling,
    topk_weights: Tensor,
    out: Tensor,
    atomic: bool,
) -> None:
    """Routing weight * down projection of every routed id: added to out float32 `[T, H]` if atomic (zeroed before),
    else stored as partial sums `[split_k, num_ids, H]`. configs as `up` takes them."""
    hidden, inter = weights.down.shape[1], weights.down.shape[2]
    fp8 = weights.down_scale is not None
    common = configs[0]
    down_kernel[_grid(configs, tiling, hidden)](
        tiling.choice,
        act,
        act_scale,
        weights.down,
        weights.down_scale,
        weights.down_bias,
        tiling.sorted_token_ids,
        tiling.experts,
        topk_weights,
        out,
        tiling.tiles[0] if tiling.choice is None else None,
        topk_weights.numel(),
        weights.down.shape[0],
        topk_weights.shape[1],
        hidden,
        inter,
        VARIANTS=variants(configs, hidden, inter),
        SPLIT_K=common.split_k,
        DIRECT=tiling.sorted_token_ids is None,
        FP8=fp8,
        SCALE=weights.scale_block or 0,
        RAGGED=_is_ragged(weights),
        QUANTISE=fp8 and act_scale is None,
        ATOMIC=atomic,
        EMULATE=interpreted(up_kernel),
        **dependent_launch(act.device),
        num_warps=common.warps,
        num_stages=common.stages,
    )


def variants(configs: Sequence[GemmConfig], rows: int, depth: int) -> tuple[tuple[int, ...], ...]:
    """VARIANTS of the kernels, for a GEMM of so many weight rows, and columns to reduce: BM, BN, BK, GROUP_M, SWAP,
    whether splits are of whole steps, whether row tiles are full, and stages of the loop, 0 for those of the launch."""
    return tuple(
        (
            c.block_m,
            c.block_n,
            c.block_k,
            c.group_m,
            c.swap,
            depth % (c.block_k * c.split_k) == 0,
            rows % c.block_n == 0,
            0 if c.stages == configs[0].stages else c.stages,
        )
        for c in configs
    )


def _grid(configs: Sequence[GemmConfig], tiling: Tiling, rows: int) -> tuple[int, int]:
    """For any of the configurations: where it is not the largest, CTAs without a tile exit at once."""
    ctas = (tiles * -(-rows // c.block_n) for tiles, c in zip(tiling.tiles, configs, strict=True))
    return max(ctas), configs[0].split_k


def _is_ragged(weights: MoEWeights) -> bool:
    """Whether the last block of rows of gate and of up is short, and with it the down projection's last columns'."""
    return weights.scale_block is not None and weights.down.shape[2] % weights.scale_block != 0


def is_fp8(weights: MoEWeights) -> bool:
    return weights.gate_up.dtype == torch.float8_e4m3fn
