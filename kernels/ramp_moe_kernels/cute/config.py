"""A configuration of the fused CuTe kernel, and its map of shared memory, from which the kernel takes its offsets.

Objects are compiled from this file and what `moe.py` imports: a change here compiles all of them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Combine = Literal["bf16", "f32", "rows"]

ROW_BYTES = 128
"""Bytes of a row of every tile in shared memory, the widest swizzle: 128 fp8 or 64 bf16 elements of the reduction."""
UP_ROWS = 256
"""Rows of gate and up that a CTA multiplies at a time, for INTERMEDIATES; also output columns."""
INTERMEDIATES = 128
OUT_COLUMNS = 128
"""Output columns that a consumer warpgroup hands over at a time."""
OUT_PAD_BYTES = 16
"""Bytes between staged rows of output, against bank conflicts."""
PRODUCER_THREADS = 128
GATHER_THREADS = 96
"""Producer threads that copy tokens. The first producer warp loads weights."""
ELEMENT = {"fp8": 1, "bf16": 2}
ADDRESSING = 36
"""Registers that a consumer needs in addition to its sums, about."""
SM_REGISTERS = 64 * 1024
SM_SMEM_BYTES = 228 * 1024
"""Shared memory of a Hopper SM, of which the system keeps 1 KiB for each CTA."""


@dataclass(frozen=True, slots=True)
class Config:
    """One compiled kernel.

    A CTA computes `block_m` tokens of one expert by `wide` times 256 rows of gate and up, and with them their part of
    the down projection.

    block_m: tokens of a CTA, the N of WGMMA: 8 to 128 by 8.
    tile, warps: weight rows of a warp's share, and consumer warps: (32, 8) or (64, 4).
    stages: weight tiles of 32 KiB in flight.
    ctas: CTAs that share an SM, which halves their shared memory and registers.
    wide: how many times 256 rows a CTA computes one after the other. The sums over them leave the CTA once.
    split_k: CTAs of a cluster that share the reduction over hidden_size, and then the output columns.
    pair: two M-tiles of one expert in a cluster share the loads of weight tiles. Each loads one half for both.
    group_m: M-tiles whose CTAs run side by side, to find an expert's weights in L2; 1: weight rows first.
    combine: how a token's parts are added: into a bf16 output, into a float32 one, or in order, from one row each.
    dtype: of weights and activations.
    smaller: other blocks, ascending, all below `block_m`. The device can choose one of them for a launch.
    """

    block_m: int
    tile: int
    warps: int
    stages: int
    ctas: int = 1
    wide: int = 1
    split_k: int = 1
    pair: bool = False
    group_m: int = 1
    combine: Combine = "bf16"
    dtype: str = "fp8"
    smaller: tuple[int, ...] = ()

    @property
    def blocks(self) -> tuple[int, ...]:
        """The token blocks that a launch can have, ascending."""
        return *self.smaller, self.block_m

    def of(self, block: int) -> Config:
        """The configuration of one of `blocks` alone."""
        return replace(self, block_m=block, smaller=())

    @property
    def name(self) -> str:
        """A unique name, for files and functions, too."""
        parts = [f"bm{'.'.join(map(str, self.blocks))}", f"t{self.tile}", f"w{self.warps}", f"st{self.stages}"]
        parts += [f"cta{self.ctas}"] * (self.ctas > 1) + [f"wide{self.wide}"] * (self.wide > 1)
        parts += [f"sk{self.split_k}"] * (self.split_k > 1) + ["pair"] * self.pair
        parts += [f"gm{self.group_m}"] * (self.group_m > 1) + [self.combine] * (self.combine != "bf16")
        return "-".join([*parts, *([self.dtype] if self.dtype != "fp8" else [])])

    @property
    def block_k(self) -> int:
        """Elements along the reduction of one tile in shared memory."""
        return ROW_BYTES // ELEMENT[self.dtype]

    @property
    def warpgroups(self) -> int:
        """Number of consumer warpgroups."""
        return self.warps // 4

    @property
    def tiles(self) -> int:
        """Number of a warpgroup's WGMMA tiles, of 64 rows each."""
        return UP_ROWS // 64 // self.warpgroups

    @property
    def in_flight(self) -> int:
        """Accumulators that a warpgroup has in WGMMA while it scales another: as many as registers allow."""
        return 2 if self.block_m <= (88 if self.ctas == 1 else 48) else 1

    @property
    def threads(self) -> int:
        return PRODUCER_THREADS + 32 * self.warps

    @property
    def register_pool(self) -> int:
        """Registers with which a CTA is launched: for each thread a multiple of eight.

        `setmaxnreg` only moves them between roles. A consumer that asks for more than the producers gave waits forever.
        """
        return SM_REGISTERS // self.ctas // self.threads // 8 * 8 * self.threads

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a producer and of a consumer thread, within `register_pool`.

        A producer keeps up to 11 rows that it copies. If the sums leave registers, producers get more.
        """
        if self.warps == 8 and self.ctas == 2:
            return 32, 104
        few, many = (224, 232) if self.ctas == 1 else (200, 216)
        return (56, few) if self.accumulators + ADDRESSING <= few else (40, many)

    @property
    def accumulators(self) -> int:
        """Registers of a consumer that hold sums."""
        scaled = self.block_m // 2 * self.in_flight if self.dtype == "fp8" else 0
        return self.block_m // 2 * self.tiles + scaled

    @property
    def smem_limit(self) -> int:
        """Bytes of shared memory that a CTA may have."""
        return SM_SMEM_BYTES // self.ctas - 1024

    @property
    def out_element(self) -> int:
        """Bytes of an element of staged output."""
        return 4 if self.combine == "f32" else 2

    @property
    def out_pitch(self) -> int:
        """Elements from one staged row to the next."""
        return OUT_COLUMNS + OUT_PAD_BYTES // self.out_element

    @property
    def staged_bytes(self) -> int:
        """Bytes of one buffer of staged output, which has a chunk of every warpgroup."""
        return self.warpgroups * self.block_m * self.out_pitch * self.out_element


@dataclass(frozen=True, slots=True)
class SmemMap:
    """Byte offsets in a CTA's shared memory, and its total size `bytes`.

    weights    stages x 256 rows x 128 bytes, swizzled
    tokens     stages x block rows x 128 bytes, swizzled; then staged output, in `buffers` buffers
    hidden     wide x block rows x 128 intermediates, swizzled: the down projection's tokens
    parts      split_k x 256 x block float32: every CTA's sums of a split reduction
    x_scale    stages x block float32            routing    block float32: routing weights
    h_scale    wide x block float32              maxima     block x 4 warpgroups' warps float32
    barriers   4 x stages + 1 mbarriers
    """

    weights: int
    tokens: int
    hidden: int
    parts: int
    x_scale: int
    routing: int
    h_scale: int
    maxima: int
    barriers: int
    bytes: int
    buffers: int


def smem_map(c: Config) -> SmemMap:
    """The map of a configuration, with two buffers of staged output if they fit, else one."""
    tokens, staged = c.stages * c.block_m * ROW_BYTES, c.staged_bytes
    regions = {  # bytes and alignment
        "weights": (c.stages * UP_ROWS * ROW_BYTES, 1024),
        "tokens": (max(tokens, 2 * staged), 1024),
        "hidden": (c.wide * c.block_m * INTERMEDIATES * ELEMENT[c.dtype], 1024),
        "parts": (c.split_k * c.block_m * UP_ROWS * 4 if c.split_k > 1 else 0, 16),
        "x_scale": (c.stages * c.block_m * 4, 16),
        "routing": (c.block_m * 4, 16),
        "h_scale": (c.wide * c.block_m * 4, 16),
        "maxima": (c.block_m * c.warps * 4, 16),
        "barriers": (_barrier_bytes(c.stages), 16),
    }
    two = _laid_out(regions, 2)
    if two.bytes <= c.smem_limit:
        return two
    return _laid_out(regions | {"tokens": (max(tokens, staged), 1024)}, 1)


def smem_bytes(c: Config) -> int:
    """Bytes of shared memory of a CTA, enough for any of its blocks."""
    return max(smem_map(c.of(block)).bytes for block in c.blocks)


def _laid_out(regions: Mapping[str, tuple[int, int]], buffers: int) -> SmemMap:
    at, offsets = 0, {}
    for name, (size, alignment) in regions.items():
        offsets[name] = -(-at // alignment) * alignment
        at = offsets[name] + size
    return SmemMap(**offsets, bytes=at, buffers=buffers)


ITEM_BLOCKS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128)
"""Token blocks of an item: each has its own code in the launch, about 35 kB of it."""
ITEM_WIDE = 4
"""Most times 256 rows of an item."""
ITEM_STAGES = (3, 4)
"""Stages of weights of an item's block: the fewest, and the most."""


@dataclass(frozen=True, slots=True)
class ItemsConfig:
    """The launch that works off a list of items, one a CTA, each with a token block and a width of its own.

    dtype: of weights and activations.
    """

    dtype: str = "fp8"

    @property
    def name(self) -> str:
        """A unique name, for files and functions, too."""
        return "items" + (f"-{self.dtype}" if self.dtype != "fp8" else "")

    @property
    def bodies(self) -> tuple[Config, ...]:
        """For each of ITEM_BLOCKS, its stages, and the widest item that shared memory holds."""
        return tuple(self._body(block) for block in ITEM_BLOCKS)

    @property
    def ring(self) -> int:
        """Stages for which there are barriers."""
        return max(c.stages for c in self.bodies)

    @property
    def barriers(self) -> int:
        """Offset of the barriers in shared memory, where all bodies find them."""
        return max(smem_map(c).barriers for c in self.bodies)

    @property
    def bytes(self) -> int:
        """Shared memory of a CTA."""
        return self.barriers + _barrier_bytes(self.ring)

    def map(self, config: Config) -> SmemMap:
        """The map of one of `bodies` in this launch."""
        return replace(smem_map(config), barriers=self.barriers, bytes=self.bytes)

    def _body(self, block: int) -> Config:
        """As wide as fits with the fewest stages. Then two buffers of output come before more stages."""
        few, many = ITEM_STAGES
        every = [
            [Config(block, 32, 8, stages, wide=wide, dtype=self.dtype) for stages in range(few, many + 1)]
            for wide in range(ITEM_WIDE, 0, -1)
        ]
        fitting = next(fits for of_wide in every if (fits := [c for c in of_wide if self._fits(c)]))
        return max(fitting, key=lambda c: (smem_map(c).buffers, c.stages))

    @staticmethod
    def _fits(c: Config) -> bool:
        return smem_map(c).barriers + _barrier_bytes(max(ITEM_STAGES)) <= c.smem_limit


def _barrier_bytes(stages: int) -> int:
    return (4 * stages + 1) * 8
