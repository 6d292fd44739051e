"""The layouts of the fused kernel as arithmetic on integers, instead of tensors and tensor maps.

Nothing at run time uses this file. It documents where things are, and tests compare it with brute force and with the
weights' views. Warps are those of a consumer warpgroup, 0 to 3, unless said otherwise. `half` is 0 for the rows that
the tensor map reads from index 0 of its second dimension: gate, or up if that is first. It is 1 for the others.
"""

from __future__ import annotations

from collections.abc import Iterable

from .config import GATHER_THREADS, OUT_COLUMNS, OUT_PAD_BYTES, ROW_BYTES, UP_ROWS

EIGHT = 8
"""Rows of one half that lie together."""
CHUNK = 16
"""Bytes that a thread copies at once."""
BANKS, BANK_BYTES = 32, 4
"""Bytes of shared memory that can be accessed in one cycle."""


# --- weights ---------------------------------------------------------------------------------------------------------


def map_index(row: int) -> tuple[int, int, int]:
    """Index of an interleaved row in the first three dimensions of gate_up's tensor map (8, 2, I / 8, H, E).

    They are row in eight, half, and eight. Stage n of an expert is rows [256 n, 256 n + 256).
    """
    return row % EIGHT, row // EIGHT % 2, row // (2 * EIGHT)


def intermediate(row: int) -> tuple[int, int]:
    """The intermediate to which an interleaved row contributes, and the row's half."""
    in_eight, half, eight = map_index(row)
    return EIGHT * eight + in_eight, half


def memory_row(index: tuple[int, int, int], layout: str, inter: int) -> int:
    """The row's position among the 2 I rows of an expert in memory, by its index of `map_index`."""
    in_eight, half, eight = index
    if layout == "gate-up-interleaved-8":
        return 2 * EIGHT * eight + EIGHT * half + in_eight
    return inter * half + EIGHT * eight + in_eight


def is_up(half: int, layout: str) -> bool:
    """Whether the rows of a half are up, not gate."""
    return half != (layout == "up-first")


def swizzled(row: int, byte: int) -> int:
    """Byte offset in a tile of rows of 128 bytes, by CuTe's Swizzle<3, 4, 3>.

    It permutes the 16-byte chunks of a row by the row's position in eight.
    """
    at = row * ROW_BYTES + byte
    return at ^ (at >> 3 & 7 << 4)


# --- tokens ----------------------------------------------------------------------------------------------------------


def gathered(thread: int, turn: int) -> tuple[int, int]:
    """The row of the block and the first byte that a gathering thread, 0 to 95, copies in a turn.

    There are ceil(block / 12) turns. Rows from `block` on do not exist.
    """
    chunks = ROW_BYTES // CHUNK
    return turn * (GATHER_THREADS // chunks) + thread // chunks, thread % chunks * CHUNK


def gathered_to(thread: int, turn: int) -> int:
    """The byte of the tile to which that is copied.

    A turn is 12 rows. So in every other turn, a row's position in eight differs by 4.
    """
    row, byte = gathered(thread, 0)
    return turn * (GATHER_THREADS // (ROW_BYTES // CHUNK)) * ROW_BYTES + (swizzled(row, byte) ^ turn % 2 * 4 * CHUNK)


# --- sums in registers -----------------------------------------------------------------------------------------------


def accumulator(warp: int, lane: int, register: int) -> tuple[int, int]:
    """The row of a 64-row tile, and the token, of one of a lane's block / 2 registers."""
    m, half, j = register // 4, register // 2 % 2, register % 2
    return 16 * warp + 8 * half + lane // 4, 8 * m + 2 * (lane % 4) + j


def hidden_column(warp: int, lane: int, tile: int) -> int:
    """Index, among a CTA's 128 intermediates, of the one that a lane has in a 64-row tile.

    Its gate is in registers 4m + j, its up in 4m + 2 + j.
    """
    return 32 * tile + 8 * warp + lane // 4


def part(rank: int, tile: int, octet: int, thread: int, i: int, *, block: int, tiles: int, threads: int) -> int:
    """Index, among the float32 sums of a split reduction, of a register of CTA `rank`.

    It is register 4 octet + i of a consumer thread's tile.
    """
    return (((rank * tiles + tile) * (block // 8) + octet) * threads + thread) * 4 + i


# --- output ----------------------------------------------------------------------------------------------------------


def matrix_row(warp: int, lane: int, octet: int) -> tuple[int, int]:
    """The token and the staged column at which the row begins that a lane addresses for stmatrix.

    It is row lane % 8 of the 8 x 8 matrix lane // 8 of four, in the order of `stored`.
    """
    return 8 * octet + lane % 8, lane // 16 * 64 + 16 * warp + lane // 8 % 2 * 8


def stored(lane: int, value: int) -> tuple[int, int, int]:
    """The matrix, row and column to which the transposing stmatrix writes a lane's value, 0 to 7.

    The value is register 4m + value % 4 of the tile value // 4 of two.
    """
    return value // 2, 2 * (lane % 4) + value % 2, lane // 4


def staged(token: int, column: int, element: int = 2) -> int:
    """Index of an element in a warpgroup's buffer of staged output. element: its bytes."""
    return token * (OUT_COLUMNS + OUT_PAD_BYTES // element) + column


def out_column(n: int, group: int, half: int, column: int, *, tiles: int) -> int:
    """The output's column of a warpgroup's staged column, in its `half`-th pair of tiles of output tile n."""
    return n * UP_ROWS + (group * (tiles // 2) + half) * OUT_COLUMNS + column


def ways(addresses: Iterable[int], size: int) -> int:
    """Cycles that an access to shared memory takes, at addresses of `size` bytes each.

    It is the largest number of different words in one bank.
    """
    words = {a // BANK_BYTES + i for a in addresses for i in range(max(1, size // BANK_BYTES))}
    return max(sum(w % BANKS == bank for w in words) for bank in range(BANKS))


# --- grid ------------------------------------------------------------------------------------------------------------


def tile_of(bx: int, by: int, *, tiles_n: int, grid_m: int, split_k: int = 1, group_m: int = 1) -> tuple[int, int, int]:
    """The weight tile, M-tile and part of the reduction of a CTA.

    group_m M-tiles take turns at a weight tile, then at the next. The last band of M-tiles may be thinner.
    """
    n_i, m_i = bx // split_k, by
    if group_m > 1:
        band, within = divmod(by * tiles_n + n_i, group_m * tiles_n)
        rows = min(grid_m - band * group_m, group_m)
        n_i, m_i = within // rows, band * group_m + within % rows
    return n_i, m_i, bx % split_k
