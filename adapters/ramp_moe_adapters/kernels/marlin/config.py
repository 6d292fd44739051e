"""The configurations of vLLM's Marlin MoE GEMM: its token block, and the tile of one CTA.

The library takes the token block, and the columns and rows of a tile. It was compiled for four tiles, listed here as in
csrc/moe/marlin_moe_wna16 of vLLM 0.33. Left to itself, it takes the first that divides the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ramp_moe.plugin import GridGeometry, Hardware, MoEShape
from ramp_moe_kernels.limits import MAX_ELEMENTS, MAX_IDS

TYPES: Mapping[str, int] = {
    "int4-g32": 1125899907892224,
    "int4-g128": 1125899907892224,
    "mxfp4": 562949953487106,
}
"""By our formats' names, the id of vLLM's scalar type: uint4b8, whose 8 is zero, or float4_e2m1f."""
TOKEN_BLOCKS = (8, 16, 32, 48, 64)
FILL = 0.9
"""vLLM takes the smallest block that the mean load fills less than this."""
SMALL_BLOCK = 16
"""Largest token block of tiles for small batches."""


@dataclass(frozen=True, slots=True)
class MarlinTile:
    """thread_k columns by thread_n weight rows of a CTA's step; it has thread_k * thread_n / 64 threads."""

    thread_k: int
    thread_n: int

    @property
    def name(self) -> str:
        return f"k{self.thread_k}n{self.thread_n}"


SMALL = (MarlinTile(128, 128), MarlinTile(64, 128), MarlinTile(128, 64))
LARGE = (MarlinTile(64, 256), MarlinTile(64, 128), MarlinTile(128, 64))


def sizes(shape: MoEShape, which: str) -> tuple[int, int]:
    """Weight rows and columns of the projection `up` (gate and up) or `down`."""
    hidden, inter = shape.hidden_size, shape.intermediate_size
    return (shape.gate_up_rows, hidden) if which == "up" else (hidden, inter)


def tiles(shape: MoEShape, which: str, block_m: int) -> tuple[MarlinTile, ...]:
    """The tiles that divide a GEMM's weights, in the order in which the library tries them."""
    n, k = sizes(shape, which)
    every = SMALL if block_m <= SMALL_BLOCK else LARGE
    return tuple(tile for tile in every if n % tile.thread_n == k % tile.thread_k == 0)


def misfit(shape: MoEShape) -> str | None:
    """Why no tile divides a shape's weights; None if some do."""
    for which in ("up", "down"):
        if not all(tiles(shape, which, block) for block in (min(TOKEN_BLOCKS), max(TOKEN_BLOCKS))):
            n, k = sizes(shape, which)
            return f"the {which} projection, {n} x {k}, is divided by neither 128 x 64 nor 64 x 128"
    return None


def own_block(shape: MoEShape, num_tokens: int) -> int:
    """vLLM's own token block for a number of tokens."""
    load = num_tokens * shape.top_k / shape.num_experts
    return next((block for block in TOKEN_BLOCKS if load / block < FILL), TOKEN_BLOCKS[-1])


def geometry(tile: MarlinTile, block_m: int, shape: MoEShape, which: str, hardware: Hardware) -> GridGeometry:
    """The grid of a launch: a CTA for each SM. The CTAs share the tiles along k, as with stream-K."""
    describe = GridGeometry.gate_up if which == "up" else GridGeometry.down
    return describe(
        shape,
        block_m=block_m,
        block_n=tile.thread_n,
        block_k=tile.thread_k,
        persistent_ctas=hardware.num_sms,
        stream_k=True,
    )


def most_tokens(shape: MoEShape, top_k: int) -> int:
    """The most tokens of one launch, bounded by the schedule's ids and by 32-bit offsets into rows of routed ids."""
    return min(MAX_IDS, MAX_ELEMENTS // max(shape.hidden_size, shape.gate_up_rows)) // top_k
