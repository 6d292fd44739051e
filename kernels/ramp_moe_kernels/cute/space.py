"""The configuration space of the fused CuTe kernel: what is valid, what is worth compiling, and grids.

One predicate serves enumeration, pruning and launch. Spilled registers, which only the compiler knows, are read from
the compiled object (see `aot.cubin`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import get_args

from ramp_moe.plugin import SCALE_BLOCK, GridGeometry, KernelError, MoEShape

from ..limits import MAX_ELEMENTS, MAX_TILES, max_ids, max_tokens
from .config import ADDRESSING, INTERMEDIATES, UP_ROWS, Combine, Config, smem_map

MAX_SPLIT_BLOCK = 16
"""Largest token block of a split reduction: every CTA of a cluster holds all the others' sums."""
BF16_ADDRESSING = 56
"""Registers that a consumer needs in addition to its sums in bf16, about. With fewer it spills."""
MAX_ADDITIONS = 48
"""Most parts that bf16 weights add to a bf16 output, with a relative error of 0.009.

fp8 has no such limit, since rounding its operands makes an error of 0.044 already.
"""


def invalid(c: Config, shape: MoEShape) -> str | None:
    """Why a configuration cannot run, or never pays; None if it is valid."""
    if c.dtype != shape.dtype:
        return f"compiled for {c.dtype}, the weights are {shape.dtype}"
    if c.block_m % 8 or not 8 <= c.block_m <= 128:
        return "a token block is 8 to 128 by 8, the N of WGMMA"
    if (c.tile, c.warps) not in ((32, 8), (64, 4)):
        return "a CTA's 256 rows are 8 warps' 32 or 4 warps' 64"
    if c.ctas not in (1, 2) or c.split_k not in (1, 2, 4, 8) or c.combine not in get_args(Combine):
        return f"{c.ctas} CTAs an SM, split_k {c.split_k} and combine {c.combine} are not all among those there are"
    if min(c.stages, c.wide, c.group_m) < 1:
        return "stages, wide and group_m must be at least 1"
    if shape.intermediate_size % (c.wide * INTERMEDIATES):
        return f"intermediate_size {shape.intermediate_size} is no multiple of {c.wide} x {INTERMEDIATES}"
    additions = shape.top_k * shape.intermediate_size // (c.wide * INTERMEDIATES)
    if c.dtype == c.combine == "bf16" and additions > MAX_ADDITIONS:
        return f"{additions} parts added up in bf16 are more than the {MAX_ADDITIONS} that it is exact enough for"
    if c.split_k > 1 and (c.block_m > MAX_SPLIT_BLOCK or c.wide > 1 or c.pair):
        return f"a reduction is split for up to {MAX_SPLIT_BLOCK} tokens, one wide, without a pair"
    if c.split_k * c.block_k > shape.hidden_size:
        return f"hidden_size {shape.hidden_size} has fewer steps of {c.block_k} than {c.split_k} splits"
    if c.pair and c.group_m > 1:
        return "paired M-tiles share weights already"
    if (needed := smem_map(c).bytes) > c.smem_limit:
        return f"{needed} bytes exceed the {c.smem_limit} of shared memory"
    addressing = ADDRESSING if c.dtype == "fp8" else BF16_ADDRESSING
    if c.accumulators > c.registers[1] - addressing:
        return f"{c.accumulators} registers of sums leave less than {addressing} of {c.registers[1]}"
    return None


def space() -> Iterator[Config]:
    """The configurations that are worth compiling, valid for a shape or not (see `configurations`)."""
    blocks = range(8, 129, 8)
    for block, stages, wide in itertools.product(blocks, (3, 4), (1, 2)):  # one CTA an SM: deep rings
        yield Config(block, 32, 8, stages, wide=wide)
    for block, split_k in itertools.product((8, 16), (2, 4, 8)):
        yield Config(block, 32, 8, 4, split_k=split_k)
        yield Config(block, 32, 8, 2, ctas=2, split_k=split_k)
    for block, wide in itertools.product((8, 16, 24, 32), (1, 2)):
        yield Config(block, 32, 8, 5, wide=wide)
    for block, stages in itertools.product((8, 16, 24), (2, 3)):
        yield Config(block, 32, 8, stages, ctas=2)
    for block, stages, wide in itertools.product(blocks, (2, 3), (1, 2)):  # two CTAs an SM: one works, one waits
        yield Config(block, 64, 4, stages, ctas=2, wide=wide)
    for block, wide in itertools.product(blocks, (1, 2, 3, 4)):
        if block >= 32:
            yield Config(block, 64, 4, 2, ctas=2, wide=wide, pair=True)
            yield Config(block, 32, 8, 3, wide=wide, pair=True)
    for block in (64, 96, 128):
        yield Config(block, 32, 8, 3, wide=2, group_m=8)
    combines: tuple[Combine, ...] = ("f32", "rows")
    for block, combine in itertools.product((8, 16, 32, 64), combines):
        yield Config(block, 32, 8, 3, wide=2 if block >= 32 else 1, combine=combine)


POLYMORPHIC = (
    Config(64, 32, 8, 3, smaller=(8, 16, 32)),
    Config(64, 32, 8, 3, wide=2, smaller=(8, 16, 32)),
    Config(64, 64, 4, 2, ctas=2, wide=2, smaller=(8, 16, 32)),
)
"""Configurations whose launches can have any of four token blocks."""


def polymorphic(shape: MoEShape) -> list[Config]:
    """The POLYMORPHIC configurations that are valid for a shape with every one of their blocks."""
    given = (replace(c, dtype=shape.dtype) for c in POLYMORPHIC)
    return [c for c in given if all(invalid(c.of(block), shape) is None for block in c.blocks)]


def one_of(configs: Sequence[Config]) -> Config:
    """The polymorphic configuration that can compute all of `configs`. Raises KernelError if there is none."""
    for c in POLYMORPHIC:
        whole = replace(c, dtype=configs[0].dtype)
        if all(config in [whole.of(block) for block in whole.blocks] for config in configs):
            return whole
    raise KernelError(f"no launch of cute is any of {', '.join(c.name for c in configs)}")


@functools.cache  # finding them takes a hundredth of a second, and a profile asks for thousands of defaults
def configurations(shape: MoEShape) -> tuple[Config, ...]:
    """The configurations of `space` that are valid for a shape."""
    return tuple(c for c in (replace(c, dtype=shape.dtype) for c in space()) if invalid(c, shape) is None)


def geometry(c: Config, shape: MoEShape) -> GridGeometry:
    """The grid of a launch."""
    return GridGeometry.fused(
        shape,
        block_m=c.block_m,
        block_n=c.wide * UP_ROWS,
        block_k=c.block_k,
        split_k=c.split_k,
        ctas_per_sm=c.ctas,
        cluster_m=1 + c.pair,
    )


@functools.cache
def most_tokens(c: Config, shape: MoEShape) -> int:
    """The most tokens of one launch, limited by the schedule's ids, the grid's tiles, and x's elements in 32 bits."""
    tiles = MAX_TILES - MAX_TILES % (1 + c.pair)
    of_elements = MAX_ELEMENTS // shape.hidden_size * shape.top_k
    return max_tokens(shape, max_ids(tiles, shape.num_experts, min(c.blocks)), of_elements)


def unaligned(shape: MoEShape) -> str | None:
    """Why no configuration can compute a shape; None if some can."""
    if shape.hidden_size % UP_ROWS:
        return f"hidden_size {shape.hidden_size} is not a multiple of {UP_ROWS}, the output columns of a tile"
    if shape.intermediate_size % SCALE_BLOCK:
        return f"intermediate_size {shape.intermediate_size} is not a multiple of {SCALE_BLOCK}"
    return None
