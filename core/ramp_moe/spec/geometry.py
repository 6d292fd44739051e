"""Grid geometry: how many CTAs a kernel launches, and how many of them do work, for an expert histogram.

The library knows nothing else about a kernel's inside. An expert with h_e tokens needs ceil(h_e / block_m) tiles along
the tokens ("M-tiles"). Each M-tile is computed in ceil(n / block_n) tiles along the weight rows.

A histogram is int64 `[num_experts]`. Several are stacked as `[..., num_experts]`; results keep the leading axes.
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
"""Bound on the outputs of one CTA's tile: several times what the registers and tensor memory of any SM hold."""

INTEGERS = (int, np.integer)
MAX_FIELDS = {
    **dict.fromkeys(("block_m", "block_n", "block_k"), 2**20),
    **dict.fromkeys(("n", "k"), 2**24),
    "expert_bytes": 2**48,
    **dict.fromkeys(("split_k", "persistent_ctas", "ctas_per_sm", "cluster_m"), 2**20),
}
"""Largest value of each field of GridGeometry. The bounds keep counts of CTAs and bytes exact in 64 bits."""


def m_tiles(histogram: IntArray, blocks: NDArray[np.int64] | int) -> IntArray:
    """Count the M-tiles, sum_e ceil(h_e / block). An array of blocks `[B]` adds a last axis: `[..., B]`."""
    blocks = np.asarray(blocks)
    if blocks.ndim:
        histogram = histogram[..., None, :]
        blocks = blocks[:, None]
    # Integer division: a float would round wrongly past 2**53, and costs more.
    tiles: IntArray = ((histogram + (blocks - 1)) // blocks).sum(-1)
    return tiles


class GridFields(TypedDict):
    """Fields of GridGeometry that do not follow from the weights' sizes."""

    block_m: int
    block_n: int
    block_k: int
    split_k: NotRequired[int]
    persistent_ctas: NotRequired[int | None]
    ctas_per_sm: NotRequired[int]
    cluster_m: NotRequired[int]
    align_block_size: NotRequired[bool]
    stream_k: NotRequired[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class GridGeometry:
    """The grid of one launch that multiplies routed tokens with expert weights `[n, k]`. Fields are given by name.

    `gate_up`, `down` and `fused` take the weights' sizes from the shape. Raises ShapeError for a field that is no
    integer or out of bounds, for a tile that no CTA can hold, and for more `split_k` than steps along k.

    block_m, block_n: one CTA's output tile, in tokens of one expert and weight rows.
    block_k: depth of one step along k.
    n, k: rows and columns of one expert's weights; products are summed along k.
    expert_bytes: bytes of one expert's weights that the launch reads (a fused kernel reads all projections).
    split_k: CTAs that share one output tile; each sums a part of k.
    persistent_ctas: CTAs of a persistent launch, each of which computes several tiles. None launches one CTA per tile.
    ctas_per_sm: CTAs resident on one SM at a time.
    cluster_m: M-tiles that run as one cluster of CTAs: 1, 2, 4, 8 or 16. The last cluster may have CTAs without an
        M-tile, which keep their slots until the others are done.
    align_block_size: True if the launch covers the whole buffer of vLLM's moe_align_block_size, False if it covers the
        tightest upper bound. The buffer is rounded up to whole blocks, which may be one M-tile more.
    stream_k: True if the CTAs of a persistent launch share the output tiles of the last wave along k. It then takes as
        long as its share of a wave.
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
    stream_k: bool = False

    def __post_init__(self) -> None:
        for what, most in MAX_FIELDS.items():
            value = getattr(self, what)
            if value is None and what == "persistent_ctas":
                continue
            if isinstance(value, bool) or not isinstance(value, INTEGERS):
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
        if self.stream_k and self.persistent_ctas is None:
            raise ShapeError("grid geometry: stream_k needs persistent_ctas, the CTAs that share the last wave")
        if self.split_k > self.tiles_k:
            raise ShapeError(f"grid geometry: split_k {self.split_k} exceeds the {self.tiles_k} steps along k")

    @classmethod
    def gate_up(cls, shape: MoEShape, **grid: Unpack[GridFields]) -> Self:
        """The grid of the gate and up projections, `[2 * intermediate_size, hidden_size]` per expert.

        block_n counts the rows of both: a CTA that computes 64 of each has a block_n of 128.
        """
        return cls(n=shape.gate_up_rows, k=shape.hidden_size, expert_bytes=shape.gate_up_bytes, **grid)

    @classmethod
    def down(cls, shape: MoEShape, **grid: Unpack[GridFields]) -> Self:
        """The grid of the down projection, `[hidden_size, intermediate_size]` per expert."""
        return cls(n=shape.hidden_size, k=shape.intermediate_size, expert_bytes=shape.down_bytes, **grid)

    @classmethod
    def fused(cls, shape: MoEShape, **grid: Unpack[GridFields]) -> Self:
        """The grid of one launch of all projections: as `gate_up`, except that it reads all of an expert's bytes."""
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
        """CTAs that do work, which is what the cost model sees; in a persistent launch, output tiles.

        CTAs that only wait for the others of their cluster count, too.
        """
        clusters = -(-self.m_tiles(histogram) // self.cluster_m)
        return clusters * self.cluster_m * self.ctas_per_m_tile

    def max_m_tiles(self, max_ids: int, num_experts: int) -> int:
        """M-tiles of the worst routing of `max_ids` = tokens x top_k ids. A launch that cannot read it covers them all.

        The worst routing gives every expert one token and then fills whole blocks. vLLM's buffer rounds up what is
        left to a whole block (`align_block_size`).
        """
        if max_ids <= num_experts:
            return max_ids
        rest = max_ids - num_experts
        return num_experts + (-(-rest // self.block_m) if self.align_block_size else rest // self.block_m)

    def launched(self, max_ids: int, num_experts: int) -> int:
        """CTAs of the launch for at most `max_ids` = tokens x top_k ids, as a profiler counts them."""
        if self.persistent_ctas is not None:
            return self.persistent_ctas
        clusters = -(-self.max_m_tiles(max_ids, num_experts) // self.cluster_m)
        return clusters * self.cluster_m * self.ctas_per_m_tile

    def cta_slots(self, num_sms: int) -> int:
        """CTAs that run at the same time on `num_sms` SMs."""
        resident = num_sms * self.ctas_per_sm
        return resident if self.persistent_ctas is None else min(resident, self.persistent_ctas)

    def waves(self, histogram: IntArray, num_sms: int) -> IntArray:
        """Waves of CTAs, ceil(logical / slots): an almost empty last wave takes as long as a full one."""
        waves: IntArray = -(-self.logical(histogram) // self.cta_slots(num_sms))
        return waves

    def tail_utilisation(self, histogram: IntArray, num_sms: int) -> FloatArray:
        """Share of the slots of all waves that have work, float64 in (0, 1]; 1 for a batch without tokens.

        It is 1 with stream-K, too, which keeps all slots busy to the end.
        """
        if self.stream_k:
            return np.ones(np.shape(self.logical(histogram)))
        slots = self.waves(histogram, num_sms) * self.cta_slots(num_sms)
        return np.where(slots > 0, self.logical(histogram) / np.maximum(slots, 1), 1.0)

    def padding_waste(self, histogram: IntArray) -> FloatArray:
        """Share of the token rows of all M-tiles that hold no token, float64 in [0, 1); 0 without tokens."""
        rows = self.m_tiles(histogram) * self.block_m
        return np.where(rows > 0, 1 - histogram.sum(-1) / np.maximum(rows, 1), 0.0)

    def weight_bytes(self, histogram: IntArray) -> IntArray:
        """Bytes of weights that must come from memory at least once: those of the active experts."""
        return np.asarray(active_experts(histogram) * self.expert_bytes)

    def weight_traffic(self, histogram: IntArray) -> IntArray:
        """Bytes of weights that CTAs load. Each M-tile loads its expert's weights again, from L2 at best."""
        return self.m_tiles(histogram) * self.expert_bytes
