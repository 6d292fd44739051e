"""The fused kernel's layouts by brute force, the weights' views against them, and its map of shared memory."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise, product

import pytest
import torch
from moe_cases import weights
from ramp_moe import MoEShape
from ramp_moe.runtime.relayout import relayout
from ramp_moe.spec.kernel import LAYOUTS
from ramp_moe_kernels.cute import launch, layout
from ramp_moe_kernels.cute.config import (
    ELEMENT,
    GATHER_THREADS,
    INTERMEDIATES,
    OUT_COLUMNS,
    ROW_BYTES,
    SM_SMEM_BYTES,
    UP_ROWS,
    Config,
    smem_bytes,
    smem_map,
)
from ramp_moe_kernels.cute.space import configurations, polymorphic

BLOCKS = (8, 16, 40, 128)
WARPS, LANES = range(4), range(32)
SHAPES = [MoEShape(8, 2, 8192, 128 * 12, dtype) for dtype in ELEMENT]  # for every `wide`
CONFIGS = [c for shape in SHAPES for c in (*configurations(shape), *polymorphic(shape))]


# --- registers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_a_tile_is_in_registers_once(block: int) -> None:
    held = {layout.accumulator(w, lane, i) for w, lane, i in product(WARPS, LANES, range(block // 2))}
    assert held == set(product(range(64), range(block)))


def test_a_thread_has_the_gate_and_the_up_of_its_intermediates() -> None:
    for tile, warp, lane, m, j in product(range(4), WARPS, LANES, range(2), range(2)):
        (gate, token), (up, same) = (layout.accumulator(warp, lane, 4 * m + 2 * half + j) for half in (0, 1))
        assert token == same
        column = layout.hidden_column(warp, lane, tile)
        assert [layout.intermediate(64 * tile + row) for row in (gate, up)] == [(column, 0), (column, 1)]


def test_the_example_of_the_kernel() -> None:
    """Block 8, lane 5 of warp 2, register 3."""
    assert layout.accumulator(2, 5, 3) == (41, 3)
    assert layout.intermediate(41) == (17, 1)
    assert layout.intermediate(layout.accumulator(2, 5, 1)[0]) == (17, 0)
    assert layout.is_up(1, "gate-first")


@pytest.mark.parametrize(("tiles", "warps"), [(2, 8), (4, 4)])
@pytest.mark.parametrize(("block", "split_k"), [(8, 2), (16, 4), (8, 8)])
def test_parts_of_a_split_reduction(tiles: int, warps: int, block: int, split_k: int) -> None:
    """Every sum has a place, a CTA's lie together, and a warp stores 512 bytes in a row."""
    threads = 32 * warps

    def at(*where: int) -> int:
        return layout.part(*where, block=block, tiles=tiles, threads=threads)

    own = list(product(range(tiles), range(block // 8), range(threads), range(4)))
    for rank in range(split_k):
        size = block * UP_ROWS
        assert {at(rank, *where) for where in own} == set(range(rank * size, (rank + 1) * size))
    assert [4 * at(1, 1, 0, 32 + lane, 0) - 4 * at(1, 1, 0, 32, 0) for lane in LANES] == [16 * n for n in LANES]


# --- tiles in shared memory ------------------------------------------------------------------------------------------


def test_the_swizzle() -> None:
    rows = range(64)
    assert {layout.swizzled(r, b) for r, b in product(rows, range(ROW_BYTES))} == set(range(64 * ROW_BYTES))
    assert all(layout.swizzled(r, b) // ROW_BYTES == r for r, b in product(rows, range(ROW_BYTES)))
    assert layout.swizzled(3, 5 * 16 + 7) == 3 * 128 + (3 ^ 5) * 16 + 7
    for first, chunk in product((0, 8), range(0, ROW_BYTES, 16)):  # as WGMMA reads: eight rows of a chunk
        assert layout.ways((layout.swizzled(r, chunk) for r in range(first, first + 8)), 16) == 1


@pytest.mark.parametrize("block", range(8, 129, 8))
def test_tokens_are_copied_once(block: int) -> None:
    turns = -(-block // 12)
    copied = [layout.gathered(thread, turn) for thread, turn in product(range(GATHER_THREADS), range(turns))]
    assert len(copied) == len(set(copied))
    assert {c for c in copied if c[0] < block} == set(product(range(block), range(0, ROW_BYTES, 16)))
    for thread, turn in product(range(GATHER_THREADS), range(turns)):
        assert layout.gathered_to(thread, turn) == layout.swizzled(*layout.gathered(thread, turn))
    for eight in range(0, GATHER_THREADS, 8):  # eight threads copy one row, a chunk each
        assert layout.ways((layout.swizzled(*layout.gathered(t, 0)) for t in range(eight, eight + 8)), 16) == 1


# --- output ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("octet", [0, 1, 5])
def test_stmatrix_puts_every_register_at_its_token_and_column(octet: int) -> None:
    seen = set()
    for warp, lane, value in product(WARPS, LANES, range(8)):
        matrix, row, column = layout.stored(lane, value)
        token, first = layout.matrix_row(warp, 8 * matrix + row, octet)
        held_row, held_token = layout.accumulator(warp, lane, 4 * octet + value % 4)
        assert (token, first + column) == (held_token, 64 * (value // 4) + held_row)
        seen.add((token, first + column))
    assert seen == set(product(range(8 * octet, 8 * octet + 8), range(OUT_COLUMNS)))


def test_staged_rows_do_not_conflict() -> None:
    """bf16: eight rows of 16 bytes at a time. float32: a word a lane."""
    for warp, matrix in product(WARPS, range(4)):
        rows = (layout.staged(*layout.matrix_row(warp, 8 * matrix + row, 0)) * 2 for row in range(8))
        assert layout.ways(rows, 16) == 1
    for warp, register in product(WARPS, range(4)):
        held = (layout.accumulator(warp, lane, register) for lane in LANES)
        assert layout.ways((layout.staged(token, row, 4) * 4 for row, token in held), 4) == 1


@pytest.mark.parametrize(("tiles", "groups"), [(2, 2), (4, 1)])
def test_output_columns_are_handed_over_once(tiles: int, groups: int) -> None:
    """And are those of the weight rows that the warpgroup multiplied: its tiles, 64 rows each, two at a time."""
    handed = {}
    for n, group, half, tile, row in product(range(3), range(groups), range(tiles // 2), range(2), range(64)):
        multiplied = n * UP_ROWS + 64 * (group * tiles + 2 * half + tile) + row
        handed[layout.out_column(n, group, half, 64 * tile + row, tiles=tiles)] = multiplied
    assert handed == {column: column for column in range(3 * UP_ROWS)}


# --- grid ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_m", [1, 2, 8])
@pytest.mark.parametrize("split_k", [1, 4])
def test_every_tile_has_one_cta(group_m: int, split_k: int) -> None:
    for tiles_n, grid_m in product((1, 2, 7, 28), (1, 2, 7, 8, 9, 16, 37)):
        grid = [(bx, by) for by in range(grid_m) for bx in range(tiles_n * split_k)]
        tiles = [layout.tile_of(*b, tiles_n=tiles_n, grid_m=grid_m, split_k=split_k, group_m=group_m) for b in grid]
        assert len(tiles) == len(set(tiles))
        assert set(tiles) == set(product(range(tiles_n), range(grid_m), range(split_k)))
        deep = min(group_m, grid_m)  # M-tiles of the same weights, to begin with
        assert tiles[: deep * split_k] == list(product([0], range(deep), range(split_k)))


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "check_hopper", lambda kernel, device: None)


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("inter", [128, 384])
def test_a_row_of_every_stage_is_one_in_memory(order: str, inter: int) -> None:
    rows = [layout.memory_row(layout.map_index(row), order, inter) for row in range(2 * inter)]
    assert sorted(rows) == list(range(2 * inter))
    columns = [layout.intermediate(row) for row in range(2 * inter)]
    assert sorted(columns) == list(product(range(inter), range(2)))
    assert all(c // INTERMEDIATES == row // UP_ROWS for row, (c, _) in enumerate(columns))


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("dtype", ELEMENT)
def test_views_of_weights_read_what_the_layout_says(order: str, dtype: str) -> None:
    """Without a copy: from the same addresses, the same gate and up from all orders."""
    experts, hidden, inter = 3, 256, 384
    plain = weights(experts, hidden, inter, dtype, "cpu")
    given = relayout(plain, order)
    prepared = launch.prepare(given)
    assert prepared.up_first == (order == "up-first")
    assert prepared.gate_up.untyped_storage().data_ptr() == given.gate_up.untyped_storage().data_ptr()
    assert prepared.down.untyped_storage().data_ptr() == given.down.untyped_storage().data_ptr()
    assert prepared.gate_up.shape == (8, 2, inter // 8, hidden, experts)
    assert torch.equal(prepared.down.permute(2, 0, 1).float(), plain.down.float())
    views, rows = prepared.gate_up.float(), plain.gate_up.float()
    for row in range(2 * inter):
        index, (column, half) = layout.map_index(row), layout.intermediate(row)
        at = sum(i * s for i, s in zip(index, prepared.gate_up.stride(), strict=False))
        assert at == layout.memory_row(index, order, inter) * hidden
        wanted = rows[:, inter * layout.is_up(half, order) + column]
        assert torch.equal(views[*index].T, wanted)
    if dtype == "bf16":
        return
    assert plain.gate_up_scale is not None
    assert plain.down_scale is not None
    assert torch.equal(prepared.down_scale.permute(2, 0, 1), plain.down_scale)
    for block, half in product(range(inter // 128), range(2)):
        wanted = plain.gate_up_scale[:, inter // 128 * layout.is_up(half, order) + block]
        assert torch.equal(prepared.gate_up_scale[half, block].T, wanted)


# --- the map of shared memory ----------------------------------------------------------------------------------------


def regions(c: Config) -> dict[str, tuple[int, int]]:
    """Bytes and alignment of what the kernel keeps there."""
    pitch = layout.staged(1, 0, c.out_element) * c.out_element
    element = ELEMENT[c.dtype]
    return {
        "weights": (c.stages * UP_ROWS * ROW_BYTES, 1024),
        "tokens": (max(c.stages * c.block_m * ROW_BYTES, smem_map(c).buffers * c.warpgroups * c.block_m * pitch), 1024),
        "hidden": (c.wide * c.block_m * INTERMEDIATES * element, 1024),
        "parts": (c.split_k * c.block_m * UP_ROWS * 4 if c.split_k > 1 else 0, 16),
        "x_scale": (c.stages * c.block_m * 4, 4),
        "routing": (c.block_m * 4, 4),
        "h_scale": (c.wide * c.block_m * 4, 4),
        "maxima": (c.block_m * c.warps * 4, 4),
        "barriers": ((4 * c.stages + 1) * 8, 8),
    }


def test_regions_of_shared_memory() -> None:
    """Apart from one another, aligned, and no more than there is, for every configuration."""
    assert len(CONFIGS) > 300
    for c in (whole.of(block) for whole in CONFIGS for block in whole.blocks):
        found, needed = smem_map(c), regions(c)
        assert set(needed) == {f.name for f in fields(found)} - {"bytes", "buffers"}
        spans = sorted((getattr(found, name), size, alignment) for name, (size, alignment) in needed.items())
        assert all(at % alignment == 0 for at, _, alignment in spans), c.name
        assert all(at + size <= after for (at, size, _), (after, _, _) in pairwise(spans)), c.name
        assert spans[0][0] == 0
        assert spans[-1][0] + spans[-1][1] <= found.bytes, c.name
        assert c.ctas * (found.bytes + 1024) <= SM_SMEM_BYTES, c.name
        assert found.buffers in (1, 2)


def test_a_launch_of_several_blocks_has_room_for_each() -> None:
    several = [c for c in CONFIGS if c.smaller]
    assert several
    for c in several:
        assert max(smem_map(c.of(block)).bytes for block in c.blocks) == smem_bytes(c) <= c.smem_limit
