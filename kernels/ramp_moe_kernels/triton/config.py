"""The configuration space of the Triton path, and the predicates that say which points of it are valid."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ramp_moe.plugin import GridGeometry, Hardware, MoEShape, scale_blocks

Gemm = Literal["up", "down"]

TOKEN_BLOCKS = (16, 32, 64, 128)
DEQUANTISED = 64
"""Elements of a 4-bit weight tile a thread. With twice as many, registers spill."""


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """The launch of one grouped GEMM. A CTA computes `block_m` sorted ids by `block_n` weight rows.

    For the up projection, these are `block_n` rows of gate and as many of up.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    group_m: int = 1
    split_k: int = 1
    swap: bool = False

    @property
    def name(self) -> str:
        swap = "-swap" if self.swap else ""
        return (
            f"bm{self.block_m}-bn{self.block_n}-bk{self.block_k}-w{self.warps}-st{self.stages}"
            f"-gm{self.group_m}-sk{self.split_k}{swap}"
        )


@dataclass(frozen=True, slots=True)
class Variant:
    """A configuration as the kernels are compiled for it, for a GEMM of `n` weight rows and a reduction of `k`.

    BM, BN, BK   tokens, weight rows and reduction of a tile
    GROUP_M      M-tiles whose CTAs run side by side
    SWAP         weight rows are WGMMA's M
    EVEN_K       splits have whole steps only
    EVEN_N       row tiles are all full
    STAGES       stages of the loop; 0: those of the launch
    """

    BM: int
    BN: int
    BK: int
    GROUP_M: int
    SWAP: bool
    EVEN_K: bool
    EVEN_N: bool
    STAGES: int


@functools.cache
def variants(configs: tuple[GemmConfig, ...], n: int, k: int) -> tuple[Variant, ...]:
    """The variants that one launch can compute. Its own stages are those of the first configuration."""
    return tuple(
        Variant(
            BM=c.block_m,
            BN=c.block_n,
            BK=c.block_k,
            GROUP_M=c.group_m,
            SWAP=c.swap,
            EVEN_K=k % (c.block_k * c.split_k) == 0,
            EVEN_N=n % c.block_n == 0,
            STAGES=0 if c.stages == configs[0].stages else c.stages,
        )
        for c in configs
    )


@dataclass(frozen=True, slots=True)
class Path:
    """The launches of one forward pass: [prepare], up, [activate], down, combine.

    direct: there is no schedule, and each routed id is a tile of its own. For tiny batches.
    atomic: the down projection adds to a float32 output, which is cast at the end. There is no combine.
    """

    up: GemmConfig
    down: GemmConfig
    direct: bool = False
    atomic: bool = False

    @property
    def name(self) -> str:
        tiles = "direct" if self.direct else f"bm{self.up.block_m}"
        up, down = (c.name.removeprefix(f"bm{c.block_m}-") for c in (self.up, self.down))
        return f"{tiles}-up({up})-down({down})-{'atomic' if self.atomic else 'sum'}"


def multiplies_fp8(shape: MoEShape) -> bool:
    """Whether activations are rounded to fp8, and multiplied with fp8 weights."""
    return shape.format.element == "e4m3"


def steps_of(shape: MoEShape) -> tuple[int, ...]:
    """Columns of a step along the reduction."""
    return (scale_group(shape),) if multiplies_fp8(shape) else (64, 128)


def quantises_itself(up: GemmConfig) -> bool:
    """Whether an fp8 up projection's CTAs hold whole scale groups of intermediates, and so can quantise them."""
    return up.block_n == up.block_k and up.split_k == 1


def scale_group(shape: MoEShape) -> int:
    """Columns of an activation that share an fp8 scale: as many as the smallest scale blocks of the weights have.

    Weights with a scale a row get the same, which is finer than their engines' one a token, and fits the same launches.
    """
    return scale_blocks(shape.intermediate_size)[-1]


def invalid(gemm: Gemm, config: GemmConfig, shape: MoEShape, hardware: Hardware, quantise: bool = False) -> str | None:
    """Say why a configuration cannot run, or never pays. None if it is valid.

    quantise: the launch quantises the activations that it loads (fp8 only). Shared memory then holds both dtypes.
    """
    c, fp8, stored = config, multiplies_fp8(shape), shape.format
    matrices = 2 if gemm == "up" else 1
    depth = shape.hidden_size if gemm == "up" else shape.intermediate_size
    group = scale_group(shape)
    if fp8 and c.block_k != group:
        return f"an fp8 step is one scale group of {group}"
    if fp8 and group % c.block_n:
        return "a weight tile must lie within one scale block"
    row_bytes = c.block_k if fp8 else 2 * c.block_k
    weight_bytes = stored.matrix_bytes(1, max(c.block_k, stored.scale_columns or 0)) if stored.packed else row_bytes
    tiles = c.stages * (c.block_m * row_bytes + matrices * c.block_n * weight_bytes)
    if quantise:
        tiles += (c.stages + 1) * c.block_m * row_bytes
    if stored.packed:  # dequantised, as an operand is read from shared memory
        tiles += matrices * c.block_n * row_bytes
    # The transposed accumulator of swapped operands, and half of it otherwise, is exchanged through shared memory.
    needed = max(tiles, matrices * c.block_m * c.block_n * 4)
    if needed > hardware.smem_per_sm_bytes - 4096:
        return f"{needed} bytes of tiles exceed shared memory"
    if matrices * c.block_m * c.block_n > 128 * 32 * c.warps:
        return "accumulators would take over 128 registers a thread"
    if stored.packed and c.block_n * c.block_k > DEQUANTISED * 32 * c.warps:
        return f"a dequantised weight tile would take over {DEQUANTISED} registers a thread"
    if c.warps > 4 and matrices * c.block_m * c.block_n < 64 * 64:
        return "too little work for eight warps"
    if c.swap and (c.block_n < 64 or c.block_m > 64):
        return "swapped operands need 64 weight rows, and pay for small token blocks only"
    if c.split_k > 1 and c.split_k * c.block_k * 2 > depth:
        return f"{c.split_k} splits leave less than two steps each"
    return None


def invalid_path(path: Path, shape: MoEShape, hardware: Hardware) -> str | None:
    """Say why a whole path cannot run. None if it is valid."""
    fp8 = multiplies_fp8(shape)
    if path.up.block_m != path.down.block_m:
        return "both GEMMs read one schedule, of one token block"
    return invalid("up", path.up, shape, hardware, quantise=fp8 and path.direct) or invalid(
        "down", path.down, shape, hardware, quantise=fp8 and not quantises_itself(path.up)
    )


def space(gemm: Gemm, shape: MoEShape, hardware: Hardware) -> Iterator[GemmConfig]:
    """Every valid configuration of one GEMM."""
    for block_m, block_n, block_k, warps, stages, group_m, split_k, swap in itertools.product(
        TOKEN_BLOCKS, (32, 64, 128), steps_of(shape), (4, 8), (2, 3, 4, 5), (1, 8), (1, 4), (False, True)
    ):
        config = GemmConfig(block_m, block_n, block_k, warps, stages, group_m, split_k, swap)
        if invalid(gemm, config, shape, hardware) is None:
            yield config


def geometry(gemm: Gemm, config: GemmConfig, shape: MoEShape, direct: bool = False) -> GridGeometry:
    """The grid of one launch.

    A CTA of the up projection covers `block_n` rows of gate and as many of up. On the direct path each routed id is an
    M-tile.
    """
    describe, wide = (GridGeometry.gate_up, 2) if gemm == "up" else (GridGeometry.down, 1)
    block_m = 1 if direct else config.block_m
    return describe(
        shape, block_m=block_m, block_n=wide * config.block_n, block_k=config.block_k, split_k=config.split_k
    )
