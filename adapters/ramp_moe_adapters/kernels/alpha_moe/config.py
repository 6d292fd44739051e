"""Constants and limits that Alpha-MoE's description and launch share."""

from __future__ import annotations

import functools

from ramp_moe.plugin import MoEShape
from ramp_moe_kernels.limits import MAX_ELEMENTS, MAX_TILES, max_ids, max_tokens

LAYOUT = "gate-up-interleaved-8"
CTA_HIDDEN = 256
"""Output columns that a CTA writes at a time. A remainder would stay unwritten."""


@functools.cache
def most_tokens(block_m: int, shape: MoEShape) -> int:
    """The most tokens of one launch, bounded by the schedule's ids, the grid's tiles, and 32-bit offsets into x."""
    of_elements = MAX_ELEMENTS // shape.hidden_size * shape.top_k
    return max_tokens(shape, max_ids(MAX_TILES, shape.num_experts, block_m), of_elements)
