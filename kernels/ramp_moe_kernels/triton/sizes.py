"""The batch sizes at which the Triton path begins to launch other compiled kernels.

Triton compiles a kernel for each set of constants, and for a few properties of the other arguments. These are whether
16 divides a pointer or an integer, whether an integer is 1, and whether it has more than 32 bits. Counts of a batch are
exempt (`do_not_specialize`), or are multiples of 16 in any case. So the batch size only changes constants, warps, and
which launches there are:

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
    """The batch sizes at which to launch a configuration, to compile all that it needs for 1 to max_tokens tokens.

    Within ranges of sizes, the compiled kernels are the same: schedule, quantise, combine and GEMMs. The smallest size
    of each range is returned.

    group: columns of hidden states that share a scale, if they are quantised. ids: further numbers of routed ids, above
    which launches differ.
    """
    last = {most // shape.top_k for most in (*_chunks(), *ids)}
    last |= {FEW_ELEMENTS // shape.hidden_size, MAX_INT // shape.hidden_size}
    if multiplies_fp8(shape):
        last.add(MANY_GROUPS // (shape.hidden_size // group))
    return (1, *sorted(size + 1 for size in last if 0 < size < max_tokens))


def _chunks() -> Iterator[int]:
    """The numbers of routed ids above which the schedule's chunk is the next larger one."""
    chunk = MIN_CHUNK
    while chunk <= MAX_CHUNK:
        yield chunk
        chunk *= 2
