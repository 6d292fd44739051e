"""The plan of a profile: which batches are measured, and in which order, so that stopping anywhere leaves a good
choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..measurements.sweep import Split
from ..spec.geometry import m_tiles
from ..spec.routing import TUNE_KINDS, FloatArray, IntArray, active_experts, expert_histogram, generate
from ..spec.shapes import MoEShape

TUNE_SIZES = tuple(2**i for i in range(14))
TUNE_SEEDS = (1, 2)

TEST_SIZES = (1, 3, 12, 24, 48, 96, 192, 384, 768, 1536, 3072, 6144)
TEST_KINDS = ("uniform", "dirichlet0.3", "distinct0.5", "zipf2.0")
"""Kinds of test batches. Apart from uniform, which every deployment meets, tuning never sees them: the test is of new
skews."""

FIRST_TEST_SEED = 100
"""Each test size has a seed of its own, so that the sizes of dirichlet do not share one draw of probabilities."""

REDRAWN_TOKENS = 1024
"""Tokens of the largest batch that is drawn on its own. Drawing larger ones would take most of planning's time, and two
draws of a kind lie within 0.03 of each other there. So tune kinds have one draw, and test sizes share a seed, so that
one draw serves them."""

MAX_TUNE = 90
"""Most tune batches. Every batch of the pool that is left out lies within 0.05 of a measured one; each feature spans 1.
"""

START = 64
"""Tokens of the uniform batch that comes first: a usual decoding step, in the middle of the sizes."""

HEAD_START = 6
"""Tune batches before the first test batch. A fit from fewer is not worth testing."""

TUNE_PER_TEST = 2

FEATURE_BLOCKS = np.array([8, 16, 32, 64, 128])
"""Token blocks of the kernels' tiles, from the smallest to the largest in use."""


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """One batch to measure: `num_tokens` routed as `routing` (see routing.KINDS) by `seed`.

    Fits see "tune" batches only. "test" batches tell how good the fits are.
    """

    num_tokens: int
    routing: str
    seed: int
    split: Split

    def topk_ids(self, shape: MoEShape) -> IntArray:
        """The batch's ids, int64 `[tokens, top_k]`."""
        return generate(self.routing, self.num_tokens, shape.num_experts, shape.top_k, self.seed)

    def histogram(self, shape: MoEShape) -> IntArray:
        """Tokens per expert, int64 `[num_experts]`."""
        return expert_histogram(self.topk_ids(shape), shape.num_experts)


Drawn = tuple[PlannedBatch, IntArray]


def plan(shape: MoEShape) -> list[PlannedBatch]:
    """Plan the batches to measure, best first: at most MAX_TUNE of "tune" and all of "test", no two of them the same.

    The plan depends on the experts and top_k of the shape alone, so that kernels profiled on different days share
    batches.
    """
    tune = _ordered(_distinct(_draw(_tune_pool(), shape)))[:MAX_TUNE]
    merged: list[PlannedBatch] = []
    waiting = held_out(shape, FIRST_TEST_SEED, tune)
    for i, (batch, _) in enumerate(tune, 1):
        merged.append(batch)
        if waiting and i > HEAD_START and (i - HEAD_START) % TUNE_PER_TEST == 0:
            merged.append(waiting.pop(0))
    return merged + waiting


def held_out(shape: MoEShape, first_seed: int, known: Iterable[Drawn] = ()) -> list[PlannedBatch]:
    """Draw test batches, none of them the same as one of `known`. They are shuffled, so that the first ones judge like
    all."""
    batches = [batch for batch, _ in _distinct(_draw(_test_pool(first_seed), shape), known)]
    return [batches[i] for i in np.random.default_rng(first_seed).permutation(len(batches))]


def _tune_pool() -> list[PlannedBatch]:
    return [
        PlannedBatch(n, kind, seed, "tune")
        for seed in TUNE_SEEDS
        for kind in TUNE_KINDS
        for n in TUNE_SIZES
        if seed == TUNE_SEEDS[0] or n <= REDRAWN_TOKENS
    ]


def _test_pool(first_seed: int) -> list[PlannedBatch]:
    seeds = [first_seed + (i if n <= REDRAWN_TOKENS else len(TEST_SIZES)) for i, n in enumerate(TEST_SIZES)]
    return [
        PlannedBatch(n, kind, seed, "test") for kind in TEST_KINDS for n, seed in zip(TEST_SIZES, seeds, strict=True)
    ]


def _draw(pool: Sequence[PlannedBatch], shape: MoEShape) -> list[Drawn]:
    """Pair each batch with its histogram. It equals that of PlannedBatch.histogram, but each kind and seed is drawn
    once."""
    # Tokens are drawn one after the other, so that the ids of a smaller batch are the first rows of the largest.
    largest: dict[tuple[str, int], PlannedBatch] = {}
    for batch in sorted(pool, key=lambda b: b.num_tokens):
        largest[batch.routing, batch.seed] = batch
    ids = {key: batch.topk_ids(shape) for key, batch in largest.items()}
    return [(b, expert_histogram(ids[b.routing, b.seed][: b.num_tokens], shape.num_experts)) for b in pool]


def _distinct(drawn: Iterable[Drawn], known: Iterable[Drawn] = ()) -> list[Drawn]:
    """Keep those of `drawn` that equal none before them and none of `known`. Few experts leave kinds alike."""
    seen = {(batch.num_tokens, histogram.tobytes()) for batch, histogram in known}
    kept = []
    for batch, histogram in drawn:
        key = batch.num_tokens, histogram.tobytes()
        if key not in seen:
            seen.add(key)
            kept.append((batch, histogram))
    return kept


def features(num_tokens: IntArray, histograms: IntArray) -> FloatArray:
    """Features of batches as the cost model sees them, float64 `[batches, 8]`, each column scaled to [0, 1] over them.

    They are logarithms of the tokens, the active experts, the M-tiles of each of FEATURE_BLOCKS, and the hottest
    expert's tokens.
    """
    counts = (num_tokens, active_experts(histograms), m_tiles(histograms, FEATURE_BLOCKS), histograms.max(-1))
    columns = np.log2(np.column_stack(counts))
    spans = np.ptp(columns, axis=0)
    return np.asarray((columns - columns.min(0)) / np.where(spans > 0, spans, 1))


def _ordered(drawn: Sequence[Drawn]) -> list[Drawn]:
    """Order `drawn` by farthest points: next comes the batch farthest from the nearest batch before it.

    One uniform batch of the first seed precedes every two others, farthest from the uniform batches before it. Static
    dispatch tables are tuned on the uniform batches, so all sizes must come early.
    """
    f = features(np.array([batch.num_tokens for batch, _ in drawn]), np.array([histogram for _, histogram in drawn]))
    # Distances are rounded, so that the last bit of another machine's logarithms does not break a tie the other way.
    distances = np.linalg.norm(f[:, None] - f, axis=-1).round(9)

    def take(among: list[int], before: list[int]) -> int:
        return among.pop(int(distances[np.ix_(among, before)].min(1).argmax()))

    first = next(i for i, (b, _) in enumerate(drawn) if b.routing == "uniform" and b.num_tokens == START)
    seed = drawn[first][0].seed
    uniforms = [i for i, (b, _) in enumerate(drawn) if b.routing == "uniform" and b.seed == seed]
    others = [i for i in range(len(drawn)) if i not in uniforms]
    uniforms.remove(first)
    order, taken = [first], [first]
    while uniforms or others:
        for _ in range(min(2, len(others))):
            order.append(take(others, order))
        if uniforms:
            taken.append(take(uniforms, taken))
            order.append(taken[-1])
    return [drawn[i] for i in order]
