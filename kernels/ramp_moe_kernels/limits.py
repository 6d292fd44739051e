"""Limits on the size of a layer and of a batch, both for describing kernels and for launching them.

Every kernel that is built on the schedule has its limits: MAX_IDS routed ids and MAX_EXPERTS experts.
"""

from __future__ import annotations

from ramp_moe.plugin import KernelError, MoEShape

MAX_IDS = 2**20
"""Most routed ids of one batch: tokens * top_k."""
MAX_EXPERTS = 1024
MAX_ELEMENTS = 2**31 - 1
"""Most elements of a tensor that is addressed with 32 bits, and of a batch's widest buffer: 4 GiB in bf16."""
MAX_TILES = 65_535
"""Most CTAs along a grid's y axis."""


def too_many_experts(shape: MoEShape) -> str | None:
    """Why the schedule cannot sort a shape's ids; None if it can."""
    if shape.num_experts > MAX_EXPERTS:
        return f"{shape.num_experts} experts are more than the schedule's {MAX_EXPERTS}"
    return None


def max_ids(tiles: int, num_experts: int, block: int) -> int:
    """The most routed ids whose worst routing needs at most `tiles` tiles of `block` slots (see `max_tiles`)."""
    return tiles if tiles <= num_experts else num_experts + (tiles - num_experts) * block


def max_tokens(shape: MoEShape, *ids: int) -> int:
    """The most tokens of one batch whose routed ids exceed neither MAX_IDS nor any of `ids`."""
    return min(MAX_IDS, *ids) // shape.top_k


def check_tokens(kernel: str, config: str, num_tokens: int, most: int) -> None:
    """Raises KernelError for a batch of more tokens than one launch takes."""
    if num_tokens > most:
        raise KernelError(f"{kernel}: {config} takes up to {most} tokens here, not {num_tokens}; split the batch")
