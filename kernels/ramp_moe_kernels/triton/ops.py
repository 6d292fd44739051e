"""Launches the Triton GEMMs, with sizes, flags and grids from shapes alone. Nothing is read from the device.

What depends on the batch size is computed once per size (`Gemm`), since a layer is called often with few sizes. A call
is then little more than the launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ramp_moe.plugin import MoEWeights
from torch import Tensor

from .config import GemmConfig, variants
from .down import down_kernel
from .epilogue import activate_kernel
from .launch import dependent_launch, on_device_of
from .quantise import interpreted
from .up import up_kernel

ACTIVATE_BLOCK = 1024
"""Columns of one program that adds up the splits of the up projection."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """The M-tiles of a launch.

    sorted_token_ids: routed ids by tile, as `schedule` lays them out. None on the direct path, on which each routed id
        is a tile.
    experts: the expert of each tile; on the direct path the top-k ids.
    choice: int32 `[1]`, index of the configuration, if there are several.
    """

    sorted_token_ids: Tensor | None
    experts: Tensor
    choice: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Gemm:
    """A launch of the up or the down projection, for a number of routed ids.

    tiles: M-tiles of the grid; None: the choice on the device decides.
    constants: for which the kernel is compiled.
    """

    grid: tuple[int, int]
    tiles: int | None
    constants: dict[str, Any]


def up_gemm(
    configs: Sequence[GemmConfig],
    tiles: Sequence[int],
    weights: MoEWeights,
    choosing: bool,
    direct: bool,
    quantised: bool,
) -> Gemm:
    """The launch of `up`, as any of the configurations. Several of them share warps and split_k.

    tiles: the most M-tiles of the launch, for each configuration. choosing: the device says which configuration runs.
    direct: there is no schedule. quantised: act gets a scale.
    """
    _, hidden, inter = weights.sizes
    constants = _constants(configs, inter, hidden, weights, direct) | {
        "QUANTISE_X": is_fp8(weights) and direct,
        "QUANTISE": quantised,
        "LAYOUT": weights.layout,
        "ACTIVATION": weights.activation,
        "LIMIT": weights.limit,
    }
    return Gemm(_grid(configs, tiles, inter), None if choosing else tiles[0], constants)


def down_gemm(
    configs: Sequence[GemmConfig],
    tiles: Sequence[int],
    weights: MoEWeights,
    choosing: bool,
    direct: bool,
    quantised: bool,
    atomic: bool,
) -> Gemm:
    """The launch of `down`, likewise. quantised: act has a scale. atomic: rows are added to a token's output."""
    _, hidden, inter = weights.sizes
    constants = _constants(configs, hidden, inter, weights, direct) | {
        "QUANTISE": is_fp8(weights) and not quantised,
        "ATOMIC": atomic,
    }
    return Gemm(_grid(configs, tiles, hidden), None if choosing else tiles[0], constants)


def _constants(configs: Sequence[GemmConfig], n: int, k: int, weights: MoEWeights, direct: bool) -> dict[str, Any]:
    common, stored, fp8 = configs[0], weights.stored, is_fp8(weights)
    scale = (stored.scale_columns if stored.packed else weights.scale_block) or 0
    return {
        "VARIANTS": variants(tuple(configs), n, k),
        "SPLIT_K": common.split_k,
        "DIRECT": direct,
        "FP8": fp8,
        "PACKED": stored.element if stored.packed else None,
        "SCALE": scale,
        "RAGGED": fp8 and weights.sizes[2] % (scale or common.block_k) != 0,
        "EMULATE": interpreted(up_kernel),
        **dependent_launch(weights.down.device),
        "num_warps": common.warps,
        "num_stages": common.stages,
    }


def _grid(configs: Sequence[GemmConfig], tiles: Sequence[int], n: int) -> tuple[int, int]:
    """A grid large enough for each of the configurations. CTAs without a tile exit at once."""
    ctas = (count * -(-n // c.block_n) for count, c in zip(tiles, configs, strict=True))
    return max(ctas), configs[0].split_k


def up(
    gemm: Gemm,
    x: Tensor,
    x_scale: Tensor | None,
    weights: MoEWeights,
    tiling: Tiling,
    num_ids: int,
    top_k: int,
    act: Tensor,
    act_scale: Tensor | None,
) -> None:
    """Write act `[num_ids, I]` = activation(gate, up) of every routed id.

    If fp8 weights come without x_scale, x is quantised as it is loaded. If split_k > 1, act is the float32 partial sums
    `[split_k, num_ids, 2 I]` for `activate`. With act_scale, act is fp8, with a scale per id and row tile.
    """
    experts, hidden, inter = weights.sizes
    with on_device_of(x):
        up_kernel[gemm.grid](
            tiling.choice,
            x,
            x_scale,
            weights.gate_up,
            weights.gate_up_scale,
            weights.gate_up_bias if gemm.grid[1] == 1 else None,
            tiling.sorted_token_ids,
            tiling.experts,
            act,
            act_scale,
            gemm.tiles,
            num_ids,
            experts,
            top_k,
            hidden,
            inter,
            **gemm.constants,
        )


def activate(partial: Tensor, weights: MoEWeights, topk_ids: Tensor, act: Tensor) -> None:
    """Write act `[num_ids, I]` from the up projection's partial sums, float32 `[split_k, num_ids, 2 I]`.

    In the partial sums gate comes first, whatever the layout of the weights.
    """
    splits, num_ids, wide = partial.shape
    inter = wide // 2
    with on_device_of(act):
        activate_kernel[(num_ids, -(-inter // ACTIVATE_BLOCK))](
            partial,
            weights.gate_up_bias,
            topk_ids,
            act,
            num_ids,
            weights.gate_up.shape[0],
            inter,
            SPLIT_K=splits,
            LAYOUT=weights.layout,
            ACTIVATION=weights.activation,
            LIMIT=weights.limit,
            BLOCK=ACTIVATE_BLOCK,
            **dependent_launch(act.device),
        )


def down(
    gemm: Gemm,
    act: Tensor,
    act_scale: Tensor | None,
    weights: MoEWeights,
    tiling: Tiling,
    topk_weights: Tensor,
    num_ids: int,
    top_k: int,
    out: Tensor,
) -> None:
    """Routing weight * down projection of every routed id: added to out float32 `[T, H]` if atomic (zeroed before),
    else stored as partial sums `[split_k, num_ids, H]`."""
    experts, hidden, inter = weights.sizes
    with on_device_of(act):
        down_kernel[gemm.grid](
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
            gemm.tiles,
            num_ids,
            experts,
            top_k,
            hidden,
            inter,
            **gemm.constants,
        )


def is_fp8(weights: MoEWeights) -> bool:
    """Whether activations are rounded to fp8, and multiplied with fp8 weights."""
    return weights.gate_up.dtype == torch.float8_e4m3fn
