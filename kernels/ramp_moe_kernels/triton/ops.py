"""Launching the Triton kernels: sizes, flags and grids from shapes alone, nothing read from the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ramp_moe.device.contract import MoEWeights
from torch import Tensor

from .config import GemmConfig
from .gemm import activate_kernel, down_kernel, up_kernel
from .launch import dependent_launch
from .quantise import interpreted


@dataclass(frozen=True, slots=True)
class Tiling:
    """The M-tiles of a launch: at most `tiles` of them, `slots` routed ids each and the expert of each, as `schedule`
    lays them out. Without slots (the direct path) each routed id is a tile, and `experts` are the top-k ids."""

    slots: Tensor | None
    experts: Tensor
    tiles: int


def up(
    config: GemmConfig,
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
    `[split_k, num_ids, 2 I]` instead, for `activate`. With act_scale, act is fp8, quantised by groups of 128.
    """
    hidden, inter = weights.gate_up.shape[2], weights.gate_up.shape[1] // 2
    grid = (tiling.tiles * -(-inter // config.rows), config.split_k)
    up_kernel[grid](
        x,
        x_scale,
        weights.gate_up,
        weights.gate_up_scale,
        weights.gate_up_bias if config.split_k == 1 else None,
        tiling.slots,
        tiling.experts,
        act,
        act_scale,
        tiling.tiles,
        num_ids,
        weights.gate_up.shape[0],
        top_k,
        hidden,
        inter,
        BM=config.block,
        BN=config.rows,
        BK=config.step,
        GROUP_M=config.group_m,
        SPLIT_K=config.split_k,
        SWAP=config.swap,
        DIRECT=tiling.slots is None,
        FP8=weights.gate_up_scale is not None,
        QUANTISE_X=weights.gate_up_scale is not None and x_scale is None,
        QUANTISE=act_scale is not None,
        LAYOUT=weights.layout,
        ACTIVATION=weights.activation,
        EVEN_K=hidden % (config.step * config.split_k) == 0,
        EVEN_N=inter % config.rows == 0,
        EMULATE=interpreted(up_kernel),
        **dependent_launch(x.device),
        num_warps=config.warps,
        num_stages=config.stages,
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
        BLOCK=block,
        **dependent_launch(act.device),
    )


def down(
    config: GemmConfig,
    act: Tensor,
    act_scale: Tensor | None,
    weights: MoEWeights,
    tiling: Tiling,
    topk_weights: Tensor,
    out: Tensor,
    atomic: bool,
) -> None:
    """Routing weight * down projection of every routed id: added to out float32 `[T, H]` if atomic (zeroed before),
    else stored as partial sums `[split_k, num_ids, H]`."""
    hidden, inter = weights.down.shape[1], weights.down.shape[2]
    fp8 = weights.down_scale is not None
    grid = (tiling.tiles * -(-hidden // config.rows), config.split_k)
    down_kernel[grid](
        act,
        act_scale,
        weights.down,
        weights.down_scale,
        weights.down_bias,
        tiling.slots,
        tiling.experts,
        topk_weights,
        out,
        tiling.tiles,
        topk_weights.numel(),
        weights.down.shape[0],
        topk_weights.shape[1],
        hidden,
        inter,
        BM=config.block,
        BN=config.rows,
        BK=config.step,
        GROUP_M=config.group_m,
        SPLIT_K=config.split_k,
        SWAP=config.swap,
        DIRECT=tiling.slots is None,
        FP8=fp8,
        QUANTISE=fp8 and act_scale is None,
        ATOMIC=atomic,
        EVEN_K=inter % (config.step * config.split_k) == 0,
        EVEN_N=hidden % config.rows == 0,
        EMULATE=interpreted(up_kernel),
        **dependent_launch(act.device),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def is_fp8(weights: MoEWeights) -> bool:
    return weights.gate_up.dtype == torch.float8_e4m3fn
