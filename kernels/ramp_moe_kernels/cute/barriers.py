"""The arrivals at the fused kernel's mbarriers: what each barrier expects, and what the roles do.

The kernel initialises its barriers by `expected`, and its roles branch by the warps and lanes that are named here.
`check` counts thread by thread what arrives, and compares. A barrier that expects an arrival too many hangs. One that
expects too few corrupts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ramp_moe.plugin import KernelError

from .config import GATHER_THREADS, PRODUCER_THREADS, ROW_BYTES, UP_ROWS, Config

WARP = 32
WEIGHTS_WARP = 0
"""The warp that loads weights; the other producers copy tokens."""
PRODUCER_WARPS = PRODUCER_THREADS // WARP
"""Consumers are the warps from here on."""
FIRST_GATHERER = PRODUCER_THREADS - GATHER_THREADS
"""The first thread that copies tokens."""
OWN_LANE, OTHER_LANE = 0, 1
"""Lanes of a consumer warp that release a stage: the first to this CTA's producers, the second to the pair's other."""
STAGE_BYTES = UP_ROWS * ROW_BYTES
"""Bytes of weights in a stage."""


class Arrivals(NamedTuple):
    """A number for each kind of barrier. The first four kinds have one barrier per stage."""

    full_w: int
    empty_w: int
    full_x: int
    empty_x: int
    gathered: int


def expected(c: Config, readers: int = 1) -> Arrivals:
    """Arrivals that complete a phase.

    readers: CTAs that read what is loaded into this one's stages. In the kernel, only the device knows this number.
    """
    return Arrivals(full_w=1, empty_w=c.warps * readers, full_x=GATHER_THREADS, empty_x=c.warps, gathered=1)


def expected_bytes(c: Config) -> Arrivals:
    """Bytes that complete a phase, in addition to the arrivals."""
    return Arrivals(STAGE_BYTES, 0, 0, 0, (c.split_k - 1) * part_bytes(c))


def part_bytes(c: Config) -> int:
    """Bytes of the sums that a CTA of a split reduction sends to each of the others."""
    return c.block_m * UP_ROWS * 4


def arriving(c: Config, paired: bool = False) -> list[Arrivals]:
    """Arrivals in a phase, counted over all threads, for each CTA of a cluster."""
    found = [Counter[str]() for _ in range(_ctas(c))]
    for rank in range(len(found)):
        for thread in range(c.threads):
            for barrier, at in _arrivals_of(thread, rank, c, paired):
                found[at][barrier] += 1
    return [Arrivals(*(counts[name] for name in Arrivals._fields)) for counts in found]


def landing(c: Config, paired: bool = False) -> list[Arrivals]:
    """Bytes that land in a phase, for each CTA of a cluster."""
    found = [Counter[str]() for _ in range(_ctas(c))]
    for rank in range(len(found)):
        for barrier, at, nbytes in _bytes_of(rank, c, paired):
            found[at][barrier] += nbytes
    return [Arrivals(*(counts[name] for name in Arrivals._fields)) for counts in found]


def check(c: Config) -> None:
    """Raises KernelError that names the barrier, if the roles do not do what a phase expects."""
    for one in map(c.of, c.blocks):
        for paired in (False, True) if c.pair else (False,):
            for unit, wanted, per_cta in (
                ("arrivals", expected(one, 1 + paired), arriving(one, paired)),
                ("bytes", expected_bytes(one), landing(one, paired)),
            ):
                for found in per_cta:
                    for name, want, have in zip(Arrivals._fields, wanted, found, strict=True):
                        if want != have and not (name == "gathered" and one.split_k == 1):
                            raise KernelError(f"cute: {one.name}: barrier {name} waits for {want} {unit}, gets {have}")


def _ctas(c: Config) -> int:
    """CTAs of a cluster."""
    return 2 if c.pair else c.split_k


def _arrivals_of(thread: int, rank: int, c: Config, paired: bool) -> Iterator[tuple[str, int]]:
    """The barriers on which a thread of CTA `rank` arrives in a phase, each with its CTA."""
    warp, lane = divmod(thread, WARP)
    if warp == WEIGHTS_WARP:
        if lane == 0:  # elected; it expects the bytes, too
            yield "full_w", rank
    elif warp < PRODUCER_WARPS:
        yield "full_x", rank
    else:
        if lane == OWN_LANE:
            yield "empty_w", rank
            yield "empty_x", rank
        if paired and lane == OTHER_LANE:
            yield "empty_w", rank ^ 1
        if c.split_k > 1 and thread == PRODUCER_THREADS:
            yield "gathered", rank


def _bytes_of(rank: int, c: Config, paired: bool) -> Iterator[tuple[str, int, int]]:
    """The barriers to which copies of CTA `rank` report in a phase, each with its CTA, and bytes."""
    box = STAGE_BYTES // 2 if c.pair else STAGE_BYTES
    if paired:  # its half, for both
        yield from (("full_w", at, box) for at in range(2))
    else:
        yield from (("full_w", rank, box) for _ in range(1 + c.pair))
    yield from (("gathered", at, part_bytes(c)) for at in range(c.split_k) if at != rank)
