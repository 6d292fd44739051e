"""Which batch sizes compile something of their own.

Triton compiles a kernel once for each set of its constants, and for each of a few properties of its other arguments:
whether 16 divides a pointer or an integer, whether an integer is 1, and whether it has more than 32 bits. Counts of a
batch are arguments that are left out of this (`do_not_specialize`), or multiples of 16 in any case. So what a batch's
size decides are constants, warps, and which launches there are; each changes at one size:

    schedule    the chunk that one program counts, two launches above the largest; groups that a program quantises
    combine     columns of a program
    permute     one launch up to FUSED_IDS routed ids
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ramp_moe.plugin import MoEShape

from ..reference import GROUP
from .combine import FEW_ELEMENTS
from .config import multiplies_fp8
from .quantise import MANY_GROUPS
from .schedule import MAX_CHUNK, MIN_CHUNK

MAX_INT = 2**31 - 1


def warm_sizes(shape: MoEShape, max_tokens: int, group: int = GROUP, ids: Iterable[int] = ()) -> tuple[int, ...]:
    """The smallest of each range of batch sizes, from 1 to max_tokens, that launch the same compiled kernels: schedule,
    quantise, combine and GEMMs. A launch of one configuration at each of them compiles all that any size needs.

    group: columns that share a scale where hidden states are quantised. ids: further numbers of routed ids up to which
    a launch is another one than above.
    """
    last = {most // shape.top_k for most in (*_chunks(), *ids)}
    last |= {FEW_ELEMENTS // shape.hidden_size, MAX_INT // shape.hidden_size}
    if multiplies_fp8(shape):
        last.add(MANY_GROUPS // (shape.hidden_size // group))
    return (1, *sorted(size + 1 for size in last if 0 < size < max_tokens))


def _chunks() -> Iterator[int]:
    """Routed ids up to which the schedule's chunk is the next smaller."""
    chunk = MIN_CHUNK
    while chunk <= MAX_CHUNK:
        yield chunk
        chunk *= 2
