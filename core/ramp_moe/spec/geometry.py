"""Grid geometry: how many CTAs a kernel launches, and how many of them do work, for an expert histogram.

This is all that the library knows of a kernel's inside. An expert with h_e tokens costs ceil(h_e / block_m)
tiles along the tokens ("M-tiles"); each of them meets ceil(n / block_n) tiles along the weight rows.
Histograms are int64 `[num_experts]` or, for a batch of them, `[..., num_experts]`; results then have the leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError
from .routing import FloatArray, IntArray, active_experts
from .shapes import MoEShape

MAX_TILE = 2**20
"""Outputs of one CTA's tile: several times what the registers and tensor memory of any SM hold."""

MAX_FIELDS = {
    **dict.fromkeys(("block_m", "block_n", "block_k"), 2**20),
    **dict.fromkeys(("n", "k"), 2**24),
    "expert_bytes": 2**48,
    **dict.fromkeys(("split_k", "persistent_ctas", "ctas_per_sm", "cluster_m"), 2**20),
}
"""Bounds, so that counts of CTAs and bytes stay exact in 64 bits."""


def m_tiles(histogram: IntArray, blocks: NDArray[np.int64] | int) -> IntArray:
    """sum_e ceil(h_e / block). With an array of blocks `[B]` the result gains a last axis `[..., B]`."""
    blocks = np.asarray(blocks)
    if blocks.ndim:
        histogram = histogram[..., None, :]
        blocks = blocks[:, None]
    # In integers: float division would round wrongly past 2**53 and costs more.
    tiles: IntArray = ((histogram + (blocks - 1)) // blocks).sum(-1)
    return tiles


class GridFields(TypedDict):
    """The fields of GridGeometry that the weights' sizes do not give."""

    block_m: int
    block_n: int
    block_k: int
    split_k: NotRequired[int]
    persistent_ctas: NotRequired[int | None]
    ctas_per_sm: NotRequired[int]
    cluster_m: NotRequired[int]
    align_block_size: NotRequired[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class GridGeometry:
    """The grid of one launch that multiplies routed tokens with expert weights `[n, k]`. Fields are given by name.

    `gate_up`, `down` and `fused` take the weights' sizes from the shape. Raises ShapeError for a field that is no
    integer or out of bounds, and for a tile that no CTA can hold.

    block_m, block_n: one CTA's output tile, in tokens of one expert and weight rows.
    block_k: depth of one step along k.
    n, k: rows and columns of one expert's weights; the columns are summed over.
    expert_bytes: bytes of one expert's weights that the launch reads (a fused kernel reads up and down projection).
    split_k: CTAs that share one output tile, each with a part of k.
    persistent_ctas: CTAs of a persistent launch, which walk over the tiles; None launches one CTA a tile.
    ctas_per_sm: CTAs resident on one SM at a time.
    cluster_m: M-tiles that run as one cluster of CTAs, 1, 2, 4, 8 or 16. CTAs that are left without an M-tile in the
        last cluster keep their slots until the others of it are done.
    align_block_size: the launch covers the whole buffer of vLLM's moe_align_block_size, one M-tile more than can be
        filled where the tokens do not divide, instead of the tightest upper bound.
    """

    block_m: int
    block_n: int
    block_k: int
    n: int
    k: int
    expert_bytes: int
    split_k: int = 1
    persistent_ctas: int | None = None
    ctas_per_sm: int = 1
    cluster_m: int = 1
    align_block_size: bool = False

    def __post_init__(self) -> None:
        for what, most in MAX_FIELDS.items():
            value = getattr(self, what)
            if value is None and what == "persistent_ctas":
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ShapeError(f"grid geometry: {what} must be an integer, not {value!r}")
            if not 1 <= value <= most:
                raise ShapeError(f"grid geometry: {what} must lie between 1 and {most}, not {value}")
        if self.block_m * self.block_n > MAX_TILE:
            raise ShapeError(
                f"grid geometry: a tile of {self.block_m} tokens by {self.block_n} weight rows has more "
                f"than the {MAX_TILE} sums that a CTA can hold"
            )
        if self.cluster_m not in (1, 2, 4, 8, 16):
            raise ShapeError(f"grid geometry: cluster_m must be 1, 2, 4, 8 or 16, not {self.cluster_m}")
        if self.split_k > self.tiles_k:
            raise ShapeError(f"grid geometry: split_k {self.split_k} exceeds the {self.tiles_k} steps along k")

    @classmethod
    def gate_up(cls, shape: MoEShape, **grid: Unpack[GridFields]) -> Self:
        """The grid of the gate and up projections, `[2 * intermediate_size, hidden_size]` for each expert.

        block_n counts rows of gate and of up: a CTA that computes 64 of each has a block_n of 128.
        """
        return cls(n=shape.gate_up_rows, k=shape.hidden_size, expert_bytes=shape.gate_up_bytes, **grid)

    @classmethod
    def down(cls, shape: MoEShape, **grid: Unpack[GridFields]) -> Self:
        """The grid of the down projection, `[hidden_size, intermediate_size]` for each expert."""
        return cls(n=shape.hidden_size, k=shape.intermediate_size, expert_bytes=shape.down_bytes, **grid)

    @classmethod
    def fused(cls, shape: MoEShape, **grid: Unpack[GridFields]) -> Self:
        """The grid of one launch of all projections: that of `gate_up`, but it reads all of an expert's bytes."""
        return cls(n=shape.gate_up_rows, k=shape.hidden_size, expert_bytes=shape.expert_bytes, **grid)

    @property
    def tiles_n(self) -> int:
        """Tiles along the weight rows, ceil(n / block_n) (the paper's lambda)."""
        return -(-self.n // self.block_n)

    @property
    def tiles_k(self) -> int:
        """Steps along k, ceil(k / block_k) (the paper's kappa, rounded up)."""
        return -(-self.k // self.block_k)

    @property
    def ctas_per_m_tile(self) -> int:
        return self.tiles_n * self.split_k

    def m_tiles(self, histogram: IntArray) -> IntArray:
        """Tiles along the tokens that hold at least one token."""
        return m_tiles(histogram, self.block_m)

    def logical(self, histogram: IntArray) -> IntArray:
        """CTAs (output tiles, for a persistent launch) that do work, or wait in a cluster for others that do: what the
        cost model sees."""
        clusters = -(-self.m_tiles(histogram) // self.cluster_m)
        return clusters * self.cluster_m * self.ctas_per_m_tile

    def max_m_tiles(self, max_ids: int, num_experts: int) -> int:
        """M-tiles of the worst routing of `max_ids` = tokens x top_k ids; what a launch without the counts must cover.

        The worst routing gives every expert one token and then fills whole blocks. vLLM's buffer rounds the last
        block up (`align_block_size`).
        """
        if max_ids <= num_experts:
            return max_ids
        rest = max_ids - num_experts
        return num_experts + (-(-rest // self.block_m) if self.align_block_size else rest // self.block_m)

    def launched(self, max_ids: int, num_experts: int) -> int:
        """CTAs in the launch for at most `max_ids` = tokens x top_k routed ids: what a profiler counts."""
        if self.persistent_ctas is not None:
            return self.persistent_ctas
        clusters = -(-self.max_m_tiles(max_ids, num_experts) // self.cluster_m)
        return clusters * self.cluster_m * self.ctas_per_m_tile

    def cta_slots(self, num_sms: int) -> int:
        """CTAs that run at the same time on `num_sms` SMs."""
        resident = num_sms * self.ctas_per_sm
        return resident if self.persistent_ctas is None else min(resident, self.persistent_ctas)

    def waves(self, histogram: IntArray, num_sms: int) -> IntArray:
        """Rounds in which the slots are filled, rounded up: an almost empty last wave takes as long as a full one."""
        waves: IntArray = -(-self.logical(histogram) // self.cta_slots(num_sms))
        return waves

    def tail_utilisation(self, histogram: IntArray, num_sms: int) -> FloatArray:
        """Share of the slots of all waves that have work, in (0, 1]; 1 for a batch without tokens."""
        slots = self.waves(histogram, num_sms) * self.cta_slots(num_sms)
        return np.where(slots > 0, self.logical(histogram) / np.maximum(slots, 1), 1.0)

    def padding_waste(self, histogram: IntArray) -> FloatArray:
        """Share of the token rows of all M-tiles that no token fills, in [0, 1); 0 for a batch without tokens."""
        rows = self.m_tiles(histogram) * self.block_m
        return np.where(rows > 0, 1 - histogram.sum(-1) / np.maximum(rows, 1), 0.0)

    def weight_bytes(self, histogram: IntArray) -> IntArray:
        """Bytes of weights that must come from memory once: every active expert's."""
        return np.asarray(active_experts(histogram) * self.expert_bytes)

    def weight_traffic(self, histogram: IntArray) -> IntArray:
        """Bytes of weights that CTAs load: each M-tile reads its expert's weights again, from L2 at best."""
        return self.m_tiles(histogram) * self.expert_bytes
