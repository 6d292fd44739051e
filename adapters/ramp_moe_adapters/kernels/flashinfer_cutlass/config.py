"""FlashInfer's CUTLASS tactics, the pairs of them that are worth measuring, and the tile of its fp8 GEMMs.

FlashInfer numbers the tactics of the two GEMMs but does not name them, so their order is repeated here. It is the order
for sm_90 and bf16 as of 0.7.2.post1. The sources are `get_candidate_configs` in csrc/nv_internal/tensorrt_llm/kernels/
cutlass_kernels/cutlass_heuristic.cpp, then `getTmaWarpSpecializedConfigs` and `getAmpereConfigs` in moe_gemm/
moe_gemm_template_dispatch.h. The adapter compares the numbers of tactics with those of the module that it loads.

With fp8 block scales there are no tactics. `grouped_gemm_dispatch` in fp8_blockscale_gemm/
fp8_blockscale_gemm_kernel.cuh calls `get_best_gemm_config` in deep_gemm/jit_utils.cuh, a copy from an early DeepGEMM.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

TILES = ((128, 16), (128, 32), (128, 64), (128, 128), (128, 256), (256, 128))
"""M and N of one CTA."""
CLUSTERS = ((1, 1), (2, 1), (1, 2), (2, 2))
"""CTAs along M and N that share their loads."""
CLUSTER_N = 128
"""Smallest tile along N that has clusters along N."""
AMPERE_TILES = ((32, 128), (64, 128), (128, 128))
AMPERE_STAGES = (2, 3, 4)
COUNTS = (45, 81)
"""Numbers of tactics of the two GEMMs in bf16. The second GEMM's indices continue the first's."""


@dataclass(frozen=True, slots=True)
class Tactic:
    """One tactic of a GEMM: a CTA's tile and its cluster, in tokens and weight rows.

    index: its number in FlashInfer.
    swapped: True if the weights are the MMA's M and the tokens its N; False if it is the other way round.
    finalised: True if the second GEMM adds its weighted rows to the output itself.
    stages: pipeline stages of an Ampere kernel; 0 for a Hopper kernel, which finds its own number.
    """

    index: int
    tokens: int
    weights: int
    cluster: tuple[int, int] = (1, 1)
    swapped: bool = False
    finalised: bool = False
    stages: int = 0

    @property
    def name(self) -> str:
        if self.stages:
            return f"t{self.tokens}w{self.weights}-sm80-st{self.stages}"
        marks = ("-swap" if self.swapped else "") + ("-fin" if self.finalised else "")
        return f"t{self.tokens}w{self.weights}-c{self.cluster[0]}x{self.cluster[1]}{marks}"


@cache
def tactics(gemm: int) -> tuple[Tactic, ...]:
    """All tactics of the first or the second GEMM, in FlashInfer's order. `profile_ids` takes their `index`."""
    found: list[Tactic] = []
    first = 0 if gemm == 1 else COUNTS[0]
    for swapped, finalised in itertools.product((False, True), (False,) if gemm == 1 else (False, True)):
        for (m, n), (cm, cn) in itertools.product(TILES, CLUSTERS):
            if cn > 1 and n < CLUSTER_N:
                continue
            tile, cluster = ((n, m), (cn, cm)) if swapped else ((m, n), (cm, cn))
            found.append(Tactic(first + len(found), *tile, cluster, swapped, finalised))
    for (m, n), stages in itertools.product(AMPERE_TILES, AMPERE_STAGES):
        found.append(Tactic(first + len(found), m, n, stages=stages))
    return tuple(found)


def worthwhile(gemm: int) -> tuple[Tactic, ...]:
    """The tactics that differ in their geometry and are not beaten by it.

    Left out are tiles of fewer than 128 weight rows (plain 128x16 to 128x64), which would load 128 tokens for few rows,
    and clusters of four. If a plain and a swapped tile have the same sides and cluster, only the plain one stays.
    """
    found: dict[tuple[int, int, tuple[int, int], bool, int], Tactic] = {}
    for t in tactics(gemm):
        if t.weights >= 128 and t.cluster != (2, 2):
            found.setdefault((t.tokens, t.weights, t.cluster, t.finalised, t.stages), t)
    return tuple(found.values())


def pairs(ampere: bool) -> Iterator[tuple[Tactic, Tactic]]:
    """Yield the pairs to measure, from 45 x 81.

    Both tactics are worthwhile, with the same tokens per tile, so both GEMMs have the same M-tiles. Ampere's tactics
    pair only with Ampere's of as many stages.

    ampere: True if the shape has Ampere's tactics.
    """
    for up, down in itertools.product(worthwhile(1), worthwhile(2)):
        if up.tokens == down.tokens and up.stages == down.stages and (ampere or not up.stages):
            yield up, down


SWAPPED_BELOW, SWAPPED_BELOW_ON_H20 = 32, 64
"""Batch sizes below which the weights are the MMA's M."""
H20_SMS = 78


@dataclass(frozen=True, slots=True)
class Fp8Tile:
    """One CTA's tokens and weight rows. swapped: True if the weights are the MMA's M."""

    tokens: int
    weights: int
    swapped: bool = False


WITHOUT_DEEP_GEMM = Fp8Tile(128, 64)
"""The tile of every batch with TRTLLM_DG_ENABLED=0."""


@cache
def fp8_tile(num_tokens: int, n: int, num_experts: int, num_sms: int) -> Fp8Tile:
    """The tile for weights `[num_experts, n, any]` and a batch of `num_tokens`.

    It expects `num_tokens` for every expert. The tile has the fewest waves, then the fullest last wave, then the
    smallest N.
    """
    swapped = num_tokens < (SWAPPED_BELOW_ON_H20 if num_sms == H20_SMS else SWAPPED_BELOW)
    mma_m, mma_n = (n, num_tokens) if swapped else (num_tokens, n)
    block_m = 64 if mma_m <= 64 else 128

    def rank(block_n: int) -> tuple[int, int, int]:
        tiles = -(-mma_m // block_m) * -(-mma_n // block_n) * num_experts
        return -(-tiles // num_sms), -(tiles % num_sms or num_sms), block_n

    block_n = min(range(16, 129, 8), key=rank)
    return Fp8Tile(block_n, block_m, True) if swapped else Fp8Tile(block_m, block_n)


LAYOUT = "up-first"
ALIGNMENT = 8
"""bf16 elements in the 16 bytes to which TMA needs rows aligned."""
