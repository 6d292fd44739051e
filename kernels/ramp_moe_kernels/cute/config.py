"""What the fused kernel is compiled for: one configuration is one object file."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Config:
    """`block` tokens and `sub_tile` weight rows a tile, consumer `warps`, `stages` of shared memory, `occupancy` CTAs
    a multiprocessor, `blocks` of 128 intermediates a CTA."""

    block: int
    sub_tile: int
    warps: int
    stages: int
    occupancy: int = 1
    blocks: int = 1

    @property
    def name(self) -> str:
        """Unique; safe as the name of a file and of a function."""
        return f"fp8_m{self.block}_n{self.sub_tile}_w{self.warps}_s{self.stages}_o{self.occupancy}_i{self.blocks}"


def configurations() -> list[Config]:
    """Every configuration."""
    tiles = itertools.product(range(8, 105, 8), ((32, 8), (64, 4)), (2, 3, 4), (1, 2))
    return [Config(block, n, w, stages, 1, blocks) for block, (n, w), stages, blocks in tiles]
