"""The configurations of vLLM's Marlin MoE GEMM: its token block, and the tile of one CTA.

The library takes the token block, and the columns and rows of a tile. It was compiled for four tiles, listed here as in
csrc/moe/marlin_moe_wna16 of vLLM 0.33. A pinned tile has one CTA per SM. Left to itself, the library takes a tile that
divides the weights; up to a token block of 16 that of which most CTAs fit on an SM, at most four, above the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

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
SMALL_BLOCK, MOST_RESIDENT = 16, 4
"""Largest token block of tiles for small batches, and the most CTAs per SM of those that the library chooses."""


@dataclass(frozen=True, slots=True)
class MarlinTile:
    """thread_k columns by thread_n weight rows of a CTA's step; it has thread_k * thread_n / 64 threads.

    chosen: True if the library chooses the tile. The sizes are then those of the first that divides the weights.
    """

    thread_k: int
    thread_n: int
    chosen: bool = False

    @property
    def name(self) -> str:
        return "auto" if self.chosen else f"k{self.thread_k}n{self.thread_n}"

    @property
    def arguments(self) -> tuple[int, int, int]:
        """The library's thread_k, thread_n and CTAs per SM; -1 leaves it the choice."""
        return (-1, -1, -1) if self.chosen else (self.thread_k, self.thread_n, 1)


SMALL = (MarlinTile(128, 128), MarlinTile(64, 128), MarlinTile(128, 64))
LARGE = (MarlinTile(64, 256), MarlinTile(64, 128), MarlinTile(128, 64))


def sizes(shape: MoEShape, which: str) -> tuple[int, int]:
    """Weight rows and columns of the projection `up` (gate and up) or `down`."""
    hidden, inter = shape.hidden_size, shape.intermediate_size
    return (shape.gate_up_rows, hidden) if which == "up" else (hidden, inter)


def tiles(shape: MoEShape, which: str, block_m: int) -> tuple[MarlinTile, ...]:
    """The library's own choice, and the tiles that divide a GEMM's weights, in the order in which it tries them."""
    n, k = sizes(shape, which)
    every = SMALL if block_m <= SMALL_BLOCK else LARGE
    pinned = [tile for tile in every if n % tile.thread_n == k % tile.thread_k == 0]
    return (replace(pinned[0], chosen=True), *pinned) if pinned else ()


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
    """The grid of a launch, whose CTAs share the tiles along k, as with stream-K.

    Of a tile that the library chooses, tile and CTAs per SM are what it takes at most.
    """
    describe = GridGeometry.gate_up if which == "up" else GridGeometry.down
    resident = MOST_RESIDENT if tile.chosen and block_m <= SMALL_BLOCK else 1
    return describe(
        shape,
        block_m=block_m,
        block_n=tile.thread_n,
        block_k=tile.thread_k,
        persistent_ctas=resident * hardware.num_sms,
        ctas_per_sm=resident,
        stream_k=True,
    )


def most_tokens(shape: MoEShape, top_k: int) -> int:
    """The most tokens of one launch, bounded by the schedule's ids and by 32-bit offsets into rows of routed ids."""
    return min(MAX_IDS, MAX_ELEMENTS // max(shape.hidden_size, shape.gate_up_rows)) // top_k


def params(block_m: int, up: MarlinTile, down: MarlinTile) -> tuple[tuple[str, int | bool], ...]:
    """A token block and both tiles as parameters of a KernelConfig."""
    pair = (("up", up), ("down", down))
    return ("block_m", block_m), *((f"{w}_{key}", value) for w, tile in pair for key, value in asdict(tile).items())


def tiles_of(given: Iterable[tuple[str, Any]]) -> tuple[int, MarlinTile, MarlinTile]:
    """The token block and the tiles of a KernelConfig's parameters, the inverse of `params`."""
    p: dict[str, Any] = dict(given)
    up, down = (MarlinTile(**{f.name: p[f"{w}_{f.name}"] for f in fields(MarlinTile)}) for w in ("up", "down"))
    return p["block_m"], up, down
