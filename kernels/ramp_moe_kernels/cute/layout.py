"""The layouts of the fused kernel as index arithmetic: what it does with tensors and tensor maps, in integers.

Nothing at run time uses this; it says where things are, and tests hold it against brute force and the weights' views.
Warps are those of a consumer warpgroup, 0 to 3, unless said otherwise; `half` is 0 for the rows that the tensor map
reads from index 0 of its second dimension (gate, or up where that is first), 1 for the others.
"""

from __future__ import annotations

from collections.abc import Iterable

from .config import GATHER_THREADS, OUT_COLUMNS, OUT_PAD_BYTES, ROW_BYTES, UP_ROWS

EIGHT = 8
"""Rows of one half that lie together."""
CHUNK = 16
"""Bytes that a thread copies at once."""
BANKS, BANK_BYTES = 32, 4
"""Of shared memory, in one cycle."""


# --- weights ---------------------------------------------------------------------------------------------------------


def map_index(row: int) -> tuple[int, int, int]:
    """Index in the first three dimensions of gate_up's tensor map (8, 2, I / 8, H, E) of an interleaved row: row in
    eight, half, eight. Stage n of an expert is rows [256 n, 256 n + 256)."""
    return row % EIGHT, row // EIGHT % 2, row // (2 * EIGHT)


def intermediate(row: int) -> tuple[int, int]:
    """Which intermediate an interleaved row makes, and its half."""
    in_eight, half, eight = map_index(row)
    return EIGHT * eight + in_eight, half


def memory_row(index: tuple[int, int, int], layout: str, inter: int) -> int:
    """Where that row is among the 2 I rows of an expert in memory."""
    in_eight, half, eight = index
    if layout == "gate-up-interleaved-8":
        return 2 * EIGHT * eight + EIGHT * half + in_eight
    return inter * half + EIGHT * eight + in_eight


def is_up(half: int, layout: str) -> bool:
    """Whether the rows of a half are up, not gate."""
    return half != (layout == "up-first")


def swizzled(row: int, byte: int) -> int:
    """Byte offset in a tile of rows of 128 bytes: the 16-byte chunks of a row are permuted by the row's place in eight,
    CuTe's Swizzle<3, 4, 3>."""
    at = row * ROW_BYTES + byte
    return at ^ (at >> 3 & 7 << 4)


# --- tokens ----------------------------------------------------------------------------------------------------------


def gathered(thread: int, turn: int) -> tuple[int, int]:
    """Row of the block and first byte that a gathering thread, 0 to 95, copies in its `turn`-th of ceil(block / 12)
    turns; rows from `block` on are none."""
    chunks = ROW_BYTES // CHUNK
    return turn * (GATHER_THREADS // chunks) + thread // chunks, thread % chunks * CHUNK


def gathered_to(thread: int, turn: int) -> int:
    """The byte of the tile that it goes to: a turn is 12 rows, so that a row's place in eight is 4 away in every other
    turn."""
    row, byte = gathered(thread, 0)
    return turn * (GATHER_THREADS // (ROW_BYTES // CHUNK)) * ROW_BYTES + (swizzled(row, byte) ^ turn % 2 * 4 * CHUNK)


# --- sums in registers -----------------------------------------------------------------------------------------------


def accumulator(warp: int, lane: int, register: int) -> tuple[int, int]:
    """Row of a 64-row tile and token of a register, of block / 2."""
    m, half, j = register // 4, register // 2 % 2, register % 2
    return 16 * warp + 8 * half + lane // 4, 8 * m + 2 * (lane % 4) + j


def hidden_column(warp: int, lane: int, tile: int) -> int:
    """Which of a CTA's 128 intermediates a lane has in a 64-row tile, in registers 4m + j (then 4m + 2 + j its up)."""
    return 32 * tile + 8 * warp + lane // 4


def part(rank: int, tile: int, octet: int, thread: int, i: int, *, block: int, tiles: int, threads: int) -> int:
    """Index of a float32 among the sums of a split reduction: CTA `rank`'s register 4 octet + i of a tile of a consumer
    thread."""
    return (((rank * tiles + tile) * (block // 8) + octet) * threads + thread) * 4 + i


# --- output ----------------------------------------------------------------------------------------------------------


def matrix_row(warp: int, lane: int, octet: int) -> tuple[int, int]:
    """Token and staged column where the row begins that a lane addresses for stmatrix: row lane % 8 of the 8 x 8 matrix
    lane // 8 of four, in the order of `stored`."""
    return 8 * octet + lane % 8, lane // 16 * 64 + 16 * warp + lane // 8 % 2 * 8


def stored(lane: int, value: int) -> tuple[int, int, int]:
    """Matrix, row and column where the transposing stmatrix puts a lane's value, 0 to 7: register 4m + value % 4 of the
    tile value // 4 of two."""
    return value // 2, 2 * (lane % 4) + value % 2, lane // 4


def staged(token: int, column: int, element: int = 2) -> int:
    """Element, of so many bytes, of a warpgroup's buffer of staged output."""
    return token * (OUT_COLUMNS + OUT_PAD_BYTES // element) + column


def out_column(n: int, group: int, half: int, column: int, *, tiles: int) -> int:
    """Column of the output of a staged column of a warpgroup, in its `half`-th pair of tiles of output tile n."""
    return n * UP_ROWS + (group * (tiles // 2) + half) * OUT_COLUMNS + column


def ways(addresses: Iterable[int], size: int) -> int:
    """How many cycles an access to shared memory takes: different words of one bank, at most, in these addresses of
    `size` bytes each."""
    words = {a // BANK_BYTES + i for a in addresses for i in range(max(1, size // BANK_BYTES))}
    return max(sum(w % BANKS == bank for w in words) for bank in range(BANKS))


# --- grid ------------------------------------------------------------------------------------------------------------


def tile_of(bx: int, by: int, *, tiles_n: int, grid_m: int, split_k: int = 1, group_m: int = 1) -> tuple[int, int, int]:
    """Weight tile, M-tile and part of the reduction of a CTA. group_m M-tiles take turns, then the next weight tile;
    the last band of M-tiles may be thinner."""
    n_i, m_i = bx // split_k, by
    if group_m > 1:
        band, within = divmod(by * tiles_n + n_i, group_m * tiles_n)
        rows = min(grid_m - band * group_m, group_m)
        n_i, m_i = within // rows, band * group_m + within % rows
    return n_i, m_i, bx % split_k
