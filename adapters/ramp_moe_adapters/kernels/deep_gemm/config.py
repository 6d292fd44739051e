"""Predicts, and so pins, the tile that DeepGEMM's grouped GEMMs choose on Hopper.

DeepGEMM has no argument for the tile. It models the L1 and L2 cycles of every tile and takes the best. Its choice
depends on the rows that it expects, the SMs that it may use, and a multiple that the weight block must have. Callers
can set these three, which is how a configuration pins a tile.

The code follows `get_best_config` for sm_90 as of 0.1.4 (sgl) and 2.6.1 (deepseek-ai), in csrc/jit_kernels/heuristics.
A test compares it with what the library prints.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ramp_moe.plugin import MoEShape
from ramp_moe_kernels.limits import MAX_ELEMENTS, max_ids, max_tokens

SMEM_BYTES = 232_448
MAX_STAGES = 16
MAX_BLOCK_N = {"fp8": 192, "bf16": 256}
STEP_BYTES = 128
"""Bytes of one step along the reduction."""
WGMMA_ROWS = 64
L2_BYTES_PER_CYCLE_OF_SM, MAX_L2_BYTES_PER_CYCLE = 64.0, 8e6 / 1.3e3
L1_BYTES_PER_CYCLE_OF_SM = 128


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of block_n weight rows, in clusters of cluster_m x cluster_n CTAs that share their loads."""

    block_n: int
    cluster_m: int
    cluster_n: int

    @property
    def name(self) -> str:
        return f"bn{self.block_n}-c{self.cluster_m}x{self.cluster_n}"


@cache
def choose(
    dtype: str, block_m: int, n: int, k: int, num_experts: int, expected_m: int, num_sms: int, multiple: int = 1
) -> Tile | None:
    """The tile that DeepGEMM chooses for weights `[num_experts, n, k]`; None if no tile is valid.

    expected_m: tokens that it expects of each expert.
    """
    size = 1 if dtype == "fp8" else 2
    best: tuple[int, Tile] | None = None
    for tile in _valid(dtype, block_m, n, k, num_sms, multiple):
        block_n, cluster_m, cluster_n = tile.block_n, tile.cluster_m, tile.cluster_n
        tiles = -(-expected_m // block_m) * -(-n // block_n) * num_experts
        waves = -(-tiles // num_sms)
        written = block_m * block_n * 2
        l2 = k * (block_m // cluster_n + block_n // cluster_m) * size + written
        l1 = k * (block_m + block_n) * size + k * (max(WGMMA_ROWS, block_m) + block_n) * size + 2 * written
        l2_cycles = int(l2 * tiles / min(L2_BYTES_PER_CYCLE_OF_SM * num_sms, MAX_L2_BYTES_PER_CYCLE))
        l1_cycles = l1 * tiles // (L1_BYTES_PER_CYCLE_OF_SM * num_sms)
        cycles = int(max(l1_cycles, l2_cycles) / (tiles / (waves * num_sms)))
        if cluster_m * cluster_n > 1 and waves <= 1:  # nothing to share
            cycles = 2**63 - 1
        if best is None or cycles < best[0]:
            best = cycles, tile
    return best and best[1]


def _valid(dtype: str, block_m: int, n: int, k: int, num_sms: int, multiple: int) -> Iterator[Tile]:
    """Yield the valid tiles in DeepGEMM's order, which decides ties."""
    step = math.lcm(16, multiple)
    block_k = STEP_BYTES if dtype == "fp8" else STEP_BYTES // 2
    for cluster_m, cluster_n in ((1, 1), (1, 2), (2, 1)):
        cluster = cluster_m * cluster_n
        if num_sms % cluster:
            continue
        for block_n in range(step, MAX_BLOCK_N[dtype] + 1, step):
            # A tile over two scale blocks is unrolled by the first one's share.
            over = block_n - block_k
            if dtype == "fp8" and over > 0 and block_n % over and block_k % over:
                continue
            stages = _stages(dtype, block_m, block_n, k)
            deep = stages >= (3 if block_m * block_n >= 128 * 192 else 4)
            if -(-n // block_n) % cluster == 0 and deep:
                yield Tile(block_n, cluster_m, cluster_n)


def _stages(dtype: str, block_m: int, block_n: int, k: int) -> int:
    """Number of pipeline stages that fit into shared memory."""
    fixed = _align(block_m * block_n * 2, 1024) + MAX_STAGES * 16
    stage = (block_m + block_n) * STEP_BYTES
    if dtype == "fp8":
        fixed += _align(-(-k // STEP_BYTES) * 4 * (1 if STEP_BYTES % block_n == 0 else 2), 8)
        stage += _align(block_m * 4, 128)
    return min((SMEM_BYTES - fixed) // stage, MAX_STAGES)


def _align(size: int, to: int) -> int:
    return -(-size // to) * to


@dataclass(frozen=True, slots=True)
class Pinned:
    """One GEMM's tile, with the values that make DeepGEMM choose it."""

    tile: Tile
    expected_m: int
    multiple: int


def pinned(
    dtype: str, block_m: int, n: int, k: int, num_experts: int, num_sms: int, with_multiple: bool
) -> list[Pinned]:
    """The tiles that DeepGEMM can be made to choose at this number of SMs, each with the values that pin it.

    with_multiple: True if the installed version lets callers set a multiple.
    """
    multiples = range(1, MAX_BLOCK_N[dtype] + 1) if with_multiple else (1,)
    found: dict[Tile, Pinned] = {}
    for multiple, tiles in itertools.product((m for m in multiples if m == 1 or m % 16 == 0), EXPECTED_TILES):
        tile = choose(dtype, block_m, n, k, num_experts, tiles * block_m, num_sms, multiple)
        if tile is not None:
            found.setdefault(tile, Pinned(tile, tiles * block_m, multiple))
    return list(found.values())


EXPECTED_TILES = (1, 2, 3, 4, 6, 8, 16)
"""Numbers of M-tiles per expert to announce to DeepGEMM as expected."""


@functools.cache
def most_tokens(block: int, shape: MoEShape) -> int:
    """The most tokens of one launch, bounded by the schedule's ids and by 32-bit offsets into the padded rows."""
    rows = MAX_ELEMENTS // max(shape.hidden_size, 2 * shape.intermediate_size)
    return max_tokens(shape, max_ids(rows // block, shape.num_experts, block))
