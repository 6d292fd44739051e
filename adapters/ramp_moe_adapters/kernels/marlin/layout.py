"""Repacks our 4-bit weights into Marlin's layout, expert by expert, in plain torch on any device.

Marlin's tile is 16 columns by 64 weight rows. A thread's 32 bits hold eight codes of it in the order in which its
instructions want them. Both formats have the codes that vLLM gives them: INT4 with 8 added, and e2m1.
"""

from __future__ import annotations

import functools

import torch
from ramp_moe.runtime.formats import unpack
from torch import Tensor

TILE_K, TILE_N = 16, 64


@functools.cache
def code_order() -> tuple[int, ...]:
    """The order of the 1,024 codes of a tile, `[16 columns, 64 rows]` stored as four of 16 rows, in eights."""
    found = []
    for lane in range(32):
        row, pair = lane // 4, 2 * (lane % 4)
        of_lane = [
            16 * column + row + half for half in (0, 8) for column in (pair, pair + 1, pair + 8, pair + 9)
        ]  # fmt: skip
        for part in range(4):
            eight = [at + 256 * part for at in of_lane]
            found += [eight[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return tuple(found)


def scale_order() -> tuple[int, ...]:
    """The order of the scales of 64 weight rows: those eight rows apart lie side by side."""
    return tuple(first + 8 * i for first in range(8) for i in range(8))


def repack(packed: Tensor) -> Tensor:
    """Convert weights, uint8 `[E, N, K / 2]`, to Marlin's int32 `[E, K / 16, 2 N]`."""
    experts, n, half = packed.shape
    k = 2 * half
    out = torch.empty((experts, k // TILE_K, 2 * n), dtype=torch.int32, device=packed.device)
    order = torch.tensor(code_order(), dtype=torch.int64, device=packed.device)
    for e in range(experts):
        codes = unpack(packed[e]).T.reshape(k // TILE_K, TILE_K, n // 16, 16).permute(0, 2, 1, 3)
        eights = codes.reshape(-1, TILE_K * TILE_N)[:, order].reshape(-1, 4, 2)
        words = (eights[..., 0] | eights[..., 1] << 4).contiguous()
        out[e] = words.view(torch.int32).reshape(k // TILE_K, 2 * n)
    return out


def repack_scales(scale: Tensor) -> Tensor:
    """Convert scales `[E, N, K / G]` to Marlin's `[E, K / G, N]`, bf16 or e8m0."""
    experts, n, groups = scale.shape
    order = torch.tensor(scale_order(), dtype=torch.int64, device=scale.device)
    e8m0 = scale.dtype == torch.uint8
    given = scale if e8m0 else scale.to(torch.bfloat16)
    out = given.transpose(1, 2).reshape(experts, -1, TILE_N)[:, :, order]
    if e8m0:
        out = out.reshape(experts, -1, 4)[:, :, [0, 2, 1, 3]]
    out = out.reshape(experts, groups, n).contiguous()
    return out.view(torch.float8_e8m0fnu) if e8m0 else out
